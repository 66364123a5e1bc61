"""evaluate.py: scores against a plain loop that does one thing at a time, each with a control."""
import hashlib
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
from checkpoint import load_model, load_weights
from conftest import evals, exit_code, messages, run, write_lines
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

def losses_one_by_one(model, window):
    """−ln p of each token of a window after the first, from the logits of one forward."""
    tokens = torch.tensor(window)
    logits, _ = model(tokens[None, :-1])
    log_p = F.log_softmax(logits[0].double(), dim=-1)
    return [-log_p[i, target].item() for i, target in enumerate(tokens[1:])]


def test_text_scores_equal_a_plain_loop(model, monkeypatch):
    """Catches: targets shifted by one, windows left out or scored twice, end-of-text counted as
    bytes, eighths of unequal text, a standard error of something else."""
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 50)  # 3 windows a forward, 1 in the last
    monkeypatch.setattr(evaluate, "ROWS", 7)
    val = random_windows(seq_len=16)
    windows = val.read(0, 13)
    losses = np.array([losses_one_by_one(model, window) for window in windows])  # (13, 16)
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
    # control: another window shows
    more = evaluate.evaluate(model, val, TOKENIZER, eval_tokens=14 * 16, autocast=FP32)
    assert more["val_loss"] != pytest.approx(found["val_loss"], rel=1e-5)


def test_little_text_is_scored_whole(model):
    """Catches: an error, or NaN, from one window, from windows below 8 tokens, from more
    eval_tokens than there are."""
    one = evaluate.evaluate(model, random_windows(16), TOKENIZER, eval_tokens=1, autocast=FP32)
    assert one["context_gain_stderr"] == 0
    short = evaluate.evaluate(model, random_windows(4), TOKENIZER, 10_000, FP32)
    assert short["context_gain"] is None
    assert short["position_loss"] == []
    losses = [losses_one_by_one(model, window) for window in random_windows(4).read(0, 174)]
    assert short["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert evaluate.describe_text(short).startswith(f"val loss {short['val_loss']:.4f}")


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(model, training):
    """Catches: training that goes on in evaluation mode, evaluation that keeps gradients or draws
    the random numbers of the training."""
    seen = []
    hook = model.model.register_forward_hook(
        lambda decoder, *_: seen.append((decoder.training, torch.is_grad_enabled())))
    model.train(training)
    before = torch.get_rng_state()
    evaluate.evaluate(model, random_windows(16), TOKENIZER, 256, FP32)
    evaluate.log_likelihoods(model, random_pairs(3), FP32)
    evaluate.continue_prompt(model, TOKENIZER, "a", FP32)
    assert set(seen) == {(False, False)}
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), before)

    hook.remove()
    with pytest.raises(IndexError):  # an id outside the embedding
        evaluate.log_likelihoods(model, [((1,), (10**6,))], FP32)
    assert model.training == training
    assert torch.is_grad_enabled()  # control


# ---- multiple choice

def one_at_a_time(model, context, ending):
    """ln P(ending | context): one forward, one row, no padding, no padded ids."""
    logits, _ = model(torch.tensor([[*context, *ending[:-1]]]))
    log_p = F.log_softmax(logits[0, :, :model.config.vocab_size].double(), dim=-1)
    return sum(log_p[len(context) + i - 1, token].item() for i, token in enumerate(ending))


def random_pairs(n, longest=20, vocab_size=300):
    """Contexts of 1 to `longest` tokens with endings of 1 to 5."""
    random = np.random.RandomState(0)
    pairs = []
    for i in range(n):
        context = random.randint(0, vocab_size, 1 + i % longest)
        ending = random.randint(0, vocab_size, random.randint(1, 6))
        pairs.append((tuple(context), tuple(ending)))
    return pairs


def test_choices_equal_one_at_a_time(model, monkeypatch):
    """Catches: padding that changes a score, an ending scored a token early or late, scores in
    another order than the pairs."""
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 100)
    pairs = random_pairs(100)
    plain = torch.tensor([one_at_a_time(model, *pair) for pair in pairs])
    found = evaluate.log_likelihoods(model, pairs, FP32)
    assert (found - plain).abs().max() < 1e-4
    # control: without the first token of the context
    shorter = [(context[1:] or context, ending) for context, ending in pairs]
    found = evaluate.log_likelihoods(model, shorter, FP32)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("score", [
    lambda model: evaluate.evaluate(model, random_windows(16), TOKENIZER, 10_000, FP32),
    lambda model: evaluate.log_likelihoods(model, random_pairs(50), FP32),
], ids=["text", "choices"])
def test_shares_of_two_processes_add_up(model, monkeypatch, score):
    """Catches: a window or a question that both processes score, or neither."""
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 50)

    def scored_by(rank, world):
        rows = []
        monkeypatch.setattr(evaluate, "processes", lambda: (rank, world))
        monkeypatch.setattr(evaluate, "complete_rows", lambda row, device: rows.append(row) or row)
        score(model)
        return rows[0]

    whole = scored_by(0, 1)
    first = scored_by(0, 2)
    second = scored_by(1, 2)
    assert torch.equal(first + second, whole)
    assert not torch.equal(first, whole)  # control: a share is not all
    assert not torch.equal(second, whole)


WORDS = ["a", "be", "the end", "1 2 3 4 5 6", "internationally", "it is what it was"]


def question(random):
    def words(n):
        return " ".join(random.choice(WORDS, n))

    return {"ctx": words(4), "activity_label": words(1), "ctx_a": words(2), "ctx_b": words(1),
            "endings": [words(1), words(2), words(1), words(2)], "label": int(random.randint(4))}


def words_of(item, style):
    """Context and endings of a question, and the length that acc_norm divides by."""
    endings = [TOKENIZER.encode(f" {ending}") for ending in item["endings"]]
    if style == "token":
        return item["ctx"], endings, [len(ids) for ids in endings]
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return context, endings, [len(ending) for ending in item["endings"]]


@pytest.mark.parametrize("style", ["token", "harness"])
def test_accuracies_equal_a_plain_loop(model, tmp_path, style):
    """Catches: acc_norm by the length of something else, acc_pmi that adds what it should
    subtract, another standard error."""
    window = 48
    random = np.random.RandomState(1)
    items = [question(random) for _ in range(60)]
    norms = []
    right = {"": [], "_norm": [], "_pmi": []}
    for item in items:
        context, endings, lengths = words_of(item, style)
        room = window + 1 - max(len(ids) for ids in endings)
        context = TOKENIZER.encode(context)[-room:]
        found = np.array([one_at_a_time(model, context, ids) for ids in endings])
        alone = np.array([one_at_a_time(model, [TOKENIZER.eot], ids) for ids in endings])
        norms.append(lengths)
        right[""].append(found.argmax() == item["label"])
        right["_norm"].append((found / lengths).argmax() == item["label"])
        right["_pmi"].append((found - alone).argmax() == item["label"])

    write_lines(tmp_path / "b.jsonl", items)
    benchmark = Benchmark(tmp_path / "b.jsonl", TOKENIZER, window, style)
    assert benchmark.norms.tolist() == norms
    scores = benchmark.score(model, FP32)
    for name, column in right.items():
        stderr = np.std(column, ddof=1) / math.sqrt(60)
        assert scores[f"acc{name}"] == pytest.approx(np.mean(column))
        assert scores[f"stderr{name}"] == pytest.approx(stderr)
    assert scores["n"] == 60
    assert scores["n_choices"] == 4
    assert scores["style"] == style
    assert len({scores["acc"], scores["acc_norm"], scores["acc_pmi"]}) == 3  # control


def test_repeated_pairs_are_scored_once(model, data, monkeypatch):
    """Catches: endings after end-of-text alone, the same for many questions, scored for each."""
    scored = []
    benchmark = Benchmark(data / "cloze.jsonl", TOKENIZER, 48)
    original = evaluate.log_likelihoods

    def count(model, pairs, *args):
        scored.extend(pairs)
        return original(model, pairs, *args)

    monkeypatch.setattr(evaluate, "log_likelihoods", count)
    benchmark.score(model, FP32)
    assert len(scored) == len(set(scored)) == 6 * 4 + 4  # 6 contexts and none, 4 endings


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
    longest = max(len(TOKENIZER.encode(f" {ending}")) for ending in item["endings"])
    for window, kept in [(longest, 1), (longest + 3, 4), (100, len(ids))]:
        benchmark = Benchmark(tmp_path / "b.jsonl", TOKENIZER, window, items=2)
        assert benchmark.contexts == 2 * [ids[-kept:]]
    with pytest.raises(UserError, match=f"b.jsonl, line 1: an ending of {longest} tokens"):
        Benchmark(tmp_path / "b.jsonl", TOKENIZER, longest - 1)


@pytest.mark.parametrize("line", [
    '{', '[1]', '"text"', "[" * 100_000, "\udcff",
    '{"ctx": "a", "endings": ["b", "c"]}',
    '{"ctx": "a", "endings": ["b", "c"], "label": 2}',
    '{"ctx": "a", "endings": ["b", "c"], "label": -1}',
    '{"ctx": "a", "endings": ["b", "c"], "label": 0.7}',
    '{"ctx": "a", "endings": ["b", "c"], "label": Infinity}',
    '{"ctx": "a", "endings": ["b"], "label": 0}',
    '{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}',
    '{"ctx": "a", "endings": ["b", ""], "label": 0}',
    '{"ctx": "a", "endings": ["b", 3], "label": 0}',
    '{"ctx": "a", "endings": "bc", "label": 0}',
    '{"ctx": " ", "endings": ["b", "c"], "label": 0}',
    '{"ctx": 3, "endings": ["b", "c"], "label": 0}',
    '{"ctx": "a", "endings": ["b", "%s"], "label": 0}' % ("long" * 20)])
def test_a_broken_question_is_refused(tmp_path, line):
    """Catches: a traceback, or a score from a question that has no right answer."""
    file = tmp_path / "b.jsonl"
    good = '{"ctx": "a", "endings": ["b", "c"], "label": 0}'
    file.write_text(f"{good}\n{line}\n", errors="surrogateescape")
    with pytest.raises(UserError, match="b.jsonl, line 2: .*remove"):
        Benchmark(file, TOKENIZER, 48)
    file.write_text(f"{good}\n\n")
    assert len(Benchmark(file, TOKENIZER, 48).labels) == 1  # control


def test_a_file_has_questions_with_a_choice(tmp_path):
    """Catches: accuracies of no question, or of one ending."""
    file = tmp_path / "b.jsonl"
    file.write_text("")
    with pytest.raises(UserError, match="b.jsonl: no questions"):
        Benchmark(file, TOKENIZER, 48)
    write_lines(file, [{"ctx": "a", "endings": ["b"], "label": 0}])
    with pytest.raises(UserError, match="b.jsonl, line 1: "):
        Benchmark(file, TOKENIZER, 48)


@pytest.mark.slow
def test_batches_are_faster_than_one_at_a_time():
    """Catches: multiple choice that costs as much as without batches. Prints what it costs."""
    torch.manual_seed(0)
    model = Llama(PRESETS["tiny"]).eval()
    pairs = random_pairs(800, longest=100, vocab_size=4096)  # 200 questions of 4 endings

    def in_batches():
        evaluate.log_likelihoods(model, pairs, FP32)

    def one_by_one():
        for context, ending in pairs[:160]:
            one_at_a_time(model, context, ending)

    speeds = []
    with torch.no_grad():
        for name, score, questions in (("batches", in_batches, 200), ("one", one_by_one, 40)):
            score()
            start = time.perf_counter()
            score()
            seconds = (time.perf_counter() - start) / questions
            speeds.append(1 / seconds)
            print(f"{name}: {1 / seconds:.0f} questions/s, {1000 * seconds:.2f} ms a question")
    assert speeds[0] > speeds[1]  # 1.4 to 1.9 times as fast on one busy core


# ---- samples and the command

def test_text_statistics_by_hand():
    """Catches: n-grams of another n, or an error from a text shorter than that."""
    assert evaluate.text_statistics([1, 2, 3, 4]) == {"distinct_2": 1.0, "repetition": 0.0}
    assert evaluate.text_statistics([1, 2] * 4) == {"distinct_2": 2 / 7, "repetition": 3 / 5}
    assert evaluate.text_statistics([7]) == {"distinct_2": 1.0, "repetition": 0.0}


def test_sample_depends_on_weights_and_seed_alone(model):
    """Catches: samples of two steps that differ by luck."""
    samples = [evaluate.continue_prompt(model, TOKENIZER, "a", FP32, seed=n) for n in (0, 0, 1)]
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]  # control


@pytest.fixture
def copied(whole, tmp_path, monkeypatch):
    """A copy of the run, in the folder where scripts look for the newest one."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(whole, Path("runs/whole"))


def events(run):
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_command_repeats_the_scores_of_the_training(copied, capsys):
    """Catches: another step, window or text than asked for; scores that are only printed."""
    assert not evaluate.main(["--step", "8", "--eval_tokens", "256"])
    assert "step 8" in capsys.readouterr().out
    text, choice = events(copied)
    losses = {row[0]: row[1] for row in evals(copied)}
    assert text["val_loss"] == pytest.approx(losses[8], rel=1e-5)
    assert text["val_loss"] != pytest.approx(losses[16], rel=1e-5)  # control
    assert text["event"] == "eval"
    assert choice["event"] == "benchmark"
    assert choice["step"] == 8


def test_only_the_first_questions_on_request(copied):
    """Catches: a --benchmark_items that is ignored."""
    assert not evaluate.main(["--eval_tokens", "256", "--benchmark_items", "4"])
    assert not evaluate.main(["--eval_tokens", "256"])
    assert [event["n"] for event in events(copied)[1::2]] == [4, 6]


def test_dtype_of_a_score_is_noted(copied):
    """Catches: a score in bf16 that is taken for one in fp32, or a --dtype that is noted and not
    used."""
    for dtype in ("fp32", "bf16"):
        assert not evaluate.main(["--eval_tokens", "256", "--dtype", dtype])
    assert not evaluate.main(["--eval_tokens", "256"])
    noted = events(copied)
    assert [event["dtype"] for event in noted] == ["fp32"] * 2 + ["bf16"] * 2 + ["fp32"] * 2
    fp32, bf16, without = [event["val_loss"] for event in noted[::2]]
    assert bf16 == pytest.approx(fp32, rel=0.02)
    assert bf16 != fp32  # control
    assert without == fp32


def prepare_again(folder):
    """Other text in the folder that a run was trained on, as prepare_data.py would leave it."""
    meta = json.loads((folder / "meta.json").read_text())
    shard = meta["splits"]["train"][0]
    np.save(folder / shard["file"], np.arange(shard["tokens"], dtype=np.uint16) % 299)
    digest = hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta).replace(shard["sha256"], digest))


@pytest.fixture
def own_data(copied, data, monkeypatch):
    """A copy of the data, which the settings of the copied run name."""
    folder = shutil.copytree(data, "own_data")
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**settings, "data": "own_data"}))
    return Path(folder)


@pytest.mark.row(44)
def test_data_of_another_preparation_is_refused(copied, own_data, capsys):
    """Catches: a score, noted in the run's log, on text that the run was trained on."""
    assert not evaluate.main([])  # control
    assert [event.get("same_data") for event in events(copied)] == [True, None]
    prepare_again(own_data)
    assert exit_code(evaluate.main, []) == 2
    message = messages(capsys)[-1]
    assert "own_data is not the data of this run (changed: train_0000.npy)" in message
    assert len(events(copied)) == 2
    assert not evaluate.main(["--data", "own_data"])  # on request
    assert "note: own_data is not the data that" in capsys.readouterr().out
    assert [event.get("same_data") for event in events(copied)] == [True, None, False, None]


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
def test_score_of_a_run_that_was_started_over_is_not_noted(copied, data, capsys, monkeypatch,
                                                           reader, flags):
    """Catches: a score of the old weights in the log of the new run."""
    module = sys.modules[reader.__module__]
    note = module.note

    def started_over(*args):
        assert run(data, copied, "--overwrite", "--stop_at", 1) == 75
        return note(*args)

    monkeypatch.setattr(module, "note", started_over)
    assert exit_code(reader, flags) == 2
    assert "was started over in the meantime" in messages(capsys)[-1]
    assert (copied / "evaluations.jsonl").read_bytes() == b""
    monkeypatch.setattr(module, "note", note)
    assert not reader(flags)  # control
    assert len(events(copied)) >= 2


@pytest.mark.row(55)
def test_half_a_row_is_not_joined_to_the_next(copied):
    """Catches: a row that a full disk cut, and the next one lost with it."""
    (copied / "evaluations.jsonl").write_text('{"event": "ev')
    assert not evaluate.main([])
    lines = (copied / "evaluations.jsonl").read_text().splitlines()
    assert lines[0] == '{"event": "ev'
    assert [json.loads(line)["event"] for line in lines[1:]] == ["eval", "benchmark"]


@pytest.mark.row(45)
def test_a_style_without_questions_is_refused(copied, own_data, capsys):
    """Catches: a flag that does nothing."""
    (own_data / "cloze.jsonl").unlink()
    flags = ["--data", "own_data"]
    assert exit_code(evaluate.main, [*flags, "--style", "harness"]) == 2
    assert "--style is for questions" in messages(capsys)[-1]
    assert not evaluate.main(flags)  # control


@pytest.mark.row(44)
@pytest.mark.parametrize("change", ["fewer", "gone", "link to nowhere"])
def test_other_questions_are_refused(copied, own_data, data, capsys, change):
    """Catches: scores on other questions, under the same name, in the log of a run, or none any
    more."""
    file = own_data / "cloze.jsonl"
    flags = ("--resume", "--max_steps", 21)
    assert run(own_data, copied, *flags) == 0  # control
    lines = file.read_text().splitlines(True)
    file.unlink()
    if change == "fewer":
        file.write_text("".join(lines[:3]))
    if change == "link to nowhere":
        file.symlink_to("nowhere")
    assert exit_code(evaluate.main, []) == 2
    assert "cloze.jsonl" in messages(capsys)[-1]
    assert run(own_data, copied, "--resume", "--max_steps", 22) == 2
    assert "cloze.jsonl" in messages(capsys)[-1]


@pytest.mark.row(53)
def test_model_that_gives_no_numbers_is_not_scored(copied, capsys):
    """Catches: accuracies of a choice among NaN, which look like chance."""
    weights, _ = load_weights(copied)
    weights["model"]["model.norm.weight"][0] = math.nan
    folder = copied / "checkpoints/step_00000020"
    recorded = durable.write_file(folder / "model.pt", weights)
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"]["model.pt"] = recorded
    (folder / "meta.json").write_text(json.dumps(meta))
    assert exit_code(evaluate.main, []) == 3
    assert "logits are NaN or infinite" in messages(capsys)[-1]
    assert not evaluate.main(["--step", "16"])  # control
    assert [event["step"] for event in events(copied)] == [16, 16]


@pytest.mark.row(46)
def test_several_processes_are_refused(copied, capsys, monkeypatch):
    """Catches: torchrun, with which each process scores everything and notes it."""
    for name, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR="h",
                            MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    for main in (evaluate.main, sample.main):
        assert exit_code(main, []) == 2
        assert "runs in one process" in messages(capsys)[-1]


def test_command_ends_in_one_line(copied, data, capsys):
    """Catches: a traceback from a wrong flag or file; a damaged checkpoint that is scored."""
    other = shutil.copytree(data, Path("other"))
    meta = (other / "meta.json").read_text()
    (other / "meta.json").write_text(meta.replace("300", "301").replace("299", "300"))
    (copied / "checkpoints/step_00000020/model.pt").write_bytes(b"?")
    for flags, message in [(["--step", 7], "no checkpoint of step 7"),
                           (["--step", 20], "no usable checkpoint (step 20: model.pt has 1 bytes"),
                           (["--seq_len", 65], "more than the model's max_seq_len 64"),
                           (["--benchmark", "absent.jsonl"], "absent.jsonl: No such file"),
                           (["--data", other], "other has a vocabulary of 301")]:
        assert exit_code(evaluate.main, flags) == 2
        assert message in messages(capsys)[-1]
    assert not evaluate.main([])  # control
    assert events(copied)[0]["step"] == 16  # the newest undamaged one
