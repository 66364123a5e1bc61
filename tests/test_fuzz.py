"""Readers on mutated input: each accepts it and is right, or refuses it in one line.

Every trial mutates a valid input at random places, with a fixed seed. What a test cannot ask for:
a change from one plausible value to another, of which nothing else in the input tells. It is named
where it is left out.
"""
import copy
import functools
import gzip
import json
import math
import random
import re
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import evaluate
import plot_dynamics
import sft
from conftest import INSTRUCTIONS, QUESTIONS, exit_code, rows, run, write_lines
from data import DataFolder, Tokenizer, open_shard
from corpus import foreign_shards, textfiles
from support import chat, durable, lora, runs, trees
from support.files import write_json
from support.runs import UserError

pytestmark = pytest.mark.slow

DRAW_PAGE = plot_dynamics.main  # the fixture `preset` takes it away

# -------------------------------------------------------------------------------------------------
# Mutations

VALUES = [None, True, False, -1, 0, 1, 2, 10**12, 10**30, 10**4000, -1.0, -0.0, 0.5, 1.5, 1e308,
          math.nan, math.inf, "", " ", "0", "a", "a\nb", "\0", "\ud800", "..", "../x", "/",
          "é" * 300, [], [[]], [None, "a"], {}, {"": None}, {"a": {"a": []}}]


def nested(depth):
    """Lists in lists, as what `to_json` writes them from: json.dumps cannot."""
    return f"nested {depth}"


def to_json(tree):
    text = json.dumps(tree)
    return re.sub(r'"nested (\d+)"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), text)


def places(tree):
    """(container, key) of every node below the root."""
    found = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        items = []
    for key, value in items:
        found.append((tree, key))
        found += places(value)
    return found


def mutate_tree(tree, draw, values=VALUES):
    """A copy of nested dicts and lists in which one or two nodes are others."""
    root = [copy.deepcopy(tree)]
    for _ in range(draw.choice([1, 1, 2])):
        every = places(root)
        container, key = draw.choice(every)
        kind = draw.choice(["value", "value", "node", "delete", "more"])
        if kind == "value":
            container[key] = copy.deepcopy(draw.choice(values))
        elif kind == "node":
            other, place = draw.choice(every)
            container[key] = copy.deepcopy(other[place])
        elif container is root:
            continue
        elif kind == "delete":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[draw.choice(["", "a\nb", "more"])] = copy.deepcopy(draw.choice(values))
    return root[0]


JSON_VALUES = [*VALUES, *map(nested, (300, 880, 910, 940, 960, 970, 980, 100_000))]


def mutate_json(tree, draw):
    """Bytes of JSON in which a node, or now and then a byte, is another."""
    if draw.random() < 0.15:
        return mutate_bytes(to_json(tree).encode(), draw)
    return to_json(mutate_tree(tree, draw, JSON_VALUES)).encode()


def mutate_bytes(content, draw, end=None):
    """A copy of bytes in which one to three places before `end` are others, or that is cut."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 3])):
        at = draw.randrange(min(end or len(content), len(content)) or 1)
        kind = draw.choice(["flip", "flip", "set", "cut", "insert", "delete"])
        if kind == "flip":
            content[at:at + 1] = bytes(byte ^ 1 << draw.randrange(8) for byte in content[at:at + 1])
        elif kind == "set":
            content[at:at + 1] = bytes([draw.choice([0, 10, 34, 48, 57, 123, 128, 255])])
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw.randbytes(draw.choice([1, 2, 64]))
        else:
            del content[at:at + draw.choice([1, 2, 64])]
    return bytes(content)


# -------------------------------------------------------------------------------------------------
# The promise

class Hangs(BaseException):
    """Raised in a reader that takes too long."""


def refusal(error):
    """The message of an error that ends a script in one line; None of another error."""
    code, message = runs.explain(error)
    if code is None or len(str(message).splitlines()) != 1:
        return None
    return message


def draws(n):
    """The sources of random numbers of n trials."""
    return [random.Random(seed) for seed in range(n)]


def hold(cases, trial, refused_share=0.2):
    """Call trial(case) for each case: it mutates, reads, and returns whether what was read is
    right. Fails with every kind of broken promise, and the first case of each."""
    refused = 0
    broken = {}
    counts = Counter()
    for number, case in enumerate(cases):
        signal.setitimer(signal.ITIMER_REAL, 5)  # for a reader that hangs
        kind = None
        try:
            if not trial(case):
                kind = "accepted, and wrong"
        except (Exception, Hangs) as error:
            if refusal(error) is not None:
                refused += 1
            else:
                kind = describe(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if kind is not None:
            label = case if isinstance(case, tuple) else ""
            broken.setdefault(kind[:70], f"case {number} {label}: {kind}")
            counts[kind[:70]] += 1
    assert not broken, "\n".join(f"{counts[kind]} x {first}" for kind, first in broken.items())
    assert refused_share * len(cases) <= refused < len(cases)
    return True


def describe(error):
    where = traceback.extract_tb(error.__traceback__)[-1]
    return (f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno} {where.name}: "
            f"{str(error)[:300]!r}")


@pytest.fixture(autouse=True)
def alarm():
    def stop(number, frame):
        raise Hangs
    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.signal(signal.SIGALRM, before)


# -------------------------------------------------------------------------------------------------
# Data

def open_data(folder):
    """{split: {file: its tokens}} of a folder that is checked as a new run checks it."""
    data = DataFolder(folder)
    data.check_content()
    data.fingerprint
    return {split: {shard.path.name: shard.tokens.tobytes() for shard in getattr(data, split)}
            for split in ("train", "val")}, data.vocab_size


@pytest.mark.row(54, 55)
def test_data_folder_with_a_mutated_meta_json_is_refused_or_right(data, tmp_path):
    """Catches: a meta.json that ends in a traceback, or that lets other tokens in."""
    folder = shutil.copytree(data, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text())
    expected, vocab_size = open_data(folder)  # control
    assert [len(expected[split]) for split in expected] == [2, 1]
    every = {**expected["train"], **expected["val"]}

    def trial(draw):
        (folder / "meta.json").write_bytes(mutate_json(meta, draw))
        found, size = open_data(folder)
        train, val = found["train"], found["val"]
        apart = train and val and not set(train) & set(val)
        return apart and (train | val).items() <= every.items() and size == vocab_size
    assert hold(draws(2500), trial)


HEADERS = {"train_0.npy": 128, "fineweb_train_0.bin": foreign_shards.LLMC_HEADER}


@pytest.mark.row(54, 55)
@pytest.mark.parametrize("name", HEADERS)
def test_shard_with_a_mutated_header_is_refused_or_right(tmp_path, name):
    """Catches: a header that ends in a traceback, or that shifts or cuts the tokens."""
    file = tmp_path / name
    ids = np.arange(20_000, dtype=np.uint16)
    if file.suffix == ".npy":
        np.save(file, ids)
    else:
        header = np.zeros(256, dtype="<i4")
        header[:3] = [foreign_shards.LLMC_MAGIC, foreign_shards.LLMC_VERSION, len(ids)]
        file.write_bytes(header.tobytes() + ids.tobytes())
    content = file.read_bytes()
    assert len(content) == HEADERS[name] + ids.nbytes

    def read():
        """The tokens as the door finds them, and as a data folder then reads them."""
        found = foreign_shards.open_foreign(file)
        return open_shard(file, len(found.tokens), found.offset).tokens
    assert np.array_equal(read(), ids)  # control

    def trial(draw):
        end = draw.choice([12, HEADERS[name], None])
        mutated = mutate_bytes(content, draw, end)
        file.unlink()  # the old one is mapped
        file.write_bytes(mutated)
        # Ids that are others: only the hash in meta.json tells.
        return read().tobytes() == mutated[HEADERS[name]:]
    assert hold(draws(4000), trial)


# -------------------------------------------------------------------------------------------------
# Checkpoints

NAMES = ["step_15", "step_000000015", "step_0000001５", "step_00000015 ", ".tmp_step_00000015",
         "step_+0000015", "step_0000_015", "step_00000015\n", "step_00000016", "step_99999999"]


@pytest.mark.row(7, 55)
def test_checkpoint_with_a_mutated_meta_json_is_passed_over(tmp_path):
    """Catches: damage that ends a run which has an older good state; a prune that removes the last
    good one."""
    def contents(step):
        weights = {"config": {}, "model": {"w": torch.full((2,), float(step))}}
        return {"model.pt": weights, "train_state.pt": {"step": step}}

    original = tmp_path / "original"
    for step in (8, 10, 15):
        durable.write_checkpoint(original, step, contents(step))
    assert durable.find(original, full=True).name == "step_00000015"  # control
    passed_over = []

    def trial(draw):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        step = draw.choice([10, 15, 15])
        place = folder / f"checkpoints/step_{step:08d}"
        if draw.random() < 0.1:
            place.rename(place.with_name(draw.choice(NAMES)))
        else:
            meta = json.loads((place / "meta.json").read_text())
            (place / "meta.json").write_bytes(mutate_json(meta, draw))
        found = durable.find(folder, full=True)
        number = durable.step_of(found)
        passed_over.append(number < 15)
        weights = durable.load_file(found / "model.pt")["model"]["w"]
        good = weights.tolist() == [float(number)] * 2 and number in (8, 10, 15)
        durable.prune(folder, number, 1, draw.choice([0, 5]))
        return good and durable.find(folder, full=True) == found
    assert hold(draws(1200), trial, refused_share=0)
    assert sum(passed_over) > 300


# What nothing else in a state tells, so that the changed run is a run like any other:
#   another finite value of a weight, a moment or the generator (or two of one shape swapped);
#   another value of a setting that its flag can have (lr, seed …), and of norm_eps and rope_theta;
#   a setting or a size that is missing: its default is used, and a line says so;
#   seconds, env.
STATE_VALUES = [value for value in VALUES if value != 10**4000]  # torch.save takes minutes for it
STATE_VALUES += [torch.zeros(()), torch.ones(3), torch.ones(2, dtype=torch.int64), (1, 2), b"a"]


def plausible(tree, mutated, path=()):
    """Whether a mutated state differs from its original only by what nothing else tells."""
    if path[:1] in (("env",), ("seconds",)):
        return True
    if isinstance(tree, torch.Tensor):
        return trees.forms(tree) == trees.forms(mutated)
    if isinstance(tree, dict) and isinstance(mutated, dict):
        same_keys = tree.keys() == mutated.keys()
        if path == ("config",):
            same_keys = tree.keys() >= mutated.keys()
        return same_keys and all(plausible(tree[key], mutated[key], (*path, key))
                                 for key in mutated)
    if path[:1] == ("config",):  # a flag without a value can have one; 1 is 1.0 in a ModelConfig
        is_number = type(tree) is float and type(mutated) is int
        return type(tree) is type(mutated) or tree is None or mutated is None or is_number
    return type(tree) is type(mutated) and tree == mutated


@pytest.fixture
def states(data, tmp_path, capsys):
    """The files of a state of step 3, by name, and a trial: resume from them when one is other."""
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside of pytest
    original = tmp_path / "original"
    assert run(data, original, "--stop_at", 3) == 75
    place = "checkpoints/step_00000003"
    contents = {name: durable.load_file(original / place / name)
                for name in ("model.pt", "train_state.pt")}

    def resume(name, mutated):
        """Step 4 of the run, from the state with the right hashes: losses, numbers, tensors."""
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        files = {each: durable.write_file(folder / place / each, obj)
                 for each, obj in {**contents, name: mutated}.items()}
        write_json(folder / place / "meta.json", {"step": 3, "files": files})
        code = run(data, folder, "--resume", "--stop_at", 4, base=["--threads", 1, "--no-compile"])
        message = capsys.readouterr().err.strip()
        if code in (2, 3):
            raise UserError(message, code)
        assert code == 75
        state = checkpoint.load(folder / "checkpoints/step_00000004")
        tensors = trees.named_tensors(state)
        return (rows(folder), [state[name] for name in ("step", "tokens", "updates")],
                {name: tensor.tolist() for name, tensor in tensors.items()})
    expected = resume("model.pt", contents["model.pt"])  # control

    def trial(name, mutated):
        return resume(name, mutated) == expected or plausible(contents[name], mutated)
    return contents, trial


@pytest.mark.row(53)
def test_resume_from_a_mutated_state_is_refused_or_right(states):
    """Catches: a state with the right hash and other content that ends in a traceback, or from
    which another run goes on."""
    contents, resumed_trial = states

    def trial(draw):
        name = draw.choice(list(contents))
        whole = contents[name]
        mutated = mutate_tree(whole, draw, STATE_VALUES)
        if draw.random() < 0.8:  # most nodes are moments: so each part gets its share
            part = draw.choice(list(whole))
            changed = mutate_tree({part: whole[part]}, draw, STATE_VALUES)
            mutated = {key: value for key, value in whole.items() if key != part}
            mutated.update(changed if isinstance(changed, dict) else {part: changed})
        return resumed_trial(name, mutated)
    assert hold(draws(430), trial)


@pytest.mark.row(53)
def test_resume_with_another_number_is_refused_or_right(states):
    """Catches: a number of the state that is too large, too small or that contradicts others."""
    contents, resumed_trial = states
    cases = []
    for name, whole in contents.items():
        for part, value in {**whole, **whole["config"]}.items():
            if isinstance(value, int):
                cases += [(name, part, other) for other in (0, 1, 10**30)]

    def trial(case):
        name, part, other = case
        mutated = copy.deepcopy(contents[name])
        container = mutated if part in mutated else mutated["config"]
        container[part] = other
        return resumed_trial(name, mutated)
    assert hold(cases, trial)


# -------------------------------------------------------------------------------------------------
# Logs

def mutate_log(lines, draw, number):
    """Lines of which `number` are mutated, and the others."""
    chosen = set(draw.sample(range(len(lines)), number))
    mutated = [mutate_json(json.loads(line), draw) if place in chosen else line
               for place, line in enumerate(lines)]
    return mutated, [json.loads(line) for place, line in enumerate(lines) if place not in chosen]


@pytest.fixture(scope="session")
def lines(whole):
    """A log with an event of each kind."""
    found = (whole / "metrics.jsonl").read_bytes().splitlines()
    resumed = {**json.loads(found[0]), "event": "resume", "step": 8, "restored_optimizer": False}
    resumed["env"] = {**resumed["env"], "device": "other"}
    tuning = {"event": "sft_eval", "step": 8, "heldout_loss": 2.5, "token_acc": 0.5, "ended": 0.5,
              "seconds": 1.0}
    sample = {"event": "sample", "step": 8, "prompt": "a?", "text": "b", "cut": True,
              "distinct_2": 0.5, "repetition": 0.5, "temperature": 0.8, "top_k": None}
    asked = {"event": "instructions", "step": 0, "frequent_answer": "b", "frequent_share": 0.5,
             "questions": [{"question": "a?", "answer": "b"}]}
    found += [json.dumps(row).encode() for row in (resumed, sample, asked)]
    return found, json.dumps(tuning).encode()


@pytest.mark.row(30, 55)
def test_log_to_resume_that_was_mutated_is_refused_or_cut(whole, tmp_path):
    """Catches: a resume behind a log that is shorter, or that ends in half a line. What was changed
    within the log nothing tells."""
    content = (whole / "metrics.jsonl").read_bytes()
    last = len(content.splitlines()[-1]) + 1  # bytes
    file = tmp_path / "metrics.jsonl"

    def trial(draw):
        mutated = content
        length = len(content)
        if draw.random() < 0.2:
            length = draw.choice([0, 1, last, length - 1, length + 1, 10**30])
        elif draw.random() < 0.5:
            mutated = content[:-last] + mutate_json(json.loads(content[-last:]), draw) + b"\n"
            length = len(mutated)
        else:
            mutated = mutate_bytes(content, draw)
        file.write_bytes(mutated)
        log = runs.Log(tmp_path, length, 20)
        log.file.close()
        kept = file.read_bytes()
        return kept == mutated[:length] and kept.endswith(b"\n")
    file.write_bytes(content)
    runs.Log(tmp_path, len(content), 20).file.close()  # control
    assert hold(draws(2500), trial)


@pytest.mark.row(55)
def test_last_line_that_was_mutated_is_not_the_end_of_a_run(tmp_path):
    """Catches: a traceback, or a run that is taken for finished and is not."""
    end = {"event": "end", "step": 20, "reason": "done", "seconds": 1.0}
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(end) + "\n")
    assert runs.is_finished(tmp_path, {"step": 20}, last=20)  # control
    finished = []

    def trial(draw):
        file.write_bytes(b'{"event": "train"}\n' + mutate_json(end, draw))
        finished.append(runs.is_finished(tmp_path, {"step": 20}, last=20))
        text = file.read_text(errors="replace")
        return not finished[-1] or ('"end"' in text and '"done"' in text)
    assert hold(draws(2000), trial, refused_share=0)
    assert 400 < sum(finished) < 1600


@pytest.mark.row(55)
@pytest.mark.parametrize("tuned", [False, True])
def test_mutated_log_is_read_without_the_broken_lines(lines, tmp_path, capsys, tuned):
    """Catches: a wrong type in a row that ends in a traceback, or that takes other rows with it."""
    pretrained, tuning = lines
    log = [*pretrained, tuning] if tuned else pretrained
    file = tmp_path / "metrics.jsonl"
    again = []  # a last step that is smaller than those before is a run that began again

    def trial(draw):
        mutated, kept = mutate_log(log, draw, draw.choice([1, 3, len(log) // 2]))
        file.write_bytes(b"\n".join(mutated))
        found = plot_dynamics.read_run(file)
        plot_dynamics.summary(found)
        plot_dynamics.trajectory([found])
        for step, _, text in found.marks:
            plot_dynamics.speed_change(found, step, text)
        events = plot_dynamics.read_events(file)
        again.append(len(plot_dynamics.cut_back(events, file)) < len(events))
        known = {event["step"] for event in kept if event["event"] == "train"}
        return again[-1] or known <= {row["step"] for row in found.rows["train"]}
    file.write_bytes(b"\n".join(log))
    assert plot_dynamics.read_run(file).steps[-1] == 20  # control
    assert hold(draws(1000), trial, refused_share=0)
    assert sum(again) < 60


@pytest.mark.row(55)
@pytest.mark.parametrize("tuned", [False, True])
def test_mutated_log_is_drawn(lines, tmp_path, monkeypatch, capsys, tuned):
    """Catches: a number or a text that the figure cannot show."""
    pretrained, tuning = lines
    log = [*pretrained, tuning] if tuned else pretrained
    file = tmp_path / "metrics.jsonl"

    def trial(draw):
        mutated, _ = mutate_log(log, draw, len(log) // 2)
        file.write_bytes(b"\n".join(mutated))
        other = tmp_path / "other.jsonl"
        other.write_bytes(b"\n".join(log))
        argv = [str(file), *[str(other)] * draw.choice([0, 1]), "--out", str(tmp_path / "out")]
        assert DRAW_PAGE(argv) == 0
        return (tmp_path / "out/dynamics.png").stat().st_size > 1000
    assert hold(draws(4), trial, refused_share=0)


# -------------------------------------------------------------------------------------------------
# Settings

@pytest.mark.row(38, 55)
def test_readers_of_a_mutated_config_json_refuse_it_or_are_right(whole, tmp_path, capsys):
    """Catches: a setting of another type that ends in a traceback of evaluate.py or sft.py. Another
    plausible seq_len, preset or benchmark nothing else tells."""
    folder = shutil.copytree(whole, tmp_path / "r")
    settings = json.loads((folder / "config.json").read_text())
    tuning = functools.partial(sft.read_settings, [str(folder), "--lora", "4"])
    expected = vars(tuning())  # control
    read = [name for name in runs.READ_BY_OTHERS if name in settings] + ["fingerprint"]

    def trial(draw):
        mutated = copy.deepcopy(settings)
        for name in draw.sample(read, draw.choice([1, 2])):
            part = mutate_tree({name: settings[name]}, draw, JSON_VALUES)
            mutated.pop(name)
            mutated.update(part if isinstance(part, dict) else {name: part})
        (folder / "config.json").write_text(to_json(mutated))
        found = vars(tuning())
        evaluate.open_benchmark(SimpleNamespace(**found), Tokenizer(300))
        return all(found[name] == expected[name] for name in expected if name not in read
                   and name not in ("lr", "min_lr", "epochs"))
    assert hold(draws(1500), trial)


@pytest.mark.row(44, 55)
def test_evaluate_with_a_mutated_config_json_is_refused_or_right(whole, tmp_path, capsys):
    """Catches: as the test before, in evaluate.py."""
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside of pytest
    folder = shutil.copytree(whole, tmp_path / "r")
    settings = json.loads((folder / "config.json").read_text())

    def score():
        (folder / "evaluations.jsonl").unlink(missing_ok=True)
        code = exit_code(evaluate.main, [folder, "--device", "cpu", "--eval_tokens", 64])
        message = capsys.readouterr().err.strip().split("\r")[-1].strip()
        if code is not None:
            raise UserError(message, code)
        lines = (folder / "evaluations.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]
    expected = score()[0]["val_loss"]  # control

    def trial(draw):
        name = draw.choice(["data", "seq_len", "fingerprint", "preset"])
        mutated = {**settings, name: mutate_tree(settings[name], draw, JSON_VALUES)}
        (folder / "config.json").write_text(to_json(mutated))
        row = score()[0]
        return row["val_loss"] == expected or row["seq_len"] != settings["seq_len"]
    assert hold(draws(200), trial)


# -------------------------------------------------------------------------------------------------
# Text, questions, instructions, the base of a LoRA run

@pytest.mark.row(55)
def test_mutated_questions_are_refused_or_right(tmp_path):
    """Catches: a question that ends in a traceback, or that changes others."""
    tokenizer = Tokenizer(300)
    file = tmp_path / "questions.jsonl"
    write_lines(file, QUESTIONS)
    valid = {style: evaluate.Benchmark(file, tokenizer, 64, style)
             for style in ("token", "harness")}

    def trial(draw):
        at = draw.randrange(len(QUESTIONS))
        lines = [json.dumps(question).encode() for question in QUESTIONS]
        lines[at] = mutate_json(QUESTIONS[at], draw).replace(b"\n", b" ")
        file.write_bytes(b"\n".join(lines))
        style = draw.choice(list(valid))
        found = evaluate.Benchmark(file, tokenizer, 64, style)
        if len(found.contexts) != len(QUESTIONS):
            return not lines[at].strip()
        others = [n for n in range(len(QUESTIONS)) if n != at]
        return all(found.contexts[n] == valid[style].contexts[n]
                   and found.endings[n] == valid[style].endings[n]
                   and found.labels[n] == valid[style].labels[n] for n in others)
    assert hold(draws(2500), trial)


@pytest.mark.row(27, 55)
@pytest.mark.parametrize("as_array", [False, True])
def test_mutated_instructions_are_refused_or_right(tmp_path, as_array):
    """Catches: a row that ends in a traceback here or in what follows, or that changes others."""
    tokenizer = Tokenizer(300)
    file = tmp_path / "rows.json"
    valid = [INSTRUCTIONS[0], INSTRUCTIONS[1], INSTRUCTIONS[-1]]
    valid[0] = {**valid[0], "split": "train"}

    def read(texts, skip_bad):
        content = b"\n".join(texts)
        if as_array:
            content = b"[" + b",\n".join(texts) + b"]"
        file.write_bytes(content)
        chats, splits, bad, _ = chat.read_instructions(file, skip_bad)
        training, held_out = chat.hold_out(chats, splits, 0.2, seed=1)
        examples = chat.Examples([chats[row] for row in training], tokenizer, "S.", 64)
        if len(examples):
            chat.Batches(examples, 2, seed=1).of_step(0)
        return chats, bad
    texts = [json.dumps(row).encode() for row in valid]
    expected, _ = read(texts, False)  # control

    def trial(draw):
        at = draw.randrange(len(valid))
        mutated = list(texts)
        mutated[at] = mutate_json(valid[at], draw)
        chats, bad = read(mutated, skip_bad=draw.random() < 0.3)
        return all(chats.count(expected[n]) >= 1 for n in range(len(valid)) if n != at)
    assert hold(draws(2500), trial)


@pytest.mark.row(55)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_mutated_text_is_refused_or_right(tmp_path, suffix):
    """Catches: a line that ends in a traceback, or a damaged file that is read in part."""
    file = tmp_path / f"text{suffix}"
    valid = [{"text": f"Text {n}.\nIts end.", "id": n, "meta": {"a": [1]}} for n in range(4)]
    pack = gzip.compress if suffix.endswith("gz") else bytes

    def read():
        return [text for text, _ in textfiles.read_pieces(file, None)]

    def trial(draw):
        if suffix.endswith("gz") and draw.random() < 0.7:
            packed = mutate_bytes(pack(to_json(valid[0]).encode()), draw)
            file.write_bytes(packed)
            return read() == ([valid[0]["text"]] if packed else [])
        at = draw.randrange(len(valid))
        row = mutate_tree(valid[at], draw, JSON_VALUES)
        every = [*valid[:at], row, *valid[at + 1:]]
        file.write_bytes(pack("\n".join(map(to_json, every)).encode()))
        expected = [each.get("text") if isinstance(each, dict) else 0 for each in every]
        found = read()
        valid_rows = all(isinstance(text, str | None) for text in expected)
        return valid_rows and found == [text for text in expected if text and text.strip()]
    file.write_bytes(pack("\n".join(map(to_json, valid)).encode()))
    assert read() == [row["text"] for row in valid]  # control
    assert hold(draws(2500), trial)


@pytest.mark.row(55)
def test_mutated_base_json_is_refused_or_right(tmp_path):
    """Catches: a traceback, or a base that is not verified."""
    recorded = durable.write_file(tmp_path / "base.pt", {"config": {}, "model": {}})
    base = {"base.pt": recorded}
    write_json(tmp_path / "base.json", base)
    assert lora.base_file(tmp_path) == tmp_path / "base.pt"  # control

    def trial(draw):
        content = mutate_json(base, draw)
        (tmp_path / "base.json").write_bytes(content)
        return lora.base_file(tmp_path) == tmp_path / "base.pt" and (
            recorded["sha256"].encode() in content)
    assert hold(draws(2000), trial)
