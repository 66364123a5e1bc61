"""Instruction tuning: the template, the mask, the mean, the batches, the adapters, and what a tuning survives.

Each comparison has a control: the same comparison with the mistake made on purpose, which must show.
"""
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import instructions as rows_module
import lora
import plot_dynamics
import runs
import sample
import sft
from conftest import CHILD, INSTRUCTIONS, ROOT, TUNE, messages, rows, run, same, state, tune
from data import SYSTEM, Tokenizer, chat_pieces, encode_chat
from instructions import IGNORE, Batches, Examples, hold_out, read_instructions
from model import Llama, ModelConfig

GPT2 = Tokenizer()


def losses(folder):
    return np.array([row[2] for row in rows(folder)])


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def small(seed=0, **sizes):
    torch.manual_seed(seed)
    model = Llama(ModelConfig(**{**dict(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=64, vocab_size=300, max_seq_len=128), **sizes}))
    for parameter in model.parameters():  # far from the uniform guesses of a fresh model
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def examples():
    return Examples([rows_module.messages_of(row) for row in INSTRUCTIONS], Tokenizer(300), "S.", 64)


# ---------------------------------------------------------------------------------------------------------------------
# The template

def test_another_template_than_vicunas():
    ids, is_answer = encode_chat(GPT2, [user("Hi there"), assistant("Hello."), user("Why?"), assistant("No idea.\nSorry")])
    assert GPT2.decode(ids) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the "
        "user's questions. USER: Hi there ASSISTANT: Hello.<|endoftext|>USER: Why? ASSISTANT: No idea.\nSorry<|endoftext|>")
    assert ids.count(GPT2.eot) == 2 and len(ids) == len(is_answer)
    answers = [i for i, answer in zip(ids, is_answer) if answer]
    assert answers == [*GPT2.encode(" Hello."), GPT2.eot, *GPT2.encode(" No idea.\nSorry"), GPT2.eot]
    prompt, none = encode_chat(GPT2, [user("Hi there")])
    assert GPT2.decode(prompt).endswith("USER: Hi there ASSISTANT:") and not any(none) and ids[:len(prompt)] == prompt
    assert encode_chat(GPT2, [user("Hi there ")])[0] != prompt  # control


def test_a_system_prompt_is_not_used():
    assert chat_pieces([user("a")], "Be brief.") == [("Be brief. USER: a ASSISTANT:", False)]
    assert chat_pieces([{"role": "system", "content": "Be long."}, user("a")], "Be brief.") == [("Be long. USER: a ASSISTANT:", False)]
    assert chat_pieces([user("a")], "") == [("USER: a ASSISTANT:", False)]


def test_text_ends_a_turn():
    ids, is_answer = encode_chat(GPT2, [user("<|endoftext|>"), assistant("<|endoftext|> x")])
    assert ids.count(GPT2.eot) == 1 and ids[-1] == GPT2.eot and is_answer[-1]


def test_alpacas_input_is_lost():
    def question(**row):
        return rows_module.messages_of({"instruction": "Add.", "output": "3", **row})[0]["content"]
    assert [question(input="1 2"), question(input=""), question(), question(input=None)] == ["Add.\n1 2", "Add.", "Add.", "Add."]


# ---------------------------------------------------------------------------------------------------------------------
# The loss: on answers alone, each token the same weight, whatever stands beside it

def by_hand(model, ids, is_answer):
    """(nats, tokens, likeliest ones) of the answers in one conversation: one row, no padding, the formula."""
    logp = F.log_softmax(model(torch.tensor([ids]))[0][0].double(), -1)
    counted = [(i, ids[i + 1]) for i in range(len(ids) - 1) if is_answer[i + 1]]
    return -sum(logp[i, target] for i, target in counted).item(), len(counted), sum(logp[i].argmax().item() == target for i, target in counted)


def test_questions_or_padding_count(examples):
    model, chats = small(), [rows_module.messages_of(row) for row in INSTRUCTIONS]
    order = [0, 17, 30, 5]  # of different lengths, one with two answers
    encoded = [encode_chat(Tokenizer(300), chats[i], "S.") for i in order]
    nats, n, _ = map(sum, zip(*(by_hand(model, *row) for row in encoded)))
    tokens, targets = map(torch.from_numpy, examples.read(np.array(order)))
    assert tokens.shape[1] % 32 == 0 and len({len(ids) for ids, _ in encoded}) > 1
    loss = model(tokens, targets, reduction="sum")[1].item()
    assert n == (targets != IGNORE).sum() == examples.targets[order].sum() and abs(loss / nats - 1) < 1e-5
    everything = model(tokens[:, :-1], tokens[:, 1:], reduction="sum")[1].item()  # control: no mask
    assert abs(everything / nats - 1) > 0.1
    changed = tokens.clone()
    changed[tokens == 0] = 299  # padding is known by its place: whatever stands there, end-of-text too, changes nothing
    assert abs(model(changed, targets, reduction="sum")[1].item() / nats - 1) < 1e-5
    shifted = F.pad(tokens, (3, 0)), F.pad(targets, (3, 0), value=IGNORE)  # control: on the left it would be read
    assert abs(model(*shifted, reduction="sum")[1].item() / nats - 1) > 1e-3


def gradients(model, examples, parts, total):
    """Of a step whose batch comes in these parts, as sft.py accumulates them."""
    model.zero_grad()
    for part in parts:
        (model(*map(torch.from_numpy, examples.read(np.array(part))), reduction="sum")[1] / total).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_micro_batches_or_padding_change_the_gradient(examples):
    model, batch = small(), [0, 1, 2, 17, 30, 5]
    total = int(examples.targets[batch].sum())
    whole = gradients(model, examples, [batch], total)
    for parts in ([[i] for i in batch], [batch[:1], batch[1:]], [batch[4:], batch[:4]]):
        assert torch.allclose(gradients(model, examples, parts, total), whole, rtol=1e-5, atol=1e-5 * whole.abs().max().item())
    means = torch.stack([gradients(model, examples, [part], int(examples.targets[part].sum())) for part in ([0, 1], [2, 17, 30, 5])]).mean(0)
    assert (means - whole).abs().max() > 1e-2 * whole.abs().max()  # control: a mean of means


def test_micro_batches_change_the_run(whole, instructions, tuned, method, tmp_path):
    for name, flags in {"one": ["--micro_batch", 1], "all": ["--micro_batch", 6], "other": ["--seed", 2]}.items():
        assert tune(whole, instructions, tmp_path / name, *method, *flags) == 0
    assert np.abs(losses(tmp_path / "one") / losses(tuned) - 1).max() < 1e-5 and np.abs(losses(tmp_path / "all") / losses(tuned) - 1).max() < 1e-5
    assert np.abs(losses(tmp_path / "other") / losses(tuned) - 1).max() > 1e-3  # control
    first = [checkpoint.load_file(folder / "checkpoints/step_00000000/model.pt")["model"] for folder in (tuned, tmp_path / "one", tmp_path / "other")]
    for name in first[0]:  # the seed draws the adapters, and nothing else
        assert torch.equal(first[0][name], first[1][name]) and torch.equal(first[0][name], first[2][name]) != name.endswith("lora_A")


CHILD_SFT = CHILD.replace("train.main()", "sft.main()").replace("import model, train", "import model, train, sft")


def test_two_processes_change_the_run(whole, instructions, tuned, method, tmp_path):
    (tmp_path / "child.py").write_text(CHILD_SFT)  # 5 rows in micro-batches of 2: in the second pass one process has none
    flags = [str(whole), *TUNE, "--instructions", str(instructions), "--run", str(tmp_path / "two"), "--micro_batch", "2", *map(str, method)]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", str(tmp_path / "child.py"), *flags],
                   check=True, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert len(losses(tmp_path / "two")) == 12 and np.abs(losses(tmp_path / "two") / losses(tuned) - 1).max() < 1e-5
    keys = ("step", "heldout_loss", "token_acc", "ended")
    assert np.allclose(np.array(rows(tmp_path / "two", "sft_eval", keys)), np.array(rows(tuned, "sft_eval", keys)), rtol=1e-4)
    assert np.abs(losses(tmp_path / "two")[1:] / losses(tuned)[:-1] - 1).max() > 1e-3  # control: other steps


def test_the_losses_that_are_logged_are_others(tuned, instructions, method):
    """Step 1 and the held-out loss, from the checkpoints and the file alone."""
    model, tokenizer, _ = checkpoint.load_model(tuned, 0)
    chats, splits, _ = read_instructions(instructions)
    trained, held = hold_out(splits, 0.2, 1337)
    examples = Examples([chats[i] for i in trained], tokenizer, "S.", 64)
    first = Batches(examples, 6, 1337).of_step(0)
    nats, n, _ = map(sum, zip(*(by_hand(model, *encode_chat(tokenizer, chats[trained[i]], "S.")) for i in first)))
    assert abs(nats / n / losses(tuned)[0] - 1) < 1e-5
    assert rows(tuned)[0][1] == sum(len(encode_chat(tokenizer, chats[trained[i]], "S.")[0]) - 1 for i in first)  # tokens
    for step, found, share in rows(tuned, "sft_eval", ("step", "heldout_loss", "token_acc"))[::2]:
        model, _, _ = checkpoint.load_model(tuned, step)
        nats, n, right = map(sum, zip(*(by_hand(model, *encode_chat(tokenizer, chats[i], "S.")) for i in held)))
        assert abs(nats / n / found - 1) < 1e-5 and share == right / n and 0 < right < n
    assert abs(nats / n / rows(tuned, "sft_eval", ("heldout_loss",))[0][0] - 1) > 1e-3  # control: the last against the first


# ---------------------------------------------------------------------------------------------------------------------
# Rows and batches

def test_a_row_is_left_out_or_comes_twice(examples):
    batches = Batches(examples, 4, seed=3)
    epochs = [[batches.of_step(step) for step in range(e * batches.per_epoch, (e + 1) * batches.per_epoch)] for e in (0, 1)]
    for epoch in epochs:
        costs = [examples.padded[batch].mean() for batch in epoch]
        assert costs not in (sorted(costs), sorted(costs, reverse=True))  # the batches come in random order
        assert sorted(np.concatenate(epoch)) == list(range(len(examples))) and {len(batch) for batch in epoch} <= {3, 4}
    assert [b.tolist() for b in epochs[0]] != [b.tolist() for b in epochs[1]]
    assert [b.tolist() for b in epochs[0]] == [Batches(examples, 4, seed=3).of_step(step).tolist() for step in range(batches.per_epoch)]
    assert [b.tolist() for b in epochs[0]] != [Batches(examples, 4, seed=4).of_step(step).tolist() for step in range(batches.per_epoch)]


def test_rows_are_held_out_for_no_reason():
    splits = ["train", "val", None, "test", ""]
    assert [part.tolist() for part in hold_out(splits, 0.5, 0)] == [[0, 2, 4], [1, 3]]
    trained, held = hold_out([None] * 50, 0.1, 0)
    assert len(held) == 5 and sorted([*trained, *held]) == list(range(50)) and hold_out([None] * 50, 0.1, 1)[1].tolist() != held.tolist()
    assert [len(part) for part in hold_out([None], 0.5, 0)] == [1, 0] and [len(part) for part in hold_out([None] * 2, 0.01, 0)] == [1, 1]
    assert [len(part) for part in hold_out([None] * 9, 0, 0)] == [9, 0]


def test_a_long_row_loses_its_answer_unseen():
    chat = [user("abc"), assistant("defghi")]
    ids, is_answer = encode_chat(Tokenizer(257), chat, "")
    first = is_answer.index(True)
    for window in range(first - 2, len(ids) + 2):
        examples = Examples([chat], Tokenizer(257), "", window)
        fits, whole = window >= first, window >= len(ids) - 1  # the last token is not read, only predicted
        assert (len(examples), examples.cut, examples.skipped) == (int(fits), int(fits and not whole), int(not fits))
        if fits:
            tokens, targets = examples.read(np.array([0]))
            assert tokens.shape[1] <= window and (targets != IGNORE).sum() == min(window, len(ids) - 1) - first + 1
    two = Examples([[*chat, *chat]], Tokenizer(257), "", len(ids) + 3)  # cut amid the second question, which is not read for nothing
    assert two.cut == 1 and two.lengths.tolist() == [len(ids) - 1] and two.targets.tolist() == [sum(is_answer)]


def alpaca_like(n):
    """Rows as long as those of alpaca-cleaned, whose 51,760 rows are a JSON file of 42 MB: 811 bytes a row."""
    words = np.array("the of a and to is in that for as with return value array function list element number text model token".split())
    draw = np.random.RandomState(0)
    def text(k):
        return " ".join(words[draw.randint(0, len(words), k)])
    return [{"instruction": text(12), "input": "" if i % 3 else text(15), "output": text(max(3, int(draw.lognormal(4.6, 0.8))))} for i in range(n)]


def test_most_of_a_batch_is_padding():
    alpaca = alpaca_like(3000)
    assert 750 < len(json.dumps(alpaca)) / len(alpaca) < 870
    examples = Examples([rows_module.messages_of(row) for row in alpaca], GPT2, SYSTEM, 1024)
    batches = Batches(examples, 128, 0)
    assert batches.useful(8) >= 0.9
    read = [examples.read(part)[0] for step in range(batches.per_epoch) for part in np.split(batches.of_step(step), range(8, 128, 8)) if len(part)]
    assert abs(examples.lengths.sum() / sum(tokens.size for tokens in read) - batches.useful(8)) < 1e-9
    mixed = np.random.RandomState(0).permutation(3000)  # control: batches of any lengths
    assert examples.lengths.sum() / sum(examples.read(part)[0].size for part in np.array_split(mixed, 375)) < 0.6


@pytest.mark.slow
def test_50000_rows_take_minutes(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(alpaca_like(50_000)))
    start = time.monotonic()
    chats, _, _ = read_instructions(file)
    examples = Examples(chats, GPT2, SYSTEM, 1024)
    batches = Batches(examples, 128, 0)
    for step in range(batches.per_epoch):
        for part in np.array_split(batches.of_step(step), 16):
            examples.read(part)
    took = time.monotonic() - start
    print(f"{len(examples)} rows, {examples.lengths.sum():,} tokens read, tokenized and batched in {took:.1f} s, {batches.useful(8):.1%} useful")
    assert took < 20 and batches.useful(8) >= 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Bad files: row 27

GOOD = {"instruction": "a?", "output": "b"}
BAD = {"no JSON": ('{"instruction": "a?", "output"', "no JSON"), "an array": ("[1]", "no object"), "a number": ("7", "no object"),
       "no output": ('{"instruction": "a?"}', '"output" is missing'), "nothing known": ('{"q": 1}', "neither"),
       "an empty answer": ('{"instruction": "a?", "output": " "}', "an answer is empty"), "no question": ('{"instruction": "", "output": "b"}', "empty"),
       "an answer that is none": ('{"instruction": "a?", "output": 3}', "an answer is no text"), "a list": ('{"instruction": ["a"], "output": "b"}', "no text"),
       "NaN": ('{"instruction": "a", "input": NaN, "output": "b"}', "no text"), "false": ('{"instruction": "a", "input": false, "output": "b"}', "no text"), "half a character": ('{"instruction": "a", "output": "\\ud800"}', "lone surrogate"),
       "no list": ('{"messages": "hi"}', "no list"), "empty messages": ('{"messages": []}', "roles"),
       "no role": ('{"messages": [{"content": "a"}]}', "role"), "another role": ('{"messages": [{"role": "bot", "content": "a"}]}', "roles"),
       "no answer": ('{"messages": [{"role": "user", "content": "a"}]}', "ending with an answer"),
       "two questions": (json.dumps({"messages": [user("a"), user("b")]}), "in turn"),
       "a split that is none": ('{"instruction": "a?", "output": "b", "split": ["val"]}', '"split" is no text'),
       "a giant": (json.dumps({"instruction": "a?", "output": "b" * 1_000_001}), "1,000,001 characters"),
       "deep": ("[" * 100_000 + "]" * 100_000, "too deep"), "long number": ('{"instruction": "a", "output": ' + "9" * 5000 + "}", "number too long")}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_a_traceback_or_is_not_named(what, tmp_path):
    line, why = BAD[what]
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n{json.dumps(GOOD)}\n")
    with pytest.raises(rows_module.UserError) as error:
        read_instructions(file)
    assert f"{file}:3: " in str(error.value) and why in str(error.value) and "--skip_bad" in str(error.value)
    chats, _, bad = read_instructions(file, skip_bad=True)
    assert len(chats) == 2 and bad == 1
    if why not in ("no JSON", "too deep", "number too long"):  # the same in an array, by index
        file.write_text(f"[{json.dumps(GOOD)},\n{line}]")
        with pytest.raises(rows_module.UserError) as error:
            read_instructions(file)
        assert f"{file}, row 1: " in str(error.value) and why in str(error.value)
        assert read_instructions(file, skip_bad=True)[2] == 1
    file.write_text(line)
    with pytest.raises(rows_module.UserError):  # nothing left
        read_instructions(file, skip_bad=True)


@pytest.mark.parametrize("content, place, why", [
    (b'\xef\xbb\xbf{"instruction": "a?", "output": "b"}\n', ":1: ", "byte-order mark"), (b'\xef\xbb\xbf[]', ":1: ", "byte-order mark"),
    (b'{"instruction": "a?", "output": "b"}\n{"instruction": "\xff", "output": "b"}\n', ":2: ", "no UTF-8"),
    (b'[{"instruction": "a?",\n"output": "\xff"}]', ":2: ", "no UTF-8"), (b'[{"instruction": "a?"},\n{]', ":2: ", "no JSON"),
    (b'[{"instruction": "a?", "output": "b"}', ":1: ", "no JSON"), (b"", ": ", "no conversation"), (b"[]", ": ", "no conversation"), (b"\n \n", ": ", "no conversation"),
    (json.dumps({"data": [GOOD]}, indent=1).encode(), ":1: ", "over several lines"),
    ("[1]".encode("utf-16"), ":1: ", "no UTF-8")])
def test_a_bad_file_is_a_traceback(content, place, why, tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(rows_module.UserError) as error:
        read_instructions(file)
    assert f"{file}{place}" in str(error.value) and why in str(error.value)


def test_mistakes_end_in_a_traceback_or_lose_something(whole, instructions, tmp_path, capsys):
    file = tmp_path / "rows.json"
    for content, flags, why in (
            (None, [], "no such file"), ([GOOD, {}], [], f"{file}, row 1: neither"), ([GOOD], ["--max_length", 5], "nothing left to train on"),
            ([{**GOOD, "split": "val"}], [], 'by their "split"'), ([GOOD, {}], ["--max_length", 65], "model's window of 64"),
            ([GOOD], ["--lora", 33], "more than the model's dim"), ([GOOD], ["--lora", 0], "out of range"), ([GOOD], ["--epochs", 2], "give one"),
            ([GOOD], ["--held_out", 1], "out of range"), ([GOOD], ["--step", 3], "no checkpoint of step 3"),
            ([GOOD], ["--lora", 2, "--lora_alpha", 0], "out of range"), ([GOOD], ["--lora_alpha", 2], "about adapters")):
        if content is not None:
            file.write_text(json.dumps(content))
        assert tune(whole, file, tmp_path / "r", *flags) == 2 and why in messages(capsys)[-1], why
        assert not (tmp_path / "r/metrics.jsonl").exists()
    assert tune(tmp_path / "nowhere", instructions, tmp_path / "s") == 2 and "nowhere: no such run" in messages(capsys)[-1]
    assert not (tmp_path / "s").exists()
    file.write_text(json.dumps([GOOD, {}, GOOD]))
    assert tune(whole, file, tmp_path / "r", "--skip_bad", "--system", "\udcff") == 0 and "1 bad" in capsys.readouterr().out
    assert json.loads((tmp_path / "r/config.json").read_text())["system"] == "?"


def test_a_setting_is_another_than_it_says(whole, instructions, method, tmp_path, monkeypatch):
    def of(log):
        return json.loads((ROOT / "logs" / log / "metrics.jsonl").read_text().splitlines()[0])["config"]
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text(json.dumps(of("default")))
    for log, flags in (("sft", {}), ("lora8", {"lora": 8})):  # README's tunings had the defaults of today
        found = sft.resolve({"base": str(tmp_path / "tiny"), **flags}) | {name: of(log)[name] for name in ("base", "run", "step", "max_steps")}
        assert found == of(log) and found != of("lora8" if log == "sft" else "sft")
    base = {"base": str(whole)}
    assert [sft.resolve(base | flags)["lr"] for flags in ({}, {"lora": 4}, {"lora": 4, "lr": 0.5})] == [2e-5, 10 * 2e-5, 0.5]
    shutil.copytree(whole, tmp_path / "runs/base")
    monkeypatch.chdir(tmp_path)
    flags = [*TUNE[2:], "--epochs", "1.2", "--instructions", str(instructions)]  # 1.2 times 5 steps
    assert sft.main(["runs/base/", *flags, *map(str, method)]) == 0
    folder = Path("runs/base-lora4" if method else "runs/base-sft")
    assert len(rows(folder)) == 6
    for again in ("runs/base", "runs/base/", str(tmp_path / "runs/base")):  # the same folder, spelled in another way
        assert sft.main([again, *flags, *map(str, method), "--run", str(folder), "--resume"]) == 0


def test_out_of_memory_names_a_flag_that_is_none(whole, instructions, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(sft.Llama, "forward", full)
    monkeypatch.setattr(sft.Examiner, "evaluate", lambda *args: None)
    for micro_batch, advice in ((2, "use --micro_batch 1"), (1, "use a smaller --max_length")):
        assert tune(whole, instructions, tmp_path / str(micro_batch), "--micro_batch", micro_batch) == 2 and advice in messages(capsys)[-1]


# ---------------------------------------------------------------------------------------------------------------------
# LoRA

def test_adapters_change_something_before_they_are_trained():
    model, tokens = small(), torch.randint(0, 300, (2, 20))
    before, shapes = model(tokens)[0], {name: p.shape for name, p in model.named_parameters()}
    lora.add_adapters(model, 4, 16)
    assert torch.equal(model(tokens)[0], before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)  # A and B of 7 layers in 2 blocks
    assert {name: p.shape for name, p in model.named_parameters() if name not in trained} == shapes
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B)
    assert not torch.allclose(model(tokens)[0], before)  # control


def test_merged_is_another_network():
    model, base, tokens = small(), small(), torch.randint(0, 300, (2, 20))
    lora.add_adapters(model, 4, 16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wanted, adapters = model(tokens)[0], {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    for scale in (4.0, 2.0):  # alpha / rank, and as a control half of it
        weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        lora.merge(weights, adapters, scale)
        merged = small(1)
        merged.load_state_dict(weights)
        assert torch.allclose(merged(tokens)[0], wanted, rtol=1e-5, atol=1e-4) == (scale == 4.0)


def test_the_base_changes_or_is_saved_again(whole, instructions, tmp_path):
    before = {path: path.read_bytes() for path in whole.rglob("*.pt")}
    assert tune(whole, instructions, tmp_path / "r", "--lora", 4) == 0
    assert before == {path: path.read_bytes() for path in whole.rglob("*.pt")}
    saved = checkpoint.load_file(tmp_path / "r/checkpoints/step_00000012/model.pt")
    kept = checkpoint.load_file(tmp_path / "r/checkpoints/step_00000012/train_state.pt")["optimizer"]
    base, _, _ = checkpoint.load_model(whole)
    assert set(saved["model"]) == set(kept) and all("lora_" in name for name in kept)
    assert sum(t.numel() for t in saved["model"].values()) < 0.3 * sum(p.numel() for p in base.parameters())
    meta = json.loads((whole / "checkpoints/step_00000020/meta.json").read_text())
    assert saved["lora"]["base"] == {"run": os.path.relpath(whole, tmp_path / "r"), "step": 20, "sha256": meta["files"]["model.pt"]["sha256"]}


def test_adapters_meet_another_base(whole, instructions, data, tmp_path, capsys):
    base, folder = tmp_path / "base", tmp_path / "r"
    shutil.copytree(whole, base)
    assert tune(base, instructions, folder, "--lora", 4) == 0
    wanted = checkpoint.load_model(folder)[0].state_dict()
    (tmp_path / "moved").mkdir()
    for path in (base, folder):  # together they may go anywhere
        shutil.move(path, tmp_path / "moved")
    base, folder = tmp_path / "moved/base", tmp_path / "moved/r"
    found = checkpoint.load_model(folder)[0].state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert run(data, base, "--resume", "--max_steps", 40) == 0 and checkpoint.load_model(folder)  # pruning leaves what they need
    assert "train_state.pt" not in [path.name for path in (base / "checkpoints/step_00000020").iterdir()]
    weights = checkpoint.load_file(base / "checkpoints/step_00000020/model.pt")
    weights["model"]["model.norm.weight"] += 1
    checkpoint.save(base, 20, weights)
    for mistake in ("holds other weights now", "no checkpoint of step 20"):
        with pytest.raises(checkpoint.UserError, match=f"holds adapters of .*base step 20, .*{mistake}"):
            checkpoint.load_model(folder)
        checkpoint.remove(base / "checkpoints/step_00000020") if mistake.startswith("holds") else None
    assert tune(None, instructions, folder, "--resume", "--max_steps", 20) == 2 and "holds adapters of" in messages(capsys)[-1]


def test_starting_over_takes_the_weights_that_adapters_need(whole, data, instructions, tmp_path, capsys):
    base, folder, more = (tmp_path / name for name in ("base", "r", "more"))
    shutil.copytree(whole, base)
    assert tune(base, instructions, folder, "--lora", 4) == 0 and tune(folder, instructions, more, "--lora", 2) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    for flags in ((), ("--lora", 4)):
        assert tune(base, instructions, base, "--overwrite", *flags) == 2 and "is the run to start from" in messages(capsys)[-1]
        assert tune(more, instructions, base, "--overwrite", *flags) == 2 and os.path.relpath(folder) in messages(capsys)[-1]
    assert run(data, base, "--overwrite") == 2 and "adapters in" in messages(capsys)[-1]
    assert tune(base, instructions, folder, "--overwrite") == 2 and "adapters in" in messages(capsys)[-1]
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    base.rename(tmp_path / "elsewhere")
    assert tune(folder, instructions, tmp_path / "s", "--lora", 2) == 2 and "there is no such run — put it back" in messages(capsys)[-1]
    with pytest.raises(checkpoint.UserError, match="no such run"):
        checkpoint.load_model(base, 3)
    (tmp_path / "elsewhere").rename(base)
    shutil.rmtree(more)
    (folder / "trajectory.md").write_text("old")
    assert tune(base, instructions, folder, "--overwrite", "--stop_at", 1) == 75 and not (folder / "trajectory.md").exists()  # control: no one needs it now


def test_a_tuned_run_cannot_be_tuned(whole, tuned, instructions, tmp_path):
    assert tune(tuned, instructions, tmp_path / "r", "--lora", 2) == 0
    again, before = (checkpoint.load_model(folder)[0].state_dict() for folder in (tmp_path / "r", tuned))
    first = checkpoint.load_model(tmp_path / "r", 0)[0].state_dict()
    assert all(torch.equal(first[name], before[name]) for name in before) and any(not torch.equal(again[name], before[name]) for name in before)


# ---------------------------------------------------------------------------------------------------------------------
# Stopped, killed, damaged: row 37

@pytest.mark.parametrize("stop", [1, 4, 7, 10])  # in the warm-up, right after an evaluation, amid an epoch, at an epoch's end
def test_a_resumed_tuning_is_another_tuning(whole, instructions, tuned, method, tmp_path, stop):
    assert tune(whole, instructions, tmp_path / "r", *method, "--stop_at", stop) == 75
    assert tune(None, instructions, tmp_path / "r", "--resume") == 0  # nothing but --resume: the saved settings rule
    assert same(tmp_path / "r", tuned, 12) and [row[0] for row in rows(tmp_path / "r")] == list(range(1, 13))


def test_control_a_tuning_resumed_without_its_state_is_another(whole, instructions, tuned, method, tmp_path):
    for mistake in ("reset", "rounded", "step"):
        folder = tmp_path / mistake
        assert tune(whole, instructions, folder, *method, "--stop_at", 6) == 75
        weights, kept = checkpoint.load_full(checkpoint.find(folder, full=True))
        if mistake == "rounded":
            weights["model"] = {name: value.half().float() for name, value in weights["model"].items()}
        kept["step"] += mistake == "step"
        checkpoint.save(folder, 6, weights, kept)
        assert tune(None, instructions, folder, "--resume", *(["--reset_optimizer"] if mistake == "reset" else [])) == 0
        assert not same(folder, tuned, 12)


@pytest.fixture
def resume(server, whole, instructions, method):
    return lambda folder, *flags, **fault: server(whole, "--instructions", instructions, "--run", folder, "--resume", *method, *flags,
                                                  base=TUNE, script="sft", **fault)


def test_a_kill_changes_the_tuning(resume, tuned, tmp_path):
    folder = tmp_path / "r"
    shorter = resume(tmp_path / "whole")  # answers of 4 tokens there, so its log is compared with itself
    assert shorter["code"] == 0
    draw, kills = random.Random(os.getpid()), 0
    while kills < 10:
        operation = draw.randint(1, shorter["operations"])
        while resume(folder, fault=["kill", operation])["code"] == -signal.SIGKILL:
            kills, operation = kills + 1, draw.randint(1, shorter["operations"])
            if checkpoint.checkpoints(folder):
                assert checkpoint.find(folder, full=True)
        assert same(folder, tmp_path / "whole", 12) and rows(folder) == rows(tuned) and len(rows(folder)) == 12
        shutil.rmtree(folder)


@pytest.mark.parametrize("where, name", [("step", "SIGINT"), ("evaluate", "SIGTERM"), ("save", "SIGINT")])
def test_a_signal_loses_the_step_of_a_tuning(resume, tuned, tmp_path, where, name):
    found = resume(tmp_path / "r", fault=["signal", where, 4, name])
    assert found["code"] == 75 and rows(tmp_path / "r", "end", ("reason",)) == [("stopped",)]
    assert checkpoint.find(tmp_path / "r", full=True).name == f"step_{rows(tmp_path / 'r')[-1][0]:08d}"
    assert resume(tmp_path / "r")["code"] == 0 and same(tmp_path / "r", tuned, 12)


@pytest.mark.parametrize("name, length", [("model.pt", 0), ("train_state.pt", 100), ("model.pt", None), ("meta.json", 3)])
def test_a_damaged_tuning_is_used(whole, instructions, tuned, method, tmp_path, capsys, name, length):
    folder = tmp_path / "r"
    assert tune(whole, instructions, folder, *method, "--stop_at", 11) == 75
    file = folder / "checkpoints/step_00000011" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content) if length is None else content[:length])
    assert tune(None, instructions, folder, "--resume") == 0
    assert "step_00000011 is damaged" in capsys.readouterr().err and same(folder, tuned, 12)


def test_a_tuning_saves_numbers_that_are_none(whole, instructions, tuned, method, tmp_path, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def broken(parameters, *args):
        parameters = [p for p in parameters if p.grad is not None]
        calls.append(1)
        assert args == (1.0,)  # --grad_clip
        if len(calls) == 7:
            parameters[0].grad[0, 0] = float("nan")
        return clip(parameters, *args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    assert tune(whole, instructions, tmp_path / "r", *method) == 3
    report = json.loads((tmp_path / "r/non_finite.json").read_text())
    chats, splits, _ = read_instructions(instructions)
    trained = [chats[i] for i in hold_out(splits, 0.2, 1337)[0]]
    batch = Batches(Examples(trained, Tokenizer(300), "S.", 64), 6, 1337).of_step(6)
    assert report["step"] == 7 and report["questions"] == [trained[i][-2]["content"] for i in batch] and rows(tmp_path / "r") == rows(tuned)[:6]
    assert all(tensor.isfinite().all() for tensor in state(tmp_path / "r", 5).values())


def test_a_tuning_becomes_another(whole, data, instructions, tuned, method, tmp_path, capsys):
    shutil.copytree(tuned, tmp_path / "r")
    shutil.copytree(whole, tmp_path / "pretrained")
    for name, value in {"lr": 0.5, "batch_size": 3, "system": "T.", "lora": 2, "max_length": 32, "seed": 1, "held_out": 0.1, "step": 16}.items():
        assert tune(None, instructions, tmp_path / "r", "--resume", f"--{name}", value) == 2 and f"{name} (saved" in messages(capsys)[-1]
    assert tune(tuned, instructions, tmp_path / "r", "--resume") == 2 and "base (saved" in messages(capsys)[-1]
    other = tmp_path / "rows.jsonl"
    other.write_text(instructions.read_text())
    assert tune(None, other, tmp_path / "r", "--resume", "--max_steps", 13) == 0  # the same rows by another name
    other.write_text(instructions.read_text() + json.dumps(GOOD) + "\n")
    assert tune(None, other, tmp_path / "r", "--resume", "--max_steps", 20) == 2 and "not the file" in messages(capsys)[-1]
    assert tune(whole, instructions, tmp_path / "r", *method) == 2 and "--resume" in messages(capsys)[-1]
    assert run(data, tmp_path / "r", "--resume") == 2 and "another script" in messages(capsys)[-1]
    assert tune(whole, instructions, tmp_path / "pretrained", "--resume") == 2 and "another script" in messages(capsys)[-1]
    assert tune(None, instructions, tmp_path / "r", "--resume") == 0 and "is finished" in capsys.readouterr().out
    assert tune(None, instructions, tmp_path / "r", "--resume", "--max_steps", 14) == 0 and len(rows(tmp_path / "r")) == 14


# ---------------------------------------------------------------------------------------------------------------------
# What it shows, and what it says

def test_what_a_habit_is_goes_unseen(tuned, instructions):
    report = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[1])
    chats, splits, _ = read_instructions(instructions)
    trained, held = hold_out(splits, 0.2, 1337)
    answer, n = Counter(m["content"] for i in trained for m in chats[i] if m["role"] == "assistant").most_common(1)[0]
    total = sum(m["role"] == "assistant" for i in trained for m in chats[i])
    assert report["event"] == "instructions" and report["frequent_answer"] == answer and len(report["questions"]) == 5
    assert report["frequent_share"] == n / total < 1
    asked = {chats[i][-2]["content"]: chats[i][-1]["content"] for i in held}
    assert all(asked[q["question"]] == q["answer"] for q in report["questions"])
    table = plot_dynamics.trajectory([plot_dynamics.read_run(tuned)])
    said = {(step, prompt): (text, cut) for step, prompt, text, cut in rows(tuned, "sample", ("step", "prompt", "text", "cut"))}
    assert {cut for _, cut in said.values()} <= {True, False}
    for question in report["questions"]:
        line, = [line for line in table.splitlines() if line.startswith(f"| {plot_dynamics.escape(question['question'])} |")]
        cells = [plot_dynamics.escape(text) + " …" * cut for text, cut in
                 (said[0, question["question"]], said[12, question["question"]], (answer, False), (question["answer"], False))]
        assert line == f"| {plot_dynamics.escape(question['question'])} | " + " | ".join(cells) + " |"


def test_answers_are_those_of_another_search(tuned):
    model, tokenizer, _ = checkpoint.load_model(tuned)
    settings = json.loads((tuned / "config.json").read_text())
    chats = [[user(q), assistant("x")] for q in ("a?", "b?", "longer?", "c?")]
    examiner = sft.Examiner(model, tokenizer, Examples(chats, tokenizer, "S.", 64), chats, settings, torch.autocast("cpu", enabled=False))
    for chat, (found, ended) in zip(chats, examiner.answer()):
        ids, _ = encode_chat(tokenizer, chat[:1], "S.")
        new = []
        while len(ids) + len(new) < 64 and (not new or new[-1] != tokenizer.eot):  # the likeliest, one at a time, with no cache
            new.append(int(model(torch.tensor([ids + new]))[0][0, -1, :300].argmax()))
        assert (found, ended) == ((new[:-1], True) if new[-1] == tokenizer.eot else (new, False))
    events = []
    log = SimpleNamespace(event=lambda kind, step, **fields: events.append({"event": kind, **fields}), say=lambda text: None)
    examiner.answer = lambda: [([1], True), ([2], False), ([3], True), ([4], True)]
    examiner.evaluate(0, log, True)
    assert [e["ended"] for e in events if e["event"] == "sft_eval"] == [0.75]
    assert [(e["text"], e["cut"]) for e in events if e["event"] == "sample"] == [(tokenizer.decode([1 + i]).strip(), i == 1) for i in range(4)]


def test_questions_that_were_cut_are_asked(tuned):
    model, tokenizer, _ = checkpoint.load_model(tuned)
    settings = json.loads((tuned / "config.json").read_text())
    chats = [[user(f"{i}?"), assistant("no " * (40 if i % 2 else 1))] for i in range(50)]  # every other one is longer than the window
    held = Examples(chats, tokenizer, "S.", 64)
    examiner = sft.Examiner(model, tokenizer, held, chats, settings, torch.autocast("cpu", enabled=False))
    assert held.cut == 25 and [q["question"] for q in examiner.shown.values()] == ["0?", "12?", "24?", "36?", "48?"] and len(examiner.prompts) == 25
    assert sft.spread(range(100), 5) == [0, 24, 49, 74, 99] and sft.spread([7, 8], 5) == [7, 8] and sft.spread([], 5) == []


def test_tuning_costs_go_unseen(tuned, whole):
    before, *_, after = rows(tuned, "benchmark", ("step", "name", "acc", "acc_pmi", "n"))
    assert (before[0], after[0]) == (0, 12) and before[1:] == rows(whole, "benchmark", ("name", "acc", "acc_pmi", "n"))[-1]


def talk(tuned, monkeypatch, capsys, lines, *flags):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    try:
        code = sample.main([str(tuned), "--chat", "--temperature", "0", "--max_new_tokens", "6", *flags])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out.split("\n")[:-1], err


def test_a_chat_forgets_or_goes_on(tuned, whole, monkeypatch, capsys):
    model, tokenizer, _ = checkpoint.load_model(tuned)

    def answer(*said, system="S."):
        ids, _ = encode_chat(tokenizer, said, system)
        new = [int(i) for i in model.generate(torch.tensor([ids]), 6, 0, eot=tokenizer.eot)]
        return tokenizer.decode([i for i in new if i != tokenizer.eot]).lstrip()
    one = answer(user("a?"))
    two = answer(user("a?"), assistant(one), user("b?"))
    assert talk(tuned, monkeypatch, capsys, b"a?\nb?\n") == (0, [one, two], "")
    assert talk(tuned, monkeypatch, capsys, b"a?\n\n/reset\nb?\n/exit\na?")[1] == [one, answer(user("b?"))]
    assert talk(tuned, monkeypatch, capsys, b"a?", "--system", "T.")[1] == [answer(user("a?"), system="T.")]
    code, said, err = talk(tuned, monkeypatch, capsys, b"/what\n\xff\n/reset\na?\na?" + b"y" * 70 + b"\nb?")
    assert code == 0 and said[1:] == [one, two] and "no command /what" in err and "ask a shorter one" in err  # what was said before stays
    assert "was never tuned" in talk(whole, monkeypatch, capsys, b"")[2] and "was never tuned" not in talk(tuned, monkeypatch, capsys, b"")[2]
    assert talk(tuned, monkeypatch, capsys, b"", "--prompt", "x")[0] == 2


def test_an_answer_has_no_room(tuned, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(sample, "stream", lambda model, tokenizer, ids, most, *args: asked.append((len(ids), most)) or ["x"])
    for most, room in ((6, 58), (200, 48)):  # a quarter of the window of 64, or less if less is wanted
        asked.clear()
        empty = len(encode_chat(Tokenizer(300), [user("")], "S.")[0])
        lines = b"".join(b"y" * n + b"\n/reset\n" for n in range(1, 70))
        code, _, err = talk(tuned, monkeypatch, capsys, lines, "--max_new_tokens", str(most))
        assert code == 0 and max(n for n, _ in asked) == room and all(limit == min(most, 64 - n) for n, limit in asked)
        assert len(asked) + err.count(f"room for {room} — ask a shorter one") == 69 > len(asked)
    code, _, err = talk(tuned, monkeypatch, capsys, b"a?", "--system", "long " * 30)
    assert code == 2 and "give a shorter --system" in err and empty < 48
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as error:
        sample.main([str(tuned), "--chat"])
    assert error.value.code == 2 and "standard input, which is closed" in capsys.readouterr().err


def test_history_is_cut_amid_a_turn():
    talked = [m for n in range(9) for m in (user(f"question {n}"), assistant(f"answer {n}"))][:-1]
    everything, _ = encode_chat(GPT2, talked, "S.")
    for room in range(12, len(everything) + 2):
        kept, ids = sample.fit(GPT2, talked, "S.", room)
        assert ids == encode_chat(GPT2, kept, "S.")[0] and kept == talked[-len(kept):] and kept[0]["role"] == "user" and len(ids) <= room
        more = talked[-len(kept) - 2:]
        assert len(more) == len(kept) or len(encode_chat(GPT2, more, "S.")[0]) > room  # no turn is lost without need


def test_the_newest_run_to_tune_is_a_tuned_one(whole, tuned, tmp_path):
    for name, folder in (("a", whole), ("b", tuned)):
        shutil.copytree(folder, tmp_path / name)
        time.sleep(0.01)
        (tmp_path / name / "checkpoints").touch()
    assert runs.newest_run(tmp_path) == tmp_path / "b" and runs.newest_run(tmp_path, pretrained=True) == tmp_path / "a"
