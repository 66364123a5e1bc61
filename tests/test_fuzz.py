"""Readers on mutated input: each accepts it and is right, or refuses it in one line.

Every trial mutates a valid input at random places, with a fixed seed. What a test cannot ask for:
a change from one plausible value to another, of which nothing else in the input tells. It is named
where it is left out.
"""
import copy
import gzip
import json
import math
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import plot_dynamics
import sft
from conftest import INSTRUCTIONS, QUESTIONS, exit_code, run, same, write_lines
from corpus import foreign_shards, textfiles
from data import DataFolder, Tokenizer, open_shard
from support import chat, durable, runs, trees
from support.files import write_json
from support.runs import UserError
from test_adopt import llmc
from test_data import npy

pytestmark = pytest.mark.slow

DRAW_PAGE = plot_dynamics.main  # the fixture `preset` takes it away

# -------------------------------------------------------------------------------------------------
# Mutations

VALUES = [None, True, -1, 0, 1, 10**12, 10**30, -1.0, 0.5, 1e308, math.nan, math.inf, "", " ",
          "0", "a\nb", "\0", "\ud800", "../x", "/", "é" * 300, [], [[]], [None, "a"], {},
          {"": None}, {"a": {"a": []}}]
DEPTHS = [300, 880, 940, 970, 100_000]  # of lists in lists: json.loads takes about a thousand
JSON_VALUES = [*VALUES, 10**4000, *[f"nested {depth}" for depth in DEPTHS]]


def to_json(tree):
    """The JSON of a tree, in which "nested 300" and such strings stand for that many lists."""
    text = json.dumps(tree)
    for depth in DEPTHS:
        text = text.replace(f'"nested {depth}"', "[" * depth + "]" * depth)
    return text


def places(tree):
    """(container, key) of every node below the root."""
    found = []
    for key, value in trees.items_of(tree):
        found.append((tree, key))
        found += places(value)
    return found


def mutate_tree(tree, draw, values=VALUES):
    """A copy of nested dicts and lists in which a node is another, or gone, or one more."""
    root = [copy.deepcopy(tree)]
    every = places(root)
    container, key = draw.choice(every)
    kind = draw.choice(["value", "value", "node", "delete", "more"])
    if kind == "delete" and container is not root:
        del container[key]
    elif kind == "more" and isinstance(container, dict):
        container["more"] = copy.deepcopy(draw.choice(values))
    elif kind == "node":
        other, place = draw.choice(every)
        container[key] = copy.deepcopy(other[place])
    else:
        container[key] = copy.deepcopy(draw.choice(values))
    return root[0]


def mutate_json(tree, draw):
    """Bytes of JSON in which a node, or now and then a byte, is another."""
    if draw.random() < 0.15:
        return mutate_bytes(to_json(tree).encode(), draw)
    return to_json(mutate_tree(tree, draw, JSON_VALUES)).encode()


def mutate_bytes(content, draw, end=None):
    """A copy of bytes that is cut at a place before `end`, or has another byte or more there."""
    at = draw.randrange(end or len(content))
    kind = draw.choice(["flip", "set", "cut", "insert"])
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + draw.randbytes(draw.choice([1, 2, 64])) + content[at:]
    byte = draw.choice(b'\0\n"09{\x80\xff')
    if kind == "flip":
        byte = content[at] ^ 1 << draw.randrange(8)
    return content[:at] + bytes([byte]) + content[at + 1:]


# -------------------------------------------------------------------------------------------------
# The promise

def hold(trials, trial, refused_share=0.2):
    """Call trial(draw) so many times, each with other random numbers: it mutates, reads, and
    returns whether what was read is right. Fails at the first broken promise."""
    refused = 0
    for seed in range(trials):
        try:
            assert trial(random.Random(seed)), "accepted, and wrong"
        except Exception as error:
            _, message = runs.explain(error)
            if message is None or len(message.splitlines()) != 1:
                error.add_note(f"in trial {seed}")
                raise
            refused += 1
    assert refused_share * trials <= refused < trials  # control


# -------------------------------------------------------------------------------------------------
# Data

def open_data(folder):
    """{split: {file: its tokens}} of a folder that is checked as a new run checks it."""
    data = DataFolder(folder)
    data.check_content()
    return {split: {shard.path.name: shard.tokens.tobytes() for shard in getattr(data, split)}
            for split in ("train", "val")}


@pytest.mark.row(54, 55)
def test_data_folder_with_a_mutated_meta_json_is_refused_or_right(data, tmp_path):
    """Catches: a meta.json that ends in a traceback, or that lets other tokens in."""
    folder = shutil.copytree(data, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text())
    expected = open_data(folder)
    every = {**expected["train"], **expected["val"]}
    assert len(every) == 3  # control

    def trial(draw):
        (folder / "meta.json").write_bytes(mutate_json(meta, draw))
        found = open_data(folder)
        train = found["train"]
        val = found["val"]
        apart = train and val and not set(train) & set(val)
        return apart and (train | val).items() <= every.items()
    hold(2000, trial)


@pytest.mark.row(54, 55)
@pytest.mark.parametrize("name, pack, header", [
    ("train_0.npy", npy, 128), ("fineweb_train_0.bin", llmc, foreign_shards.LLMC_HEADER)])
def test_shard_with_a_mutated_header_is_refused_or_right(tmp_path, name, pack, header):
    """Catches: a header that ends in a traceback, or that shifts or cuts the tokens."""
    file = tmp_path / name
    ids = np.arange(20_000, dtype=np.uint16)
    content = pack(ids)

    def read(content):
        """The tokens as the door finds them, and as a data folder then reads them."""
        file.unlink(missing_ok=True)  # the old one is mapped
        file.write_bytes(content)
        found = foreign_shards.open_foreign(file)
        return open_shard(file, len(found.tokens), found.offset).tokens.tobytes()
    assert read(content) == ids.tobytes()  # control

    def trial(draw):
        mutated = mutate_bytes(content, draw, draw.choice([12, header, None]))
        # Ids that are others: only the hash in meta.json tells.
        return read(mutated) == mutated[header:]
    hold(4000, trial)


# -------------------------------------------------------------------------------------------------
# Checkpoints

@pytest.mark.row(7, 55)
def test_checkpoint_with_a_mutated_meta_json_is_passed_over(tmp_path):
    """Catches: damage that ends a run which has an older good state; a prune that removes the last
    good one."""
    original = tmp_path / "original"
    for step in (8, 10, 15):
        weights = {"config": {}, "model": {"w": torch.tensor(float(step))}}
        durable.write_checkpoint(original, step, {"model.pt": weights,
                                                  "train_state.pt": {"step": step}})
    steps = []

    def trial(draw):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        file = folder / f"checkpoints/step_{draw.choice([10, 15]):08d}/meta.json"
        file.write_bytes(mutate_json(json.loads(file.read_text()), draw))
        found = durable.find(folder, full=True)
        step = durable.step_of(found)
        steps.append(step)
        durable.set_aside_newer(folder, step)
        durable.prune(folder, 1, draw.choice([0, 5]))
        is_kept = durable.find(folder, full=True) == found
        return is_kept and durable.load_file(found / "model.pt")["model"]["w"] == step
    hold(600, trial, refused_share=0)
    assert 100 < steps.count(10) < 400  # control


STATE_VALUES = [*VALUES, torch.zeros(()), torch.ones(3), torch.ones(2, dtype=torch.int64), (1, 2),
                b"a"]


def plausible(whole, mutated):
    """Whether a mutated state differs from its original only in numbers within tensors, of which
    nothing else in a state tells, and in the parts that another run may have too: its settings
    (they are refused where they do not fit, or a line says so), the seconds, the machine."""
    parts = ("config", "seconds", "env")
    whole = {name: value for name, value in whole.items() if name not in parts}
    mutated = {name: value for name, value in mutated.items() if name not in parts}
    values = trees.leaves(whole)
    changed = trees.differences(whole, mutated)
    return trees.forms(whole) == trees.forms(mutated) and all(
        isinstance(values[path], torch.Tensor) for path in changed)


@pytest.mark.row(53)
def test_resume_from_a_mutated_state_is_refused_or_right(data, tmp_path, capsys):
    """Catches: a state with the right hash and other content that ends in a traceback, or from
    which another run goes on."""
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside of pytest
    original = tmp_path / "original"
    assert run(data, original, "--stop_at", 3) == 75
    place = "checkpoints/step_00000003"
    contents = {name: durable.load_file(original / place / name)
                for name in ("model.pt", "train_state.pt")}

    def resume(folder, changed):
        """Step 4 of the run, from the state with the right hashes."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        files = {name: durable.write_file(folder / place / name, content)
                 for name, content in {**contents, **changed}.items()}
        write_json(folder / place / "meta.json", {"step": 3, "files": files})
        code = run(data, folder, "--resume", "--stop_at", 4, base=["--threads", 1, "--no-compile"])
        message = capsys.readouterr().err.strip()
        if code in (2, 3):
            raise UserError(message, code)
        assert code == 75
    resume(tmp_path / "expected", {})

    def trial(draw):
        name = draw.choice(list(contents))
        whole = contents[name]
        part = draw.choice(list(whole))  # so that each gets its share: most nodes are moments
        mutated = mutate_tree({part: whole[part]}, draw, STATE_VALUES)
        if isinstance(mutated, dict):
            rest = {key: value for key, value in whole.items() if key != part}
            mutated = {**rest, **mutated}
        resume(tmp_path / "run", {name: mutated})
        return same(tmp_path / "run", tmp_path / "expected", step=4) or plausible(whole, mutated)
    hold(400, trial)


# -------------------------------------------------------------------------------------------------
# Logs

@pytest.mark.row(30, 55)
def test_log_to_resume_that_was_mutated_is_refused_or_cut(whole, tmp_path):
    """Catches: a resume behind a log that is shorter, or that ends in half a line. What was changed
    within the log nothing tells."""
    content = (whole / "metrics.jsonl").read_bytes()
    last = len(content.splitlines()[-1]) + 1  # bytes
    file = tmp_path / "metrics.jsonl"

    def trial(draw):
        mutated = mutate_bytes(content, draw)
        length = draw.choice([0, 1, last, *[len(content)] * 9, len(content) + 1, 10**30])
        if draw.random() < 0.5:
            mutated = content[:-last] + mutate_json(json.loads(content[-last:]), draw) + b"\n"
            length = len(mutated)
        file.write_bytes(mutated)
        runs.Log(tmp_path, length, 20).file.close()
        kept = file.read_bytes()
        return kept == mutated[:length] and kept.endswith(b"\n")
    hold(2000, trial)


@pytest.mark.row(55)
def test_mutated_log_is_read_and_drawn_without_the_broken_lines(whole, tuned, tmp_path, capsys):
    """Catches: a wrong type in a row that ends in a traceback, or that takes other rows with it; a
    number or a text that the figure cannot show."""
    file = tmp_path / "metrics.jsonl"
    again = []  # a last step that is smaller than those before is a run that began again

    def trial(draw):
        folder = draw.choice([whole, tuned])
        log = (folder / "metrics.jsonl").read_bytes().splitlines()
        log.append(log[0].replace(b'"start"', b'"resume"'))
        known = set()
        for place, line in enumerate(log):
            row = json.loads(line)
            if draw.random() < 0.3:
                log[place] = mutate_json(row, draw)
            elif row["event"] == "train":
                known.add(row["step"])
        file.write_bytes(b"\n".join(log))
        if draw.random() < 0.005:  # it takes a second
            assert DRAW_PAGE([str(file), str(folder), "--out", str(tmp_path / "out")]) == 0
        found = plot_dynamics.read_run(file)
        plot_dynamics.summary(found)
        plot_dynamics.trajectory([found])
        events = plot_dynamics.read_events(file)
        again.append(len(plot_dynamics.cut_back(events, file)) < len(events))
        return again[-1] or known <= {row["step"] for row in found.rows["train"]}
    hold(1000, trial, refused_share=0)
    assert sum(again) < 100


# -------------------------------------------------------------------------------------------------
# Settings

@pytest.mark.row(38, 44, 55)
def test_readers_of_a_mutated_config_json_refuse_it_or_are_right(whole, tmp_path, capsys):
    """Catches: a setting of another type that ends in a traceback of evaluate.py or sft.py. Another
    plausible seq_len, preset or benchmark nothing else tells."""
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside of pytest
    folder = shutil.copytree(whole, tmp_path / "r")
    settings = json.loads((folder / "config.json").read_text())
    read = [name for name in runs.READ_BY_OTHERS if name in settings]
    unread = ("run", "batch_size", "warmup_steps", "seed")

    def tuning():
        found = vars(sft.read_settings([str(folder), "--lora", "4"]))
        evaluate.open_benchmark(SimpleNamespace(**found), Tokenizer(300))
        return [found[name] for name in unread]

    def score():
        (folder / "evaluations.jsonl").unlink(missing_ok=True)
        code = exit_code(evaluate.main, [folder, "--device", "cpu", "--eval_tokens", 64])
        message = capsys.readouterr().err.strip().split("\r")[-1].strip()
        if code is not None:
            raise UserError(message, code)
        row = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[0])
        return row["val_loss"], row["seq_len"]
    expected_tuning = tuning()
    loss, seq_len = score()

    def trial(draw):
        name = draw.choice(read)
        mutated = {**settings, name: mutate_tree(settings[name], draw, JSON_VALUES)}
        (folder / "config.json").write_text(to_json(mutated))
        if draw.random() < 0.7:
            return tuning() == expected_tuning
        found_loss, found_seq_len = score()
        return found_loss == loss or found_seq_len != seq_len
    hold(800, trial)


# -------------------------------------------------------------------------------------------------
# Text, questions, instructions

@pytest.mark.row(55)
@pytest.mark.parametrize("style", ["token", "harness"])
def test_mutated_questions_are_refused_or_right(tmp_path, style):
    """Catches: a question that ends in a traceback, or that changes others."""
    file = tmp_path / "questions.jsonl"

    def read():
        found = evaluate.Benchmark(file, Tokenizer(300), 64, style)
        return list(zip(found.contexts, found.endings, found.labels.tolist(), strict=True))
    write_lines(file, QUESTIONS)
    expected = read()

    def trial(draw):
        at = draw.randrange(len(QUESTIONS))
        lines = [json.dumps(question).encode() for question in QUESTIONS]
        lines[at] = mutate_json(QUESTIONS[at], draw).replace(b"\n", b" ")
        file.write_bytes(b"\n".join(lines))
        found = read()
        if not lines[at].strip():
            return found == expected[:at] + expected[at + 1:]
        return found[:at] == expected[:at] and found[at + 1:] == expected[at + 1:]
    hold(1000, trial)


@pytest.mark.row(27, 55)
def test_mutated_instructions_are_refused_or_right(tmp_path):
    """Catches: a row that ends in a traceback here or in what follows, or that changes others."""
    tokenizer = Tokenizer(300)
    file = tmp_path / "rows.json"
    valid = [{**INSTRUCTIONS[0], "split": "train"}, INSTRUCTIONS[1], INSTRUCTIONS[-1]]
    texts = [json.dumps(row).encode() for row in valid]

    def read(texts, as_array, skip_bad):
        content = b"\n".join(texts)
        if as_array:
            content = b"[" + b",\n".join(texts) + b"]"
        file.write_bytes(content)
        chats, splits, _, _ = chat.read_instructions(file, skip_bad)
        training, _ = chat.hold_out(chats, splits, 0.2, seed=1)
        examples = chat.Examples([chats[row] for row in training], tokenizer, "S.", 64)
        if len(examples):
            chat.Batches(examples, 2, seed=1).of_step(0)
        return chats
    expected = read(texts, False, False)

    def trial(draw):
        at = draw.randrange(len(valid))
        mutated = list(texts)
        mutated[at] = mutate_json(valid[at], draw)
        chats = read(mutated, draw.random() < 0.5, draw.random() < 0.3)
        return all(expected[n] in chats for n in range(len(valid)) if n != at)
    hold(2500, trial)


@pytest.mark.row(55)
def test_mutated_text_is_refused_or_right(tmp_path):
    """Catches: a row that ends in a traceback, or that changes others."""
    file = tmp_path / "text.jsonl"
    valid = [{"text": f"Text {n}.\nIts end.", "id": n} for n in range(4)]

    def trial(draw):
        at = draw.randrange(len(valid))
        every = list(valid)
        every[at] = mutate_tree(valid[at], draw, JSON_VALUES)
        file.write_text("\n".join(map(to_json, every)))
        found = [text for text, _ in textfiles.read_pieces(file, None)]
        expected = [row.get("text") for row in every]  # of another value it was refused
        return found == [text for text in expected if text and text.strip()]
    hold(2500, trial)


@pytest.mark.row(55)
def test_mutated_gzip_is_refused_or_right(tmp_path):
    """Catches: a damaged file that ends in a traceback, or that is read in part."""
    file = tmp_path / "text.jsonl.gz"
    content = gzip.compress(b'{"text": "Text.", "id": 1, "meta": {"a": [1]}}', mtime=0)

    def trial(draw):
        mutated = mutate_bytes(content, draw)
        file.write_bytes(mutated)
        found = [text for text, _ in textfiles.read_pieces(file, None)]
        return found == (["Text."] if mutated else [])
    hold(2500, trial)
