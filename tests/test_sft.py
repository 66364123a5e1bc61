"""sft.py: what is learned and logged, the settings, and what a tuning survives."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import evaluate
import plot_dynamics
import sft
import train
from conftest import (CHILD, INSTRUCTIONS, ROOT, TUNE, exit_code, messages, rows, run, same, state,
                      tune)
from data import Tokenizer
from model import Llama, ModelConfig
from support import durable
from support.chat import (IGNORE, Batches, Examples, encode_chat, hold_out, messages_of,
                          most_frequent_answer, read_instructions)
from support.runs import newest_run

FP32 = torch.autocast("cpu", enabled=False)
TIMES = ("time", "seconds", "dt_ms", "tok_per_s")


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """Answers of 4 tokens, as in trials.py: the time goes into what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.AnswerObserver, "LONGEST", 4)
        yield


@pytest.fixture(scope="module")
def tuned(short_answers, whole, instructions, method, tmp_path_factory):
    """A tuning of 12 steps that was not disturbed."""
    folder = tmp_path_factory.mktemp("tuned") / "r"
    assert tune(whole, instructions, folder, *method) == 0
    return folder


def losses(folder):
    return np.array([loss for loss, in rows(folder, keys=("loss",))])


def largest_difference(a, b):
    """Between two arrays of losses, as a share."""
    return np.abs(a / b - 1).max()


def events(folder):
    """All rows of a log that the training itself determines, without their times."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["event"] not in ("start", "resume", "end"):
            found.append({name: row[name] for name in row if name not in TIMES})
    return found


def resume(folder, *flags):
    """Continue with nothing but --resume: the saved settings rule."""
    return exit_code(sft.main, ["--run", folder, "--resume", *flags])


def settings_of(folder):
    return SimpleNamespace(**json.loads((folder / "config.json").read_text()))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# -------------------------------------------------------------------------------------------------
# The loss: on answers alone, each token with the same weight, whatever stands beside it

def small(seed=0):
    torch.manual_seed(seed)
    model = Llama(ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=64,
                              vocab_size=300, max_seq_len=128))
    for parameter in model.parameters():  # far from the even guesses of a new model
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def examples():
    chats = [messages_of(row) for row in INSTRUCTIONS]
    return Examples(chats, Tokenizer(300), "S.", 64)


def answer_losses(model, chats, tokenizer, system):
    """(nats, right): of each token of the answers its loss, and whether it is the likeliest token.
    By the formula, one conversation at a time, without padding."""
    nats = []
    right = []
    for messages in chats:
        ids, is_answer = encode_chat(tokenizer, messages, system)
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids]))
        log_p = F.log_softmax(logits[0].double(), dim=-1)  # (tokens, vocabulary)
        for place in range(1, len(ids)):
            if is_answer[place]:
                before = log_p[place - 1]
                nats.append(-before[ids[place]].item())
                right.append(before.argmax().item() == ids[place])
    return nats, right


def loss_sum(model, inputs, targets):
    """As in the loop of sft.py."""
    return model(inputs, targets, reduction="sum")[1]


def read(examples, rows):
    inputs, targets = examples.read(np.array(rows))
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def test_loss_counts_answers_only(examples):
    """Catches: questions that are learned, targets one token beside, padding that counts."""
    model = small()
    order = [0, 17, 30, 5]  # of different lengths; row 30 has two answers
    chats = [examples.chats[row] for row in order]
    nats, _ = answer_losses(model, chats, Tokenizer(300), "S.")
    inputs, targets = read(examples, order)
    assert len(nats) == (targets != IGNORE).sum() == examples.targets[order].sum()
    assert loss_sum(model, inputs, targets).item() == pytest.approx(sum(nats), rel=1e-5)
    everything = loss_sum(model, inputs[:, :-1], inputs[:, 1:]).item()
    assert everything != pytest.approx(sum(nats), rel=0.1)  # control: without the mask


def test_padding_changes_no_loss(examples):
    """Catches: padding that is read because it stands on the left, or that is known by its id."""
    model = small()
    inputs, targets = read(examples, [0, 17, 30, 5])
    loss = loss_sum(model, inputs, targets).item()
    filled = inputs.clone()
    filled[inputs == 0] = 299  # end-of-text, which also occurs in the text
    assert not torch.equal(filled, inputs)
    assert loss_sum(model, filled, targets).item() == pytest.approx(loss, rel=1e-5)
    inputs = F.pad(inputs, (3, 0))
    targets = F.pad(targets, (3, 0), value=IGNORE)
    left = loss_sum(model, inputs, targets).item()
    assert left != pytest.approx(loss, rel=1e-3)  # control: padding on the left


def gradient(model, examples, parts):
    """Of a step whose batch is divided into these parts, accumulated as in sft.py."""
    targets_in_step = int(sum(examples.targets[part].sum() for part in parts))
    model.zero_grad()
    for part in parts:
        loss = loss_sum(model, *read(examples, part))
        (loss / targets_in_step).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("parts", [
    [[0], [1], [2], [17], [30], [5]],
    [[0], [1, 2, 17, 30, 5]],
    [[30, 5], [0, 1, 2, 17]],
])
def test_gradient_does_not_depend_on_micro_batches(examples, parts):
    """Catches: a mean of means, in which a token of a short answer has more weight."""
    model = small()
    whole = gradient(model, examples, [[0, 1, 2, 17, 30, 5]])
    tolerance = 1e-5 * whole.abs().max().item()
    found = gradient(model, examples, parts)
    assert torch.allclose(found, whole, rtol=1e-5, atol=tolerance)
    means = torch.stack([gradient(model, examples, [part]) for part in parts]).mean(0)
    assert (means - whole).abs().max() > 1000 * tolerance  # control: a mean of means


def test_micro_batch_does_not_change_the_run(whole, instructions, tuned, method, tmp_path):
    """Catches: a mean of means in the loop, rows of the last micro-batch that are dropped."""
    found = {}
    for name, flags in {"one": ["--micro_batch", 1], "all": ["--micro_batch", 6],
                        "seed": ["--seed", 2]}.items():
        assert tune(whole, instructions, tmp_path / name, *method, *flags) == 0
        found[name] = losses(tmp_path / name)
    assert largest_difference(found["one"], losses(tuned)) < 1e-5
    assert largest_difference(found["all"], losses(tuned)) < 1e-5
    assert largest_difference(found["seed"], losses(tuned)) > 1e-3  # control: other rows
    assert all(torch.equal(a, b) for a, b in first_weights(tuned, tmp_path / "one").values())
    for name, (a, b) in first_weights(tuned, tmp_path / "seed").items():
        drawn = name.endswith(".lora_A")  # the seed draws the adapters, and no other weight
        assert torch.equal(a, b) == (not drawn)


def test_activation_checkpointing_changes_no_bit(whole, instructions, tuned, method, tmp_path):
    """Catches: adapters, beside frozen weights, that get no gradient or another one."""
    flags = [*method, "--activation_checkpointing"]
    assert tune(whole, instructions, tmp_path / "r", *flags) == 0
    assert same(tmp_path / "r", tuned, 12)
    other = ("--seed", 2, "--stop_at", 2)
    assert tune(whole, instructions, tmp_path / "other", *flags, *other) == 75
    assert rows(tmp_path / "other") != rows(tuned)[:2]  # control


def first_weights(a, b):
    """{name: (tensor of a, tensor of b)} of the weights that two tunings start from."""
    first, second = [durable.load_file(folder / "checkpoints/step_00000000/model.pt")["model"]
                     for folder in (a, b)]
    assert first.keys() == second.keys()
    return {name: (first[name], second[name]) for name in first}


CHILD_SFT = CHILD.replace("train.main()", "sft.main()").replace("import model, train", """
import model, sft, train
sft.AnswerObserver.LONGEST = 4
""")


@pytest.mark.slow
def test_two_processes_train_the_same_run(whole, instructions, tuned, method, tmp_path):
    """Catches: rows that are read twice or not at all, a gradient that is a mean over processes, a
    process that waits for ever because it has no row left."""
    child = tmp_path / "child.py"
    child.write_text(CHILD_SFT)
    folder = tmp_path / "two"
    # 5 rows in micro-batches of 2: in the second pass one process has none.
    flags = [whole, *TUNE, "--instructions", instructions, "--run", folder, "--micro_batch", 2,
             *method]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", "--", child, *flags]
    subprocess.run([str(part) for part in launcher], check=True, capture_output=True, timeout=120,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert len(losses(folder)) == 12
    assert largest_difference(losses(folder), losses(tuned)) < 1e-5
    keys = ("step", "heldout_loss", "token_acc", "ended")
    scores = np.array(rows(folder, "sft_eval", keys))
    assert np.allclose(scores, rows(tuned, "sft_eval", keys), rtol=1e-4)
    shifted = largest_difference(losses(folder)[1:], losses(tuned)[:-1])
    assert shifted > 1e-3  # control: other steps


# -------------------------------------------------------------------------------------------------
# What is logged

def rows_of(tuned, instructions):
    """(chats to train on, chats held out), as the tuning divides its file."""
    settings = settings_of(tuned)
    chats, splits, _, _ = read_instructions(instructions)
    training, held_out = hold_out(chats, splits, settings.held_out, settings.seed)
    return [chats[i] for i in training], [chats[i] for i in held_out]


def observer_of(tuned, chats):
    model, tokenizer, _ = checkpoint.load_model(tuned)
    held_out = Examples(chats, tokenizer, "S.", 64)
    return sft.AnswerObserver(model, tokenizer, held_out, settings_of(tuned), FP32)


def test_logged_losses_equal_a_plain_loop(tuned, instructions):
    """Catches: a step that learns from other rows than it should, questions that count in a loss,
    a mean over rows instead of tokens, an evaluation of other rows."""
    model, tokenizer, _ = checkpoint.load_model(tuned, 0)
    training, held_out = rows_of(tuned, instructions)
    batches = Batches(Examples(training, tokenizer, "S.", 64), 6, seed=1337)
    batch = [training[i] for i in batches.of_step(0)]
    nats, _ = answer_losses(model, batch, tokenizer, "S.")
    assert losses(tuned)[0] == pytest.approx(np.mean(nats), rel=1e-5)
    lengths = [len(encode_chat(tokenizer, chat, "S.")[0]) - 1 for chat in batch]
    assert rows(tuned, keys=("tokens",))[0] == (sum(lengths),)
    scores = rows(tuned, "sft_eval", ("step", "heldout_loss", "token_acc"))
    for step, loss, share in (scores[0], scores[-1]):
        model, _, _ = checkpoint.load_model(tuned, step)
        nats, right = answer_losses(model, held_out, tokenizer, "S.")
        assert loss == pytest.approx(np.mean(nats), rel=1e-5)
        assert share == np.mean(right)
        assert 0 < share < 1
    assert scores[0][1] != pytest.approx(scores[-1][1], rel=1e-3)  # control: other weights


def test_score_does_not_depend_on_its_batches(tuned, monkeypatch):
    """Catches: a mean of the means of batches or of rows, a last batch that is left out."""
    chats = [messages_of(row) for row in INSTRUCTIONS]
    observer = observer_of(tuned, chats)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 3 * 64)  # 3 rows in a forward
    monkeypatch.setattr(sft, "ROWS", 7)                    # 7 tokens in the output layer
    nats, right = answer_losses(observer.model, chats, observer.tokenizer, "S.")
    scores = observer.score()
    assert scores["heldout_loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert scores["token_acc"] == np.mean(right)
    means = [np.mean(answer_losses(observer.model, [chat], observer.tokenizer, "S.")[0])
             for chat in chats]
    assert np.mean(means) != pytest.approx(np.mean(nats), rel=1e-3)  # control


def test_run_without_held_out_rows(whole, instructions, tmp_path):
    """Catches: a division by zero when there is nothing to score."""
    folder = tmp_path / "r"
    assert tune(whole, instructions, folder, "--held_out", 0, "--max_steps", 1) == 0
    keys = ("step", "heldout_loss", "token_acc", "ended")
    assert rows(folder, "sft_eval", keys) == [(0, None, None, None), (1, None, None, None)]
    assert rows(folder, "instructions", ("rows", "held_out")) == [(31, 0)]
    assert len(rows(folder, "benchmark", ("step",))) == 2  # control: the rest is evaluated


def test_benchmark_at_step_0_is_that_of_the_base(tuned, whole):
    """Catches: a tuning whose cost for the benchmark cannot be seen."""
    keys = ("name", "acc", "acc_pmi", "n")
    steps = [step for step, in rows(tuned, "benchmark", ("step",))]
    assert steps == [0, 1, 2, 4, 8, 12]
    assert rows(tuned, "benchmark", keys)[0] == rows(whole, "benchmark", keys)[-1]
    found = rows(tuned, "sft_eval", ("heldout_loss",))
    assert len(set(found)) == len(steps)  # control: the weights differ


def test_log_tells_what_was_tuned_on(tuned, instructions):
    """Catches: a habit that is taken for knowledge because the commonest training answer is not
    shown, questions that were trained on, an answer beside another question."""
    training, held_out = rows_of(tuned, instructions)
    keys = ("rows", "held_out", "bad", "frequent_answer", "frequent_share")
    answer, share = most_frequent_answer(training)
    assert rows(tuned, "instructions", keys) == [(25, 6, 0, answer, share)]
    (questions,), = rows(tuned, "instructions", ("questions",))
    right = {chat[-2]["content"]: chat[-1]["content"] for chat in held_out}
    assert len(questions) == 5
    for item in questions:
        assert right[item["question"]] == item["answer"]
    asked = [item["question"] for item in questions]
    sampled = rows(tuned, "sample", ("step", "prompt"))
    assert sampled == list(itertools.product((0, 1, 2, 4, 8, 12), asked))
    trained = [chat[-2]["content"] for chat in training]
    assert not set(asked) & set(trained)  # control


def test_table_shows_base_and_tuned_answers(tuned):
    """Catches: a question with the answer of another question or another step beside it."""
    escape = plot_dynamics.escape
    table = plot_dynamics.trajectory([plot_dynamics.read_run(tuned)]).splitlines()
    said = {}
    for step, prompt, text, cut in rows(tuned, "sample", ("step", "prompt", "text", "cut")):
        mark = " …" if cut else ""
        said[step, prompt] = escape(text) + mark
    keys = ("questions", "frequent_answer")
    (questions, frequent), = rows(tuned, "instructions", keys)
    for item in questions:
        question = item["question"]
        cells = [escape(question), said[0, question], said[12, question], escape(frequent),
                 escape(item["answer"])]
        assert f"| {' | '.join(cells)} |" in table
    before = [said[0, item["question"]] for item in questions]
    after = [said[12, item["question"]] for item in questions]
    assert before != after  # control


def greedy(model, ids, eot):
    """(likeliest ids, whether end-of-text ends them): one at a time, without a cache."""
    new = []
    while len(ids) + len(new) < 64:
        logits, _ = model(torch.tensor([ids + new]))
        likeliest = int(logits[0, -1, :300].argmax())
        if likeliest == eot:
            return new, True
        new.append(likeliest)
    return new, False


def test_answers_equal_a_plain_greedy_search(tuned, monkeypatch):
    """Catches: questions of one length whose answers are swapped, an answer that goes on after
    end-of-text, a cache that changes it, a prompt that holds the right answer."""
    monkeypatch.setattr(sft.AnswerObserver, "LONGEST", 64)
    chats = [[user(question), assistant("x")] for question in ("a?", "b?", "longer?", "c?")]
    observer = observer_of(tuned, chats)
    eot = observer.tokenizer.eot
    found = observer.answer(chats)
    for messages, answer in zip(chats, found):
        ids, _ = encode_chat(observer.tokenizer, messages[:1], "S.")
        assert answer == greedy(observer.model, ids, eot)
    assert found[0] != found[2]  # control


def test_shares_and_samples_are_those_of_the_answers(tuned):
    """Catches: a share of answers that end over other answers, a text without its mark "cut"."""
    chats = [[user(f"{n}?"), assistant("x")] for n in range(4)]
    observer = observer_of(tuned, chats)
    ended = [True, False, True, True]
    observer.answer = lambda asked: [([1 + n], ended[n]) for n in range(4)]
    found = []
    log = SimpleNamespace(say=lambda text: None)
    log.event = lambda event, step, **fields: found.append({"event": event, **fields})
    observer.evaluate(0, log)
    observer.sample(0, log)
    scores = [row for row in found if row["event"] == "sft_eval"]
    assert [row["ended"] for row in scores] == [0.75]
    samples = [row for row in found if row["event"] == "sample"]
    decode = observer.tokenizer.decode
    assert [row["prompt"] for row in samples] == ["0?", "1?", "2?", "3?"]
    assert [row["text"] for row in samples] == [decode([1 + n]).strip() for n in range(4)]
    assert [row["cut"] for row in samples] == [False, True, False, False]


def test_cut_conversations_are_not_asked(tuned):
    """Catches: a question that was cut amid its text; questions that are all from the beginning of
    the file."""
    chats = []
    for n in range(50):
        length = 40 if n % 2 else 1  # every other one is longer than the window
        chats.append([user(f"{n}?"), assistant("no " * length)])
    observer = observer_of(tuned, chats)
    assert observer.held_out.cut == 25
    assert len(observer.asked) == 25
    shown = [messages[0]["content"] for messages in observer.shown]
    assert shown == ["0?", "12?", "24?", "36?", "48?"]


def test_spread_covers_all_items():
    """Catches: the first items only, or one that comes twice."""
    assert sft.spread(range(100), 5) == [0, 24, 49, 74, 99]
    assert sft.spread([7, 8], 5) == [7, 8]
    assert sft.spread([], 5) == []


# -------------------------------------------------------------------------------------------------
# Settings and mistakes

@pytest.mark.parametrize("log, flags", [("sft", []), ("lora8", ["--lora", "8"])])
def test_defaults_are_those_of_the_logged_runs(tmp_path, log, flags):
    """Catches: a default that changed since the runs in logs/, so that the commands in README give
    other numbers."""
    def logged(name):
        first = (ROOT / "logs" / name / "metrics.jsonl").read_text().splitlines()[0]
        return json.loads(first)["config"]

    base = tmp_path / "tiny"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(logged("default")))
    found = vars(sft.read_settings([str(base), *flags]))
    own = {"base", "run", "step", "max_steps", "fingerprint"}
    names = (found.keys() & logged(log).keys()) - own
    assert len(names) > 25
    assert {name: found[name] for name in names} == {name: logged(log)[name] for name in names}
    other = {"sft": "lora8", "lora8": "sft"}[log]
    assert found["lr"] != logged(other)["lr"]  # control


def test_adapters_learn_in_larger_steps(whole):
    """Catches: the same learning rate with and without --lora, or one that wins over --lr."""
    base = str(whole)
    assert sft.read_settings([base]).lr == 2e-5
    assert sft.read_settings([base, "--lora", "4"]).lr == pytest.approx(2e-4)
    assert sft.read_settings([base, "--lora", "4", "--lr", "0.5"]).lr == 0.5


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    """A current folder with the run runs/base."""
    shutil.copytree(whole, tmp_path / "runs/base")
    monkeypatch.chdir(tmp_path)


def test_run_is_named_after_base_and_method(here, instructions, method):
    """Catches: a tuning in its base's folder, --epochs that is not the number of epochs, a base
    that is taken for another one because it is spelled in another way."""
    flags = [*TUNE[2:], "--epochs", 1.2, "--instructions", instructions, *method]
    assert exit_code(sft.main, ["runs/base/", *flags]) == 0
    folder = Path("runs/base-lora4" if method else "runs/base-sft")
    assert len(rows(folder)) == 6  # 1.2 times 5 steps
    for spelled in ("runs/base", "runs/base/", Path("runs/base").resolve()):
        assert exit_code(sft.main, [spelled, *flags, "--run", folder, "--resume"]) == 0
    assert exit_code(sft.main, ["runs/other", *flags, "--run", folder, "--resume"]) == 2  # control


def test_newest_pretrained_run_is_the_base(here, tuned):
    """Catches: a tuned run that is tuned again because it is the newest one."""
    shutil.copytree(tuned, "runs/tuned")
    time.sleep(0.01)
    Path("runs/tuned/checkpoints").touch()
    assert newest_run() == Path("runs/tuned")  # control
    assert newest_run(pretrained=True) == Path("runs/base")
    assert sft.read_settings([]).base == "runs/base"


GOOD = {"instruction": "a?", "output": "b"}
HELD = {**GOOD, "split": "val"}


@pytest.mark.row(27)
@pytest.mark.parametrize("content, flags, why", [
    (None, [], "no such file"),
    ([GOOD, {}], [], 'rows.json, row 1: "instruction" is missing'),
    ([GOOD], ["--max_length", 5], "nothing left to train on"),
    ([HELD], [], 'held out (by their "split"'),
    ([GOOD], ["--max_length", 65], "more than the model's window of 64"),
    ([GOOD], ["--lora", 33], "more than the model's dim 32"),
    ([GOOD], ["--lora", 0], "out of range"),
    ([GOOD], ["--lora", 2, "--lora_alpha", 0], "out of range"),
    ([GOOD], ["--lora_alpha", 2], "--lora_alpha is about adapters"),
    ([GOOD], ["--epochs", 2], "argument --epochs: not allowed with argument --max_steps"),
    ([GOOD], ["--held_out", 1], "out of range"),
    ([GOOD], ["--step", 3], "no checkpoint of step 3"),
])
def test_mistake_is_one_line(whole, tmp_path, capsys, content, flags, why):
    """Catches: a traceback, a message that does not tell what to do, a run that starts all the
    same."""
    file = tmp_path / "rows.json"
    if content is not None:
        file.write_text(json.dumps(content))
    assert tune(whole, file, tmp_path / "r", *flags) == 2
    line = messages(capsys)[-1]
    assert line.startswith("sft.py: ")
    assert why in line
    assert not (tmp_path / "r/metrics.jsonl").exists()


def test_missing_base_is_one_line(instructions, tmp_path, capsys):
    """Catches: a run folder that is made although there is nothing to start from."""
    assert tune(tmp_path / "nowhere", instructions, tmp_path / "r") == 2
    line, = messages(capsys)
    assert "nowhere: no such run" in line
    assert not (tmp_path / "r").exists()


@pytest.mark.row(27)
def test_bad_rows_are_skipped_and_counted(whole, tmp_path, capsys):
    """Catches: --skip_bad that stops all the same, or leaves out rows silently."""
    file = tmp_path / "rows.json"
    other = {**GOOD, "output": "Blue."}
    file.write_text(json.dumps([GOOD, {}, other]))
    assert tune(whole, file, tmp_path / "r", "--skip_bad", "--system", "\udcff") == 0
    assert "1 bad" in capsys.readouterr().out
    assert rows(tmp_path / "r", "instructions", ("rows", "held_out", "bad")) == [(1, 1, 1)]
    assert settings_of(tmp_path / "r").system == "?"


@pytest.mark.row(44)
def test_data_of_another_preparation_is_refused(whole, instructions, data, tmp_path, capsys):
    """Catches: a tuning on instructions and questions of text that the base was not trained on, or
    that it was trained on though they are held out."""
    base = shutil.copytree(whole, tmp_path / "base")
    folder = shutil.copytree(data, tmp_path / "data")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "data": str(folder)}))
    assert tune(base, instructions, tmp_path / "r", "--max_steps", 1) == 0  # control
    shard = np.load(folder / "train_0001.npy")
    np.save(folder / "train_0001.npy", shard[::-1])
    again = ("--max_steps", 1, "--overwrite")
    assert tune(base, instructions, tmp_path / "r", *again) == 2
    assert "data is not the data of this run (changed: train_0001.npy)" in messages(capsys)[-1]
    questions = ("--benchmark", folder / "cloze.jsonl")
    assert tune(base, instructions, tmp_path / "r", *again, *questions) == 0


@pytest.mark.row(43, 45)
def test_rows_and_flags_that_do_nothing_are_reported(whole, tmp_path, capsys):
    """Catches: copies of a row that are left out, and a flag that has no effect, without a word."""
    rows_ = [{"instruction": f"{n}?", "output": "b", "split": "val" * (n == 1)} for n in range(4)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows_))
    flags = ("--max_steps", 1, "--held_out", 0.02)
    assert tune(whole, file, tmp_path / "r", *flags) == 0
    printed = capsys.readouterr().out
    assert "left out" not in printed  # control
    assert "not used" not in printed
    file.write_text(json.dumps(rows_ * 2))
    assert tune(whole, file, tmp_path / "s", *flags, "--held_out", 0.5) == 0
    printed = capsys.readouterr().out
    assert "4 rows repeat another one and are left out" in printed
    assert "--held_out is not used" in printed
    assert rows(tmp_path / "s", "instructions", ("rows", "held_out")) == [(3, 1)]


def test_base_cannot_be_overwritten_by_its_tuning(whole, instructions, tmp_path, capsys):
    """Catches: --overwrite that deletes the weights to start from."""
    base = tmp_path / "base"
    shutil.copytree(whole, base)
    link = tmp_path / "link"
    link.symlink_to(base)
    for folder in (base, link):
        assert tune(base, instructions, folder, "--overwrite") == 2
        assert "is the run to start from" in messages(capsys)[-1]
    assert same(base, whole)


def test_out_of_memory_is_one_line(whole, instructions, tmp_path, capsys, monkeypatch):
    """Catches: a traceback, or advice that names a flag which sft.py does not have."""
    forward = sft.Llama.forward

    def full(model, tokens, targets=None, **options):
        if targets is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, tokens, **options)

    monkeypatch.setattr(sft.Llama, "forward", full)
    assert tune(whole, instructions, tmp_path / "r") == 2
    line = messages(capsys)[-1]
    assert "use a smaller --micro_batch" in line
    assert "sft.py: --max_length" in line


# -------------------------------------------------------------------------------------------------
# Stopped, killed, damaged

# In the warm-up, right after an evaluation, amid an epoch, at the end of an epoch.
@pytest.mark.row(37)
@pytest.mark.parametrize("stop", [1, 4, 7, 10])
def test_sft_resume_is_bitwise(whole, instructions, tuned, method, tmp_path, stop):
    """Catches: anything that a tuning depends on and that its state lacks, be it the moments, the
    rows that come next, or the system prompt."""
    folder = tmp_path / "r"
    assert tune(whole, instructions, folder, *method, "--stop_at", stop) == 75
    assert resume(folder) == 0
    assert same(folder, tuned, 12)
    assert events(folder) == events(tuned)
    assert [step for step, in rows(folder, keys=("step",))] == list(range(1, 13))


@pytest.mark.row(37)
def test_sft_rewarms_after_a_reset(tuned, tmp_path):
    """Catches: a --rewarm_steps that only train.py knows."""
    folder = tmp_path / "r"
    shutil.copytree(tuned, folder)
    durable.remove(folder / "checkpoints/step_00000012")
    base = json.loads((tuned / "config.json").read_text())["base"]
    again = ("--resume", "--reset_optimizer", "--rewarm_steps", 4, "--log_update_rms")
    assert exit_code(sft.main, [base, "--run", folder, *again]) == 0
    events = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    first, second = [event["update_rms"] for event in events if "update_rms" in event]
    assert 0 < first < second  # the rate rises
    usual, rewarmed = [np.array(rows(run, keys=("lr",)))[:, 0] for run in (tuned, folder)]
    assert np.allclose(rewarmed, usual * ([1.0] * 10 + [0.25, 0.5]))
    assert not np.allclose(rewarmed, usual)  # control


@pytest.mark.row(37)
@pytest.mark.parametrize("mistake", ["moments", "rounded", "step", "seed", "system"])
def test_sft_resume_differs_if_state_is_incomplete(tuned, tmp_path, mistake):
    """Catches: a comparison in the test before this one that cannot fail."""
    folder = tmp_path / "r"
    flags = []
    shutil.copytree(tuned, folder)
    durable.remove(folder / "checkpoints/step_00000012")
    saved = checkpoint.load(durable.newest(folder))
    if mistake == "moments":
        flags = ["--reset_optimizer"]
    if mistake == "rounded":
        for tensor in saved["model"].values():
            tensor.copy_(tensor.half())
    if mistake == "step":
        saved["step"] = 11
    if mistake == "seed":
        saved["config"]["seed"] = 2
    if mistake == "system":
        saved["config"]["system"] = "T."
    checkpoint.save(folder, saved, keep_last=2, keep_every=0)
    assert resume(folder, *flags) == 0
    assert not same(folder, tuned, 12)


@pytest.mark.row(37)
def test_sft_resume_from_an_earlier_state_is_bitwise(tuned, tmp_path):
    """Catches: rows of a lost step that stay in the log. (Also the control of the test above.)"""
    folder = tmp_path / "r"
    shutil.copytree(tuned, folder)
    durable.remove(folder / "checkpoints/step_00000012")
    assert resume(folder) == 0
    assert rows(folder, "resume", ("step",)) == [(10,)]
    assert same(folder, tuned, 12)
    assert events(folder) == events(tuned)


@pytest.fixture(scope="session")
def trial(server, whole, instructions, method):
    """A function that runs sft.py --resume in a process of its own, with a fault."""
    def trial(folder, **fault):
        return server(whole, "--instructions", instructions, "--run", folder, "--resume", *method,
                      base=TUNE, script="sft", **fault)

    return trial


@pytest.mark.row(37)
def test_sft_survives_kill_bitwise(trial, tuned, tmp_path):
    """Catches: a checkpoint that a kill leaves half, a step that is logged twice or not at all, a
    state that lacks something."""
    seed = os.getpid()
    print(f"random.Random({seed})")
    draw = random.Random(seed)
    found = trial(tmp_path / "whole")
    assert found["code"] == 0
    kills = 0
    while kills < 10:
        folder = tmp_path / str(kills)
        code = None
        while code != 0:
            code = trial(folder, fault=["kill", draw.randint(1, found["operations"])])["code"]
            assert code in (0, -signal.SIGKILL)
            if code != 0:
                kills += 1
            if durable.checkpoints(folder):
                assert durable.newest(folder)
        assert same(folder, tuned, 12)
        assert events(folder) == events(tuned)


@pytest.mark.row(37)
def test_sft_survives_kill_in_its_last_evaluation(trial, tuned, tmp_path):
    """Catches: an evaluation before the save, which a kill takes the last steps with; a resume
    that leaves out the evaluation, or logs it twice."""
    folder = tmp_path / "r"
    assert trial(folder, fault=["signal", "evaluate", 12, "SIGKILL"])["code"] == -signal.SIGKILL
    assert durable.newest(folder).name == "step_00000012"
    assert len(rows(folder)) == 12
    assert events(folder) != events(tuned)  # control: the evaluation is missing
    assert trial(folder)["code"] == 0
    assert rows(folder, "resume", ("step",)) == [(12,)]
    assert same(folder, tuned, 12)
    assert events(folder) == events(tuned)


class Crash(Exception):
    pass


@pytest.mark.row(37)
def test_sft_survives_crash_after_its_last_evaluation(whole, instructions, tuned, method, tmp_path,
                                                      monkeypatch):
    """Catches: rows of an evaluation that stay in the log when the resume evaluates again."""
    sample = sft.AnswerObserver.sample

    def crash(observer, step, log):
        if step == 12:
            raise Crash
        sample(observer, step, log)

    folder = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr(sft.AnswerObserver, "sample", crash)
        try:  # pytest.raises would keep the run's frames alive, and with them its lock
            tune(whole, instructions, folder, *method)
        except Crash:
            pass
    steps = [step for step, in rows(folder, "sft_eval", ("step",))]
    assert steps[-1] == 12  # control: it is in the log
    assert resume(folder) == 0
    assert same(folder, tuned, 12)
    assert events(folder) == events(tuned)


@pytest.mark.row(37)
def test_sft_saves_before_it_evaluates(whole, instructions, method, tmp_path, monkeypatch):
    """Catches: an evaluation or a sample that stands between a step and the disk; a stop that
    evaluates before it ends; a resume that does not repeat what was due."""
    calls = []

    def note(owner, name, step_of):
        original = getattr(owner, name)

        def noted(*args):
            calls.append((step_of(args), name))
            return original(*args)

        monkeypatch.setattr(owner, name, noted)

    note(checkpoint, "save", lambda args: args[1]["step"])
    note(sft.AnswerObserver, "evaluate", lambda args: args[1])
    note(sft.AnswerObserver, "sample", lambda args: args[1])
    folder = tmp_path / "r"
    assert tune(whole, instructions, folder, *method, "--stop_at", 4) == 75
    order = ("save", "evaluate", "sample")
    assert calls == [*itertools.product((0, 1, 2), order), (4, "save")]
    calls.clear()
    assert resume(folder) == 0
    assert calls == [(4, "evaluate"), (4, "sample"),
                     (5, "save"),
                     (8, "save"), (8, "evaluate"), (8, "sample"),
                     (10, "save"),
                     (12, "save"), (12, "evaluate"), (12, "sample")]


@pytest.mark.row(37)
@pytest.mark.parametrize("where, name", [
    ("step", "SIGINT"), ("evaluate", "SIGTERM"), ("save", "SIGINT")])
def test_sft_stop_signal_loses_no_step(trial, tuned, tmp_path, where, name):
    """Catches: a signal that ends the process before its step is saved."""
    folder = tmp_path / "r"
    assert trial(folder, fault=["signal", where, 4, name])["code"] == 75
    assert rows(folder, "end", ("reason",)) == [("stopped",)]
    (last,) = rows(folder, keys=("step",))[-1]
    assert last in (4, 5)
    assert durable.newest(folder).name == f"step_{last:08d}"
    assert trial(folder)["code"] == 0
    assert same(folder, tuned, 12)
    assert events(folder) == events(tuned)


@pytest.mark.row(37)
@pytest.mark.parametrize("name, length", [
    ("model.pt", 0), ("train_state.pt", 100), ("model.pt", None), ("meta.json", 3)])
def test_sft_skips_a_damaged_checkpoint(tuned, tmp_path, capsys, name, length):
    """Catches: a damaged file that is loaded, or that ends the run although an older state is
    good. length: of what is left of the file; None: one bit is flipped."""
    folder = tmp_path / "r"
    shutil.copytree(tuned, folder)
    file = folder / "checkpoints/step_00000012" / name
    content = bytearray(file.read_bytes())
    if length is None:
        content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content[:length]))
    assert resume(folder) == 0
    assert "step_00000012 is damaged" in capsys.readouterr().err
    assert rows(folder, "resume", ("step",)) == [(10,)]
    assert same(folder, tuned, 12)


def nan_loss(patch, number):
    """Make the loss of the number-th step from now NaN."""
    original = train.sum_over_processes
    calls = itertools.count(1)

    def broken(loss):
        if next(calls) == number:
            loss.fill_(math.nan)
        return original(loss)

    patch.setattr(train, "sum_over_processes", broken)


def nan_gradient(patch, number):
    """Make the gradient of the number-th step from now NaN, but not its loss."""
    original = torch.nn.utils.clip_grad_norm_
    calls = itertools.count(1)

    def broken(parameters, largest):
        assert largest == 1.0  # --grad_clip
        trained = [p for p in parameters if p.grad is not None]
        if next(calls) == number:
            trained[0].grad[0, 0] = math.nan
        return original(trained, largest)

    patch.setattr(torch.nn.utils, "clip_grad_norm_", broken)


@pytest.mark.row(37)
@pytest.mark.parametrize("put_nan", [nan_loss, nan_gradient])
def test_sft_nan_is_never_saved(whole, instructions, tuned, method, tmp_path, capsys, monkeypatch,
                                put_nan):
    """Catches: an update with a NaN, a checkpoint with one, steps that are lost because only the
    last regular checkpoint is there."""
    folder = tmp_path / "r"
    with monkeypatch.context() as patch:
        put_nan(patch, 7)
        assert tune(whole, instructions, folder, *method) == 3
    line = messages(capsys)[-1]
    assert "step 7: loss" in line
    assert "nan" in line
    assert rows(folder) == rows(tuned)[:6]
    assert durable.newest(folder).name == "step_00000006"
    assert all(tensor.isfinite().all() for tensor in state(folder, 6).values())
    with monkeypatch.context() as patch:
        put_nan(patch, 1)  # the same rows give the same NaN
        assert resume(folder) == 3
    assert rows(folder) == rows(tuned)[:6]
    assert resume(folder) == 0  # control: without the NaN it is the undisturbed run
    assert same(folder, tuned, 12)
    assert events(folder) == events(tuned)


@pytest.mark.row(37)
@pytest.mark.parametrize("name, value", [
    ("lr", 0.5), ("batch_size", 3), ("system", "T."), ("lora", 2), ("max_length", 32),
    ("seed", 1), ("held_out", 0.1), ("step", 16), ("epochs", 2), ("weight_decay", 0.5)])
def test_sft_resume_refuses_another_experiment(tuned, tmp_path, capsys, name, value):
    """Catches: a setting that changes the experiment and is accepted, or ignored silently."""
    folder = tmp_path / "r"
    shutil.copytree(tuned, folder)
    assert resume(folder, f"--{name}", value) == 2
    line, = messages(capsys)
    assert f"{name} (saved" in line
    assert f"given {value}" in line
    assert resume(folder, "--eval_every", 7) == 0  # control: the same experiment
    assert same(folder, tuned, 12)


@pytest.mark.row(37)
def test_sft_resume_refuses_another_base_or_file(tuned, instructions, tmp_path, capsys):
    """Catches: a run that goes on with other rows; a file that is taken for another because of its
    name."""
    folder = tmp_path / "r"
    shutil.copytree(tuned, folder)
    assert exit_code(sft.main, [tuned, "--run", folder, "--resume"]) == 2
    assert "base (saved" in messages(capsys)[-1]
    other = tmp_path / "other.jsonl"
    other.write_text(instructions.read_text())
    assert resume(folder, "--instructions", other, "--max_steps", 13) == 0  # control
    other.write_text(instructions.read_text() + json.dumps(GOOD) + "\n")
    assert resume(folder, "--instructions", other, "--max_steps", 14) == 2
    assert "is not the file that this run was tuned on" in messages(capsys)[-1]


@pytest.mark.row(37)
def test_sft_resume_of_a_finished_run(tuned, tmp_path, capsys):
    """Catches: a finished run that is begun again; a larger --max_steps that does nothing."""
    folder = tmp_path / "r"
    shutil.copytree(tuned, folder)
    assert resume(folder) == 0
    assert "is finished" in capsys.readouterr().out
    assert events(folder) == events(tuned)
    assert resume(folder, "--max_steps", 14) == 0
    assert len(rows(folder)) == 14


@pytest.mark.row(37)
def test_used_folder_is_refused(whole, data, instructions, tuned, method, tmp_path, capsys):
    """Catches: a run that is overwritten without --overwrite, or continued by the other script."""
    folder = tmp_path / "r"
    shutil.copytree(tuned, folder)
    assert tune(whole, instructions, folder, *method) == 2
    assert "--resume" in messages(capsys)[-1]
    assert run(data, folder, "--resume") == 2
    assert "another script" in messages(capsys)[-1]
    pretrained = tmp_path / "pretrained"
    shutil.copytree(whole, pretrained)
    assert tune(whole, instructions, pretrained, "--resume") == 2
    assert "another script" in messages(capsys)[-1]
    assert same(folder, tuned, 12)
    assert same(pretrained, whole)
    assert tune(whole, instructions, folder, *method, "--overwrite") == 0  # control
    assert same(folder, tuned, 12)
