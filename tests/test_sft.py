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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import evaluate
import sft
from conftest import (
    CHILD,
    INSTRUCTIONS,
    ROOT,
    TUNE,
    exit_code,
    messages,
    rows,
    run,
    same,
    state,
    tune,
    tuning,
)
from data import Tokenizer
from support import durable
from support.chat import (
    IGNORE,
    Batches,
    Examples,
    encode_chat,
    hold_out,
    messages_of,
    most_frequent_answer,
    read_instructions,
)
from support.runs import newest_run

FP32 = torch.autocast("cpu", enabled=False)
TIMES = ("time", "seconds", "dt_ms", "tok_per_s")


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """Answers of 4 tokens, as in trials.py: the time goes into what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.AnswerObserver, "LONGEST", 4)
        yield


LORA = ["--lora", 4]
BOTH = pytest.mark.parametrize("method", [LORA, []], indirect=True, ids=["lora", "full"])


@pytest.fixture(scope="module", params=[LORA], ids=["lora"])
def method(request):
    """Adapters, of which a state has more that can be lost, unless the test is marked as BOTH."""
    return request.param


@pytest.fixture(scope="module")
def tuned(short_answers, whole, instructions, method, tmp_path_factory):
    """A tuning of 12 steps that was not disturbed."""
    folder = tmp_path_factory.mktemp("tuned") / "r"
    assert tune(whole, instructions, folder, *method) == 0
    return folder


@pytest.fixture
def copy(tuned, tmp_path):
    """A copy of the tuning, to be changed."""
    return Path(shutil.copytree(tuned, tmp_path / "r"))


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

@pytest.fixture(scope="module")
def examples():
    same_as_padding = {"instruction": "!", "output": "b!!"}  # "!" has id 0
    chats = [messages_of(row) for row in (*INSTRUCTIONS, same_as_padding)]
    return Examples(chats, Tokenizer(300), "S.", 64)


def answer_losses(model, chats, tokenizer, system):
    """(nats, right): of each token of the answers its loss, and whether it is the likeliest token.
    By the formula, one conversation at a time, without padding."""
    nats = []
    right = []
    for turns in chats:
        ids, is_answer = encode_chat(tokenizer, turns, system)
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


def test_loss_counts_answers_only(whole, examples):
    """Catches: questions that are learned, targets one token beside, padding that counts, that is
    read, or that is known by its id."""
    model, _, _ = checkpoint.load_model(whole)
    order = [0, 17, 30, 31]  # of different lengths; row 30 has two answers
    chats = [examples.chats[row] for row in order]
    nats, _ = answer_losses(model, chats, Tokenizer(300), "S.")
    inputs, targets = read(examples, order)
    assert len(nats) == (targets != IGNORE).sum() == examples.targets[order].sum()
    assert loss_sum(model, inputs, targets).item() == pytest.approx(sum(nats), rel=1e-5)
    everything = loss_sum(model, inputs[:, :-1], inputs[:, 1:]).item()
    assert everything != pytest.approx(sum(nats), rel=0.1)  # control: without the mask


def test_gradient_does_not_depend_on_micro_batches(whole, examples):
    """Catches: a mean of means, in which a token of a short answer has more weight."""
    model, _, _ = checkpoint.load_model(whole)

    def gradient(*parts):
        """Of a step whose batch is divided into these parts, accumulated as in the loop."""
        targets_in_step = sum(examples.targets[part].sum().item() for part in parts)
        model.zero_grad()
        for part in parts:
            (loss_sum(model, *read(examples, part)) / targets_in_step).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    short = [0]
    others = [1, 2, 17, 30, 5]
    expected = gradient([*short, *others])
    tolerance = 1e-5 * expected.abs().max().item()
    assert torch.allclose(gradient(short, others), expected, rtol=1e-5, atol=tolerance)
    mean_of_means = (gradient(short) + gradient(others)) / 2
    assert (mean_of_means - expected).abs().max() > 1000 * tolerance  # control


def test_micro_batch_does_not_change_the_run(whole, instructions, tuned, method, tmp_path):
    """Catches: a mean of means in the loop, rows of the last micro-batch that are dropped; with
    --activation_checkpointing, adapters that get no gradient or another one."""
    found = {}
    for flag in (["--micro_batch", 1], ["--activation_checkpointing"]):
        folder = tmp_path / flag[0]
        assert tune(whole, instructions, folder, *method, *flag, "--stop_at", 4) == 75
        found[flag[0]] = losses(folder)
    expected = losses(tuned)[:4]
    assert largest_difference(found["--micro_batch"], expected) < 1e-5
    assert np.array_equal(found["--activation_checkpointing"], expected)
    assert largest_difference(expected[1:], expected[:-1]) > 1e-3  # control: other steps


CHILD_SFT = CHILD.replace("train.main()", "sft.main()").replace("import model, train", """
import model, sft, train
sft.AnswerObserver.LONGEST = 4
""")


@pytest.mark.slow
@BOTH
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


@BOTH
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
    assert scores[0][1] != pytest.approx(scores[-1][1], rel=1e-3)  # control: other weights


def test_score_does_not_depend_on_its_batches(tuned, monkeypatch):
    """Catches: a mean of the means of batches or of rows, a last batch that is left out."""
    chats = [messages_of(row) for row in INSTRUCTIONS]
    observer = observer_of(tuned, chats)
    expected = observer.score()  # in one batch
    fewer = observer_of(tuned, chats[:-1]).score()
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 3 * 64)  # 3 rows in a forward
    monkeypatch.setattr(sft, "ROWS", 7)                    # 7 tokens in the output layer
    assert observer.score() == pytest.approx(expected, rel=1e-5)
    assert fewer != pytest.approx(expected, rel=1e-5)  # control


def test_run_without_held_out_rows(whole, instructions, tmp_path):
    """Catches: a division by zero when there is nothing to score; --epochs that is not the number
    of epochs."""
    folder = tmp_path / "r"
    flags = [*TUNE[2:], "--epochs", 0.5, "--held_out", 0]  # without --max_steps
    argv = [whole, "--instructions", instructions, "--run", folder, *flags]
    assert exit_code(sft.main, argv) == 0
    assert len(rows(folder)) == 3  # half of 31 rows, 6 in a step
    scores = rows(folder, "sft_eval", ("heldout_loss", "token_acc", "ended"))
    assert set(scores) == {(None, None, None)}
    assert rows(folder, "benchmark", ("step",)) != []  # control: the rest is evaluated


def test_log_tells_what_was_tuned_on(tuned, instructions):
    """Catches: a habit that is taken for knowledge because the commonest training answer is not
    shown, questions that were trained on, an answer beside another question; a tuning whose cost
    for the benchmark cannot be seen."""
    training, held_out = rows_of(tuned, instructions)
    frequent, share = most_frequent_answer(training)
    questions = [{"question": chat[-2]["content"], "answer": chat[-1]["content"]}
                 for chat in sft.spread(held_out, 5)]
    keys = ("rows", "held_out", "bad", "frequent_answer", "frequent_share", "questions")
    assert rows(tuned, "instructions", keys) == [(25, 6, 0, frequent, share, questions)]
    asked = [item["question"] for item in questions]
    sampled = rows(tuned, "sample", ("step", "prompt"))
    assert sampled == list(itertools.product((0, 1, 2, 4, 8, 12), asked))
    trained = [chat[-2]["content"] for chat in training]
    assert not set(asked) & set(trained)  # control
    scored = rows(tuned, "benchmark", ("step", "name", "n"))  # by the questions of the base
    assert scored == [(step, "cloze", 6) for step in (0, 1, 2, 4, 8, 12)]


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
    for turns, answer in zip(chats, found):
        ids, _ = encode_chat(observer.tokenizer, turns[:1], "S.")
        assert answer == greedy(observer.model, ids, eot)
    assert found[0] != found[2]  # control


def test_shares_and_samples_are_those_of_the_answers(tuned):
    """Catches: a share of answers that end over other answers, a text without its mark "cut"."""
    observer = observer_of(tuned, [[user(f"{n}?"), assistant("x")] for n in range(4)])
    ended = [True, False, True, True]
    observer.answer = lambda asked: [([1 + n], ended[n]) for n in range(4)]
    found = []
    log = SimpleNamespace(say=print)
    log.event = lambda event, step, **fields: found.append(fields)
    observer.evaluate(0, log)
    assert found[0]["ended"] == 0.75
    found.clear()
    observer.sample(0, log)
    logged = [(fields["prompt"], fields["text"], fields["cut"]) for fields in found]
    decode = observer.tokenizer.decode
    assert logged == [(f"{n}?", decode([1 + n]).strip(), not ended[n]) for n in range(4)]


def test_cut_conversations_are_not_asked(tuned):
    """Catches: a question that was cut amid its text; questions that are all from the beginning of
    the file; a row that was skipped, and shifts the others."""
    chats = []
    for n in range(50):  # whole, skipped, whole, cut
        question = f"{n}?" + " no" * 40 * (n % 4 == 1)
        chats.append([user(question), assistant("no" + " no" * 40 * (n % 4 == 3))])
    observer = observer_of(tuned, chats)
    assert len(observer.asked) == 25
    shown = [messages[0]["content"] for messages in observer.shown]
    assert shown == ["0?", "12?", "24?", "36?", "48?"]


# -------------------------------------------------------------------------------------------------
# Settings and mistakes

def logged(name):
    """The settings of a run in logs/."""
    first = (ROOT / "logs" / name / "metrics.jsonl").read_text().splitlines()[0]
    return json.loads(first)["config"]


def test_defaults_are_those_of_the_logged_runs(tmp_path):
    """Catches: a default that changed since the runs in logs/, so that the commands in README give
    other numbers; one that wins over a flag."""
    base = tmp_path / "tiny"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(logged("default")))
    for name, flags in (("sft", []), ("lora8", ["--lora", "8"])):
        found = vars(sft.read_settings([str(base), *flags]))
        own = {"base", "run", "step", "max_steps", "fingerprint"}
        known = (found.keys() & logged(name).keys()) - own
        assert len(known) > 25
        assert {key: found[key] for key in known} == {key: logged(name)[key] for key in known}
        assert sft.read_settings([str(base), *flags, "--lr", "0.5"]).lr == 0.5
    assert logged("sft")["lr"] != logged("lora8")["lr"]  # control


def test_run_is_named_after_base_and_method(whole, tuned, tmp_path, monkeypatch):
    """Catches: a tuning in its base's folder, a base that is taken for another one because it is
    spelled in another way, a tuned run that is tuned again because it is the newest one."""
    shutil.copytree(whole, tmp_path / "runs/base")
    shutil.copytree(tuned, tmp_path / "runs/tuned")
    monkeypatch.chdir(tmp_path)
    assert newest_run() == Path("runs/tuned")  # control
    for argv in ([], ["runs/base/"], [str(Path("runs/base").resolve())]):
        settings = sft.read_settings(argv)
        assert settings.base == "runs/base"
        assert settings.run == "runs/base-sft"
    assert sft.read_settings(["runs/tuned", "--lora", "4"]).run == "runs/tuned-lora4"


GOOD = {"instruction": "a?", "output": "b"}


@pytest.mark.row(27)
@pytest.mark.parametrize("content, flags, why", [
    (None, [], "no such file"),
    ([GOOD], ["--max_length", 5], "nothing left to train on"),
    ([{**GOOD, "split": "val"}], [], 'held out (by their "split"'),
    ([GOOD], ["--max_length", 65], "more than the model's window of 64"),
    ([GOOD], ["--lora_alpha", 2], "--lora_alpha is about adapters"),
    ([GOOD], ["--lora", 33], "more than the model's dim 32"),
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


@pytest.mark.row(27)
def test_bad_rows_are_skipped_and_counted(whole, tmp_path, capsys):
    """Catches: --skip_bad that stops all the same, or leaves out rows silently."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([GOOD, {}, {**GOOD, "output": "Blue."}]))
    assert tune(whole, file, tmp_path / "r", "--skip_bad", "--stop_at", 0) == 75
    assert "1 bad" in capsys.readouterr().out
    assert rows(tmp_path / "r", "instructions", ("rows", "held_out", "bad")) == [(1, 1, 1)]


@pytest.mark.row(44)
def test_data_of_another_preparation_is_refused(whole, instructions, data, tmp_path, capsys):
    """Catches: a tuning on instructions and questions of text that the base was not trained on, or
    that it was trained on though they are held out."""
    base = shutil.copytree(whole, tmp_path / "base")
    folder = shutil.copytree(data, tmp_path / "data")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "data": str(folder)}))
    file = folder / "train_0001.npy"
    np.save(file, np.load(file)[::-1])
    assert tune(base, instructions, tmp_path / "r", "--stop_at", 0) == 2
    assert "data is not the data of this run (changed: train_0001.npy)" in messages(capsys)[-1]
    questions = ("--benchmark", folder / "cloze.jsonl")
    assert tune(base, instructions, tmp_path / "r", "--stop_at", 0, *questions) == 75  # control


@pytest.mark.row(43, 45)
def test_rows_and_flags_that_do_nothing_are_reported(whole, tmp_path, capsys):
    """Catches: copies of a row that are left out, and a flag that has no effect, without a word."""
    rows_ = [{"instruction": f"{n}?", "output": "b", "split": "val" * (n == 1)} for n in range(4)]
    file = tmp_path / "rows.json"
    found = {}
    for copies, held_out in ((1, 0.02), (2, 0.5)):
        file.write_text(json.dumps(rows_ * copies))
        folder = tmp_path / str(copies)
        assert tune(whole, file, folder, "--stop_at", 0, "--held_out", held_out) == 75
        found[copies] = capsys.readouterr().out
    for line in ("4 rows repeat another one and are left out", "--held_out is not used"):
        assert line in found[2]
        assert line not in found[1]  # control


def test_base_cannot_be_overwritten_by_its_tuning(whole, instructions, tmp_path, capsys):
    """Catches: --overwrite that deletes the weights to start from, by whatever name."""
    base = tmp_path / "base"
    shutil.copytree(whole, base)
    link = tmp_path / "link"
    link.symlink_to(base)
    assert tune(base, instructions, link, "--overwrite") == 2
    assert "is the run to start from" in messages(capsys)[-1]
    assert same(base, whole)


# -------------------------------------------------------------------------------------------------
# Stopped, killed, damaged

@pytest.mark.row(37)
@BOTH
def test_sft_resume_is_bitwise(whole, instructions, tuned, method, tmp_path):
    """Catches: anything that a tuning depends on and that its state lacks, be it the moments, the
    rows that come next, or the system prompt; an evaluation that a stop leaves out."""
    folder = tmp_path / "r"
    assert tune(whole, instructions, folder, *method, "--stop_at", 1) == 75  # in the warm-up
    for stop in (4, 7, 10):  # right after an evaluation, amid an epoch, at the end of an epoch
        assert resume(folder, "--stop_at", stop) == 75
    assert resume(folder) == 0
    assert same(folder, tuned, 12)
    assert events(folder) == events(tuned)


@pytest.mark.row(37)
@pytest.mark.parametrize("mistake", [None, "moments", "rounded", "seed", "system"])
def test_sft_resume_differs_if_state_is_incomplete(copy, tuned, mistake):
    """Catches: a comparison in the test before this one that cannot fail; rows of a lost step that
    stay in the log."""
    durable.remove(copy / "checkpoints/step_00000012")
    saved = checkpoint.load(durable.newest(copy))
    if mistake == "rounded":
        for tensor in saved["model"].values():
            tensor.copy_(tensor.half())
    if mistake == "seed":
        saved["config"]["seed"] = 2
    if mistake == "system":
        saved["config"]["system"] = "T."
    checkpoint.save(copy, saved, keep_last=2, keep_every=0)
    flags = ["--reset_optimizer"] if mistake == "moments" else []
    assert resume(copy, *flags) == 0
    assert rows(copy, "resume", ("step",)) == [(10,)]
    assert same(copy, tuned, 12) == (mistake is None)


@pytest.fixture(scope="module")
def trial(server, whole, instructions, method):
    """A function that runs sft.py --resume in a process of its own, with a fault."""
    def trial(folder, *flags, **fault):
        return server(whole, "--instructions", instructions, "--run", folder, "--resume", *method,
                      *flags, base=TUNE, script="sft", **fault)

    return trial


@pytest.mark.row(37)
def test_sft_survives_kill_bitwise(trial, tmp_path):
    """Catches: a checkpoint that a kill leaves half, a step that is logged twice or not at all, a
    state that lacks something."""
    seed = os.getpid()
    print(f"random.Random({seed})")
    draw = random.Random(seed)
    undisturbed = tmp_path / "undisturbed"
    short = ("--max_steps", 4)
    operations = trial(undisturbed, *short)["operations"]
    for n in range(3):
        folder = tmp_path / str(n)
        fault = ["kill", draw.randint(1, operations)]
        assert trial(folder, *short, fault=fault)["code"] == -signal.SIGKILL
        assert trial(folder, *short)["code"] == 0
        assert same(folder, undisturbed, 4)
        assert events(folder) == events(undisturbed)


@pytest.mark.row(37)
def test_sft_survives_kill_in_its_last_evaluation(trial, tuned, tmp_path):
    """Catches: an evaluation before the save, which a kill takes the last steps with; a resume
    that leaves out the evaluation, or logs it twice."""
    folder = tmp_path / "r"
    assert trial(folder, fault=["signal", "benchmark", 12, "SIGKILL"])["code"] == -signal.SIGKILL
    assert durable.newest(folder).name == "step_00000012"
    assert tuning(folder) == tuning(tuned)  # control: a row of the evaluation is in the log
    assert events(folder) != events(tuned)  # control: the rest of it is missing
    assert trial(folder)["code"] == 0
    assert same(folder, tuned, 12)
    assert events(folder) == events(tuned)


@pytest.mark.row(37)
@pytest.mark.parametrize("where, name", [("step", "SIGINT"), ("evaluate", "SIGTERM")])
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
def test_sft_skips_a_damaged_checkpoint(copy, tuned, capsys):
    """Catches: a damaged file that is loaded, or that ends the run although an older state is
    good."""
    os.truncate(copy / "checkpoints/step_00000012/model.pt", 100)
    assert resume(copy) == 0
    assert "step_00000012 is damaged" in capsys.readouterr().err
    assert rows(copy, "resume", ("step",)) == [(10,)]
    assert same(copy, tuned, 12)


@pytest.mark.row(37)
def test_sft_nan_is_never_saved(whole, instructions, tuned, method, tmp_path, capsys, monkeypatch):
    """Catches: an update with a NaN, a checkpoint with one, steps that are lost because only the
    last regular checkpoint is there."""
    folder = tmp_path / "r"
    clip = torch.nn.utils.clip_grad_norm_
    calls = itertools.count(1)

    def broken(parameters, largest):
        trained = [p for p in parameters if p.grad is not None]
        if next(calls) == 7:
            trained[0].grad[0, 0] = math.nan
        return clip(trained, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    assert tune(whole, instructions, folder, *method) == 3
    assert "step 7: loss" in messages(capsys)[-1]
    assert rows(folder) == rows(tuned)[:6]
    assert durable.newest(folder).name == "step_00000006"
    assert all(tensor.isfinite().all() for tensor in state(folder, 6).values())
    assert resume(folder) == 0  # control: without the NaN it is the undisturbed run
    assert same(folder, tuned, 12)
    assert events(folder) == events(tuned)


@pytest.mark.row(37)
def test_sft_resume_refuses_another_experiment(copy, tuned, capsys):
    """Catches: a setting that changes the experiment and is accepted, or ignored silently."""
    for name, value in (("lr", 0.5), ("batch_size", 3), ("system", "T."), ("lora", 2),
                        ("max_length", 32), ("held_out", 0.1), ("step", 16)):
        assert resume(copy, f"--{name}", value) == 2
        line, = messages(capsys)
        assert f"{name} (saved" in line
    assert exit_code(sft.main, [tuned, "--run", copy, "--resume"]) == 2
    assert "base (saved" in messages(capsys)[-1]
    assert resume(copy, "--eval_every", 7) == 0  # control: the same experiment
    assert events(copy) == events(tuned)


@pytest.mark.row(37)
def test_sft_resume_refuses_another_file(copy, instructions, tmp_path, capsys):
    """Catches: a run that goes on with other rows; a file that is taken for another because of its
    name; a larger --max_steps that does nothing."""
    other = tmp_path / "other.jsonl"
    other.write_text(instructions.read_text() + json.dumps(GOOD) + "\n")
    flags = ("--instructions", other, "--max_steps", 13)
    assert resume(copy, *flags) == 2
    assert "is not the file that this run was tuned on" in messages(capsys)[-1]
    other.write_text(instructions.read_text())
    assert resume(copy, *flags) == 0  # control
    assert len(rows(copy)) == 13


@pytest.mark.row(37)
def test_used_folder_is_refused(whole, data, instructions, copy, tuned, method, capsys):
    """Catches: a run that is overwritten without --overwrite, or continued by the other script."""
    assert tune(whole, instructions, copy, *method) == 2
    assert "--resume" in messages(capsys)[-1]
    assert run(data, copy, "--resume") == 2
    assert "another script" in messages(capsys)[-1]
    assert same(copy, tuned, 12)
    assert tune(whole, instructions, copy, *method, "--overwrite", "--stop_at", 1) == 75  # control
