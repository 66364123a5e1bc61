"""Scores and samples: each against a plain loop that does one thing at a time, and each with a control.
"""
import json
import math
import shutil
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import evaluate
import sample
from conftest import QUESTIONS, evals, messages, rows
from data import DataFolder, Tokenizer, Windows
from model import PRESETS, Llama

FP32 = torch.autocast("cpu", enabled=False)


# ---------------------------------------------------------------------------------------------------------------------
# Text

def test_scores_that_a_plain_loop_would_not_give(data, whole):
    model, tokenizer, step = checkpoint.load_model(whole)
    folder = DataFolder(data)
    ids = np.load(data / "val_0000.npy").astype(np.int64)
    nats, n_bytes, first, last, gains = 0.0, 0, [], [], []
    for start in range(0, 256, 16):  # 16 windows of 16
        window = torch.tensor(ids[start:start + 17])
        logp = F.log_softmax(model(window[None, :-1])[0][0].double(), dim=-1)
        losses = [-logp[i, window[i + 1]].item() for i in range(16)]
        nats += sum(losses)
        n_bytes += sum(len(tokenizer.decode_bytes([int(i)])) for i in window[1:] if i != tokenizer.eot)
        first, last = first + losses[:2], last + losses[-2:]
        gains.append(np.mean(losses[:2]) - np.mean(losses[-2:]))
    found = evaluate.evaluate(model, Windows(folder.val, 16, 300), tokenizer, 256, torch.autocast("cpu", enabled=False))
    assert step == 20 and math.isclose(found["val_loss"], nats / 256, rel_tol=1e-5)
    assert math.isclose(found["val_bpb"], nats / math.log(2) / n_bytes, rel_tol=1e-5)
    assert math.isclose(found["context_gain"], np.mean(first) - np.mean(last), abs_tol=1e-5)
    assert math.isclose(found["context_gain_stderr"], np.std(gains) / math.sqrt(len(gains) - 1), rel_tol=1e-3)
    assert math.isclose(found["val_loss"], evals(whole)[-1][1], rel_tol=1e-5)  # what the run wrote of itself
    assert not math.isclose(found["val_loss"], evals(whole)[-2][1], rel_tol=1e-5)  # control: another step


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice

def one_at_a_time(model, context, ending):
    """ln P(ending | context): one forward, one row, no cache."""
    logp = F.log_softmax(model(torch.tensor([context + ending[:-1]]))[0][0].double(), dim=-1)
    return sum(logp[len(context) + i - 1, token].item() for i, token in enumerate(ending))


def random_questions(n, seed=0, longest=20, vocab_size=300):
    draw = np.random.RandomState(seed)
    ids = lambda k: draw.randint(0, vocab_size - 1, k).tolist()
    return [(ids(1 + i % longest), [ids(draw.randint(1, 6)) for _ in range(4)]) for i in range(n)]


def test_padding_or_the_shared_context_changes_a_score(whole):
    model, _, _ = checkpoint.load_model(whole)
    questions = random_questions(50)  # contexts of 1 to 20 tokens: without a cache, and with 8 and 16 tokens in it
    found = evaluate.log_likelihoods(model, questions, FP32)
    plain = torch.tensor([[one_at_a_time(model, context, ending) for ending in endings] for context, endings in questions])
    assert (found - plain).abs().max() < 1e-4
    first, second = (evaluate.log_likelihoods(model, questions, FP32, rank, 2) for rank in (0, 1))
    assert torch.equal(first + second, found) and not torch.equal(first, found)
    shorter = evaluate.log_likelihoods(model, [(context[1:] or context, endings) for context, endings in questions], FP32)
    assert (shorter - plain).abs().max() > 1e-3  # control: without the first token of the context


@pytest.mark.parametrize("style", ["token", "harness"])
def test_accuracies_are_not_what_they_say(data, whole, style):
    model, tokenizer, _ = checkpoint.load_model(whole)
    scores = evaluate.Benchmark(data / "cloze.jsonl", tokenizer, 32, style).score(model, FP32)
    right = {"acc": [], "acc_norm": [], "acc_pmi": []}
    for question in QUESTIONS:
        context = question["ctx"] if style == "token" else f"{question['activity_label']}: {question['ctx_a']} Is"
        ids = [tokenizer.encode(" " + ending) for ending in question["endings"]]
        room = 33 - max(map(len, ids))
        logp = np.array([one_at_a_time(model, tokenizer.encode(context)[-room:], e) for e in ids])
        alone = np.array([one_at_a_time(model, [tokenizer.eot], e) for e in ids])
        size = [len(e) for e in (ids if style == "token" else question["endings"])]
        for name, by in (("acc", logp), ("acc_norm", logp / size), ("acc_pmi", logp - alone)):
            right[name].append(by.argmax() == question["label"])
    for name, column in right.items():
        assert scores[name] == pytest.approx(np.mean(column))
        assert scores[name.replace("acc", "stderr")] == pytest.approx(np.std(column) / math.sqrt(len(column) - 1))
    assert scores["n"] == 6 and scores["n_choices"] == 4 and scores["style"] == style
    blind = Llama(model.config)
    torch.nn.init.zeros_(blind.lm_head.weight)  # control: every token as likely, so per token all endings tie and the first is chosen
    share = evaluate.Benchmark(data / "cloze.jsonl", tokenizer, 32, style).score(blind, FP32)["acc_pmi"]
    assert share == pytest.approx(np.mean([question["label"] == 0 for question in QUESTIONS]))


def test_a_style_puts_other_words(tmp_path):
    item = {"activity_label": "Baking [x]", "ctx_a": "Mix it [title] well.", "ctx_b": "then you", "ctx": "Mix it [title] well. then you",
            "endings": ["wait [step] long", "  eat it"], "label": "1"}
    (tmp_path / "b.jsonl").write_text(json.dumps(item) + "\n")
    texts = {style: evaluate.Benchmark(tmp_path / "b.jsonl", Tokenizer(300), 200, style).texts[0] for style in ("token", "harness")}
    assert texts["token"] == (item["ctx"], item["endings"])
    assert texts["harness"] == ("Baking : Mix it. well. Then you", ["wait long", "eat it"])


@pytest.mark.parametrize("line", ["{", "[1]", '{"ctx": "a", "endings": ["b", "c"]}', '{"ctx": "a", "endings": ["b", "c"], "label": 2}',
                                  '{"ctx": "a", "endings": ["b"], "label": 0}', '{"ctx": "a", "endings": ["b", ""], "label": 0}',
                                  '{"ctx": "a", "endings": "bc", "label": 0}', '{"ctx": "a", "endings": ["b", "c"], "label": 0.7}',
                                  '{"ctx": "a", "endings": ["b", "c"], "label": Infinity}', "[" * 100_000,
                                  '{"ctx": 3, "endings": ["b", "c"], "label": 0}', '{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}',
                                  '{"ctx": "a", "endings": ["b", "%s"], "label": 0}' % ("long" * 20), "\udcff"])
def test_a_broken_question_is_scored(whole, tmp_path, capsys, line):
    good = json.dumps({"ctx": "a", "endings": ["b", "c"], "label": 0})
    (tmp_path / "b.jsonl").write_text(f"{good}\n{line}\n", errors="surrogateescape")
    with pytest.raises(SystemExit) as error:
        evaluate.main([str(whole), "--benchmark", str(tmp_path / "b.jsonl")])
    assert error.value.code == 2 and "b.jsonl:2: " in messages(capsys)[-1]
    (tmp_path / "b.jsonl").write_text(good + "\n\n")  # control
    assert not evaluate.main([str(whole), "--benchmark", str(tmp_path / "b.jsonl"), "--device", "cpu"])
    (whole / "evaluations.jsonl").unlink()


@pytest.mark.slow
def test_batches_are_hardly_faster():
    torch.manual_seed(0)
    model = Llama(PRESETS["tiny"]).eval()
    questions = random_questions(200, longest=100, vocab_size=4096)
    speed = {}  # questions per second
    with torch.no_grad():
        for name, n, score in (("batches", 200, lambda: evaluate.log_likelihoods(model, questions, FP32)),
                               ("one", 40, lambda: [one_at_a_time(model, c, ending) for c, endings in questions[:40] for ending in endings])):
            score()
            start = time.perf_counter()
            score()
            speed[name] = n / (time.perf_counter() - start)
    print(speed)
    assert speed["batches"] > 3 * speed["one"]  # 5.8 times on an idle machine; with room for a busy one


# ---------------------------------------------------------------------------------------------------------------------
# Samples, commands

def test_statistics_of_a_text():
    assert evaluate.text_statistics([1, 2, 3, 4]) == {"distinct_2": 1.0, "repetition": 0.0}
    assert evaluate.text_statistics([1, 2] * 4) == {"distinct_2": 2 / 7, "repetition": 3 / 5}
    assert evaluate.text_statistics([7]) == {"distinct_2": 1.0, "repetition": 0.0}


def test_evaluate_and_sample_as_commands(data, whole, capsys):
    assert not evaluate.main([str(whole), "--step", "8"])
    assert "step 8" in capsys.readouterr().out
    assert json.loads((whole / "evaluations.jsonl").read_text().splitlines()[-1])["step"] == 8
    (whole / "evaluations.jsonl").unlink()
    texts = []
    for seed in (0, 0, 1):
        sample.main([str(whole), "--prompt", "Zürich <|endoftext|>", "--samples", "2", "--seed", str(seed), "--max_new_tokens", "40"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("Zürich <|endoftext|>")
    for prompt in ("", "long " * 100, "\udcff"):
        sample.main([str(whole), "--prompt", prompt, "--max_new_tokens", "3"])
    for wrong in (["--step", "7"], ["--temperature", "-1"], ["--top_p", "0"]):
        with pytest.raises(SystemExit) as error:
            sample.main([str(whole), *wrong])
        assert error.value.code == 2


def test_streaming_breaks_a_character(whole):
    class Speaker:
        def generate(self, *args):
            return iter([torch.tensor([b]) for b in (tokenizer.encode("é")[0], tokenizer.encode("é")[1], tokenizer.eot)])
    _, tokenizer, _ = checkpoint.load_model(whole)
    args = type("Args", (), {"temperature": 1, "top_k": None, "top_p": None})
    assert list(sample.stream(Speaker(), tokenizer, [1], 9, args, None, "cpu")) == ["", "é", ""]
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"  # control: piece by piece it would break


def test_the_trajectory_is_of_one_moment(whole, tmp_path, capsys):
    run = tmp_path / "r"
    shutil.copytree(whole, run)
    (run / "checkpoints/step_00000004/model.pt").write_bytes(b"?")
    assert not sample.main([str(run), "--trajectory"])
    printed = capsys.readouterr()
    assert "step_00000004 is damaged" in printed.err
    events = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events] == [0, 1, 2, 8, 15, 16, 20] and all(e["prompt"] == "The" and e["seed"] == 0 for e in events)
    assert [e["text"] for e in events if e["step"] in (0, 8, 16, 20)][0] == rows(run, "sample", ("text",))[0][0]  # as the run itself drew it
    assert len({e["text"] for e in events}) > 3  # control: other weights, other words
    sample.main([str(run), "--trajectory", "--seed", "1"])
    assert [json.loads(line)["text"] for line in (run / "evaluations.jsonl").read_text().splitlines()[7:]] != [e["text"] for e in events]
    for wrong in (["--step", "8"], ["--samples", "2"]):
        with pytest.raises(SystemExit) as error:
            sample.main([str(run), "--trajectory", *wrong])
        assert error.value.code == 2
