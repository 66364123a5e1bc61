"""evaluate.py: scores against a plain loop that does one thing at a time, each with a control."""
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import sample
from checkpoint import load_model
from conftest import QUESTIONS, evals, exit_code, messages, run, write_lines
from data import Shard, Tokenizer, Windows
from evaluate import Benchmark
from model import PRESETS, Llama
from support import durable
from support.runs import UserError

FP32 = torch.autocast("cpu", enabled=False)
TOKENIZER = Tokenizer(300)


@pytest.fixture
def model(whole):
    model, _, _ = load_model(whole)
    return model


def random_windows(seq_len, n_tokens=700):
    """Text with end-of-text in it, so that some tokens stand for no bytes."""
    ids = np.random.RandomState(0).randint(0, 300, n_tokens).astype(np.uint16)
    ids[::50] = TOKENIZER.eot
    return Windows([Shard(Path("val.npy"), ids)], seq_len, 300, shuffle=False)


# ---- text

def log_p(model, ids, n_ids=None):
    """ln p of each token after the first: one forward, one row, no padding. n_ids: among so many
    ids only."""
    logits, _ = model(torch.tensor(ids[:-1])[None])
    rows = F.log_softmax(logits[0, :, :n_ids].double(), dim=-1)
    return [row[target].item() for row, target in zip(rows, ids[1:])]


def test_text_scores_equal_a_plain_loop(model, monkeypatch):
    """Catches: targets shifted by one, windows left out or scored twice, end-of-text counted as
    bytes, eighths of unequal text, a standard error of something else."""
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 50)  # 3 windows a forward, 1 in the last
    monkeypatch.setattr(evaluate, "ROWS", 7)
    val = random_windows(seq_len=16)
    windows = val.read(0, 13)
    losses = -np.array([log_p(model, window) for window in windows])  # (13, 16)
    targets = windows[:, 1:].flatten().tolist()
    text = b"".join(TOKENIZER.decode_bytes([i]) for i in targets if i != TOKENIZER.eot)
    eighths = losses.reshape(13, 8, 2).mean(axis=2)
    gains = eighths[:, 0] - eighths[:, 7]

    found = evaluate.evaluate(model, val, TOKENIZER, eval_tokens=13 * 16 + 15, autocast=FP32)
    assert found == {
        "val_loss": pytest.approx(losses.mean(), rel=1e-5),
        "val_bpb": pytest.approx(losses.sum() / math.log(2) / len(text), rel=1e-5),
        "position_loss": pytest.approx(eighths.mean(axis=0), rel=1e-5),
        "context_gain": pytest.approx(gains.mean(), abs=1e-5),
        "context_gain_stderr": pytest.approx(gains.std(ddof=1) / math.sqrt(13), rel=1e-3)}
    assert losses[:12].mean() != pytest.approx(found["val_loss"], rel=1e-5)  # control


def test_little_text_is_scored_whole(model):
    """Catches: an error, or a loss of NaN, from one window, from windows below 8 tokens (which have
    no eighths to compare), from more eval_tokens than there are."""
    one = evaluate.evaluate(model, random_windows(16), TOKENIZER, 1, FP32)
    assert one["context_gain_stderr"] == 0
    val = random_windows(4, n_tokens=50)
    short = evaluate.evaluate(model, val, TOKENIZER, 10_000, FP32)
    loss = -np.mean([log_p(model, window) for window in val.read(0, val.total)])
    assert math.isnan(short["context_gain"])
    assert evaluate.describe_text(short).startswith(f"val loss {loss:.4f}")


def test_evaluation_leaves_the_model_as_it_was(model):
    """Catches: training that goes on in evaluation mode, evaluation that keeps gradients or draws
    the random numbers of the training."""
    seen = []
    model.model.register_forward_hook(
        lambda decoder, *_: seen.append((decoder.training, torch.is_grad_enabled())))
    model.train()
    before = torch.get_rng_state()
    evaluate.evaluate(model, random_windows(16), TOKENIZER, 256, FP32)
    evaluate.log_likelihoods(model, *random_questions(3), FP32)
    evaluate.continue_prompt(model, TOKENIZER, "a", FP32)
    assert set(seen) == {(False, False)}
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


# ---- multiple choice

def one_at_a_time(model, context, ending):
    """ln P(ending | context), without the padded ids."""
    return sum(log_p(model, [*context, *ending], model.config.vocab_size)[-len(ending):])


def random_questions(n, longest=20, vocab_size=300):
    """n contexts of 1 to `longest` tokens, and for each 4 endings of 1 to 5."""
    random = np.random.RandomState(0)
    contexts = [random.randint(0, vocab_size, 1 + i % longest).tolist() for i in range(n)]
    endings = [[random.randint(0, vocab_size, 1 + (i + j) % 5).tolist() for j in range(4)]
               for i in range(n)]
    return contexts, endings


def test_shares_of_two_processes_add_up(model, monkeypatch):
    """Catches: a window or a question that both processes score, or neither."""
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 50)
    rows = []
    monkeypatch.setattr(evaluate, "complete_rows", lambda row, device: rows.append(row) or row)
    for process in ((0, 1), (0, 2), (1, 2)):  # rank, world
        monkeypatch.setattr(evaluate, "processes", lambda: process)
        evaluate.evaluate(model, random_windows(16), TOKENIZER, 10_000, FP32)
        evaluate.log_likelihoods(model, *random_questions(50), FP32)
    for kind in range(3):  # losses, bytes, likelihoods
        whole, first, second = rows[kind::3]
        assert torch.equal(first + second, whole)
        assert first.any() and second.any()  # control: none is all


WORDS = ["a", "be", "the end", "1 2 3 4 5 6", "internationally", "it is what it was"]


def random_question(random):
    words = random.choice(WORDS, 8).tolist()
    return {"ctx": words[0], "activity_label": words[1], "ctx_a": words[2], "ctx_b": words[3],
            "endings": words[4:], "label": int(random.randint(4))}


@pytest.mark.parametrize("style", ["token", "harness"])
def test_accuracies_equal_a_plain_loop(model, tmp_path, style, monkeypatch):
    """Catches: padding that changes a score, an ending scored a token early or late, scores in
    another order than the endings; acc_norm by the length of something else, acc_pmi that adds
    what it should subtract, another standard error."""
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 100)
    random = np.random.RandomState(0)
    items = [random_question(random) for _ in range(60)]
    likelihoods = []
    right = {"": [], "_norm": [], "_pmi": []}
    for item in items:
        context, space, endings = evaluate.put_question(item, style)
        context = TOKENIZER.encode(context)
        ids = [TOKENIZER.encode(space + ending) for ending in endings]
        lengths = [len(counted) for counted in (ids if style == "token" else endings)]
        found = np.array([one_at_a_time(model, context, ending) for ending in ids])
        alone = np.array([one_at_a_time(model, [TOKENIZER.eot], ending) for ending in ids])
        likelihoods.append(found)
        right[""].append(found.argmax() == item["label"])
        right["_norm"].append((found / lengths).argmax() == item["label"])
        right["_pmi"].append((found - alone).argmax() == item["label"])

    write_lines(tmp_path / "b.jsonl", items)
    benchmark = Benchmark(tmp_path / "b.jsonl", TOKENIZER, 64, style)
    found = evaluate.log_likelihoods(model, benchmark.contexts, benchmark.endings, FP32).numpy()
    assert np.abs(found - likelihoods).max() < 1e-4
    assert np.abs(found[1:] - likelihoods[:-1]).max() > 1e-2  # control: of other questions
    scores = benchmark.score(model, FP32)
    for name, column in right.items():
        stderr = np.std(column, ddof=1) / math.sqrt(60)
        assert scores[f"acc{name}"] == pytest.approx(np.mean(column))
        assert scores[f"stderr{name}"] == pytest.approx(stderr)
    assert len({scores["acc"], scores["acc_norm"], scores["acc_pmi"]}) == 3  # control


def test_a_style_has_its_own_words():
    """Catches: scores that cannot be compared to those of the same style elsewhere."""
    item = {"activity_label": "Baking [x]", "ctx_a": "Mix it [title] well.", "ctx_b": "then YOU",
            "ctx": "Mix it [title] well. then YOU", "endings": ["wait [step] long", "  eat it"]}
    assert evaluate.put_question(item, "token") == (item["ctx"], " ", item["endings"])
    words = evaluate.put_question(item, "harness")
    assert words == ("Baking : Mix it. well. Then you", " ", ["wait long", "eat it"])
    item["ctx_b"] = "then YOU [substeps]"  # what is left of it belongs to the ending
    words = evaluate.put_question(item, "harness")
    assert words == ("Baking : Mix it. well. Then you", "  ", ["wait long", "eat it"])


def test_a_long_context_loses_its_beginning(tmp_path):
    """Catches: an ending cut instead of the context, or a question longer than the window."""
    item = {"ctx": "0 1 2 3 4 5 6 7 8 9", "endings": ["one", "or two"], "label": "1"}
    write_lines(tmp_path / "b.jsonl", [item] * 3)
    ids = TOKENIZER.encode(item["ctx"])
    longest = len(TOKENIZER.encode(" or two"))
    benchmark = Benchmark(tmp_path / "b.jsonl", TOKENIZER, longest + 3, items=2)
    assert benchmark.contexts == 2 * [ids[-4:]]
    with pytest.raises(UserError, match=f"b.jsonl, line 1: an ending of {longest} tokens"):
        Benchmark(tmp_path / "b.jsonl", TOKENIZER, longest - 1)


QUESTION = '{"ctx": "a", "endings": ["b", "c"], "label": 0}'


@pytest.mark.parametrize("line", [
    '{"a":' * 100_000, QUESTION.replace("ctx", "other"), QUESTION.replace('"b"', '"\\ud800"'),
    QUESTION.replace("0", "2"), QUESTION.replace("0", "-1"), QUESTION.replace("0", "0.7"),
    QUESTION.replace('"b", ', ""), QUESTION.replace('"b"', '""'),
    QUESTION.replace('["b", "c"]', '"bc"')])
def test_a_broken_question_is_refused(tmp_path, line):
    """Catches: a traceback, or a score from a question that has no right answer."""
    file = tmp_path / "b.jsonl"
    file.write_text(f"{line}\n{QUESTION}\n")
    with pytest.raises(UserError, match="b.jsonl, line 1: .*remove"):
        Benchmark(file, TOKENIZER, 48)
    file.write_text(f"{QUESTION}\n\n")
    assert len(Benchmark(file, TOKENIZER, 48).labels) == 1  # control


def test_a_file_without_a_common_choice_is_refused(tmp_path):
    """Catches: accuracies of no question; endings that are not as many in each."""
    file = tmp_path / "b.jsonl"
    three = QUESTION.replace('"b"', '"b", "d"')
    for text, message in (("", "no questions"), (f"{QUESTION}\n{three}", "line 2")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            Benchmark(file, TOKENIZER, 48)


@pytest.mark.slow
def test_batches_are_faster_than_one_at_a_time():
    """Catches: multiple choice that costs as much as without batches. Prints what it costs."""
    model = Llama(PRESETS["tiny"]).eval()
    contexts, endings = random_questions(50, longest=100, vocab_size=4096)
    with torch.no_grad():
        for _ in range(2):  # the first time does not count
            start = time.perf_counter()
            evaluate.log_likelihoods(model, contexts, endings, FP32)
            middle = time.perf_counter()
            for context, question in zip(contexts, endings):
                for ending in question:
                    one_at_a_time(model, context, ending)
            end = time.perf_counter()
    print(f"{50 / (middle - start):.0f} questions/s in batches, {50 / (end - middle):.0f} without")
    assert middle - start < end - middle  # 1.4 to 1.9 times as fast on one busy core


# ---- samples and the command

def test_text_statistics_by_hand():
    """Catches: n-grams of another n, or an error from a text shorter than that."""
    assert evaluate.text_statistics([1, 2] * 4) == {"distinct_2": 2 / 7, "repetition": 3 / 5}
    assert evaluate.text_statistics([7]) == {"distinct_2": 1.0, "repetition": 0.0}


@pytest.fixture
def copied(whole, tmp_path, monkeypatch):
    """A copy of the run, in the folder where scripts look for the newest one."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(whole, Path("runs/whole"))


@pytest.fixture
def refused(capsys):
    """Calls a script that must end with exit code 2; returns its last line."""
    def call(main, *argv):
        assert exit_code(main, argv) == 2
        return messages(capsys)[-1]
    return call


def events(run):
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_command_repeats_the_scores_of_the_training(copied, capsys):
    """Catches: another step, window or text than asked for; a number of questions or a precision
    that is ignored, or not noted; scores that are only printed."""
    flags = ["--step", "8", "--eval_tokens", "256"]
    assert not evaluate.main(flags)
    assert "step 8" in capsys.readouterr().out
    assert not evaluate.main([*flags, "--benchmark_items", "4", "--dtype", "bf16"])
    text, choice, other_text, other_choice = events(copied)
    losses = {row[0]: row[1] for row in evals(copied)}
    assert text["val_loss"] == pytest.approx(losses[8], rel=1e-5)
    assert text["val_loss"] != pytest.approx(losses[16], rel=1e-5)  # control
    noted = [text["event"], text["dtype"], choice["event"], choice["step"], choice["n"]]
    assert noted == ["eval", "fp32", "benchmark", 8, 6]
    assert [other_text["dtype"], other_choice["n"]] == ["bf16", 4]
    assert other_text["val_loss"] != text["val_loss"]


@pytest.fixture
def own_data(copied, data):
    """A copy of the data, which the settings of the copied run name."""
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**settings, "data": "own_data"}))
    return shutil.copytree(data, Path("own_data"))


@pytest.mark.row(44)
def test_data_of_another_preparation_is_refused(copied, own_data, capsys, refused):
    """Catches: a score, noted in the run's log, on text that the run was trained on."""
    assert not evaluate.main([])  # control
    np.save(own_data / "train_0000.npy", np.arange(1500, dtype=np.uint16) % 299)
    message = refused(evaluate.main)
    assert "own_data is not the data of this run (changed: train_0000.npy)" in message
    assert not evaluate.main(["--data", "own_data"])  # on request
    assert "note: own_data is not the data that" in capsys.readouterr().out
    assert [event.get("same_data") for event in events(copied)] == [True, None, False, None]
    names = [event["name"] for event in events(copied) if event["event"] == "benchmark"]
    assert names == ["cloze", "cloze of own_data"]  # so they are not in one curve


@pytest.mark.row(47)
def test_scores_are_printed_before_they_are_noted(copied, capsys):
    """Catches: scores of questions that are never computed, because those of the text cannot be
    noted."""
    (copied / "evaluations.jsonl").mkdir()
    assert exit_code(evaluate.main, []) == 2
    printed, error = capsys.readouterr()
    assert "val loss" in printed
    assert "cloze (token style" in printed
    assert "evaluations.jsonl: Is a directory" in error


@pytest.mark.row(52)
@pytest.mark.parametrize("reader, flags", [(evaluate.main, []), (sample.main, ["--trajectory"])])
def test_score_of_a_run_that_was_started_over_is_not_noted(copied, data, refused, monkeypatch,
                                                           reader, flags):
    """Catches: a score of the old weights in the log of the new run."""
    module = sys.modules[reader.__module__]
    note = module.note

    def started_over(*args):
        assert run(data, copied, "--overwrite", "--stop_at", 1) == 75
        return note(*args)

    monkeypatch.setattr(module, "note", started_over)
    assert "was started over in the meantime" in refused(reader, *flags)
    assert (copied / "evaluations.jsonl").read_bytes() == b""
    monkeypatch.setattr(module, "note", note)
    assert not reader(flags)  # control
    assert len(events(copied)) >= 2


@pytest.mark.row(55)
def test_half_a_row_is_not_joined_to_the_next(copied):
    """Catches: a row that a full disk cut, and the next one lost with it."""
    (copied / "evaluations.jsonl").write_text('{"event": "ev')
    assert not evaluate.main([])
    half, *lines = (copied / "evaluations.jsonl").read_text().splitlines()
    assert half == '{"event": "ev'
    assert [json.loads(line)["event"] for line in lines] == ["eval", "benchmark"]


@pytest.mark.row(45)
def test_a_style_without_questions_is_refused(own_data, refused):
    """Catches: a flag that does nothing."""
    (own_data / "cloze.jsonl").unlink()
    flags = ["--data", "own_data"]
    assert "--style is for questions" in refused(evaluate.main, *flags, "--style", "harness")
    assert not evaluate.main(flags)  # control


@pytest.mark.row(44)
def test_other_questions_are_refused(copied, own_data, capsys, refused):
    """Catches: scores on other questions, under the same name, in the log of a run, or none any
    more."""
    file = own_data / "cloze.jsonl"
    resume = ("--resume", "--max_steps", 21)
    for change in (lambda: write_lines(file, QUESTIONS[:3]), file.unlink):
        change()
        assert "cloze.jsonl" in refused(evaluate.main)
        assert run(own_data, copied, *resume) == 2
        assert "cloze.jsonl" in messages(capsys)[-1]
    write_lines(file, QUESTIONS)
    assert run(own_data, copied, *resume) == 0  # control


@pytest.mark.row(53)
def test_model_that_gives_no_numbers_is_not_scored(copied, capsys):
    """Catches: accuracies of a choice among NaN, which look like chance."""
    folder = copied / "checkpoints/step_00000020"
    weights = durable.load_file(folder / "model.pt")
    weights["model"]["model.norm.weight"][0] = math.nan
    meta = durable.read_meta(folder)
    meta["files"]["model.pt"] = durable.write_file(folder / "model.pt", weights)
    (folder / "meta.json").write_text(json.dumps(meta))
    assert exit_code(evaluate.main, []) == 3
    assert "NaN" in messages(capsys)[-1]
    assert not evaluate.main(["--step", "16"])  # control
    assert [event["step"] for event in events(copied)] == [16, 16]


@pytest.mark.row(46)
def test_several_processes_are_refused(copied, refused, monkeypatch):
    """Catches: torchrun, with which each process scores everything and notes it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "1")
    for main in (evaluate.main, sample.main):
        assert "runs in one process" in refused(main)


def test_command_ends_in_one_line(copied, data, refused):
    """Catches: a traceback from a wrong flag or file; a damaged checkpoint that is scored."""
    meta = shutil.copytree(data, Path("other")) / "meta.json"
    meta.write_text(meta.read_text().replace("300", "301").replace("299", "300"))
    (copied / "checkpoints/step_00000020/model.pt").write_bytes(b"?")
    for flags, message in [(["--step", 7], "no checkpoint of step 7"),
                           (["--step", 20], "no usable checkpoint (step 20: model.pt has 1 bytes"),
                           (["--seq_len", 65], "more than the model's max_seq_len 64"),
                           (["--data", "other"], "other has a vocabulary of 301")]:
        assert message in refused(evaluate.main, *flags)
    assert not evaluate.main([])  # control
    assert events(copied)[0]["step"] == 16  # the newest undamaged one
