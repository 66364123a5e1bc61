"""What the test files share: a preset small enough for a test, data, and undisturbed runs."""
import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# Imported here because evaluation imports it late: if an exception then passes through the import,
# it keeps the frames of a run alive, and with them the run's lock.
import torch._dynamo  # noqa: F401

import evaluate
import plot_dynamics
import sft
import train
from model import PRESETS, ModelConfig
from support import trees

ROOT = Path(__file__).parent.parent
TEST = ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=64,
                   vocab_size=300, max_seq_len=64)
TEST_SETTINGS = {"max_steps": 20}

# What a child process runs: train.py, with the preset of the tests.
CHILD = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import model, train
model.PRESETS["test"] = model.{TEST!r}
train.BY_PRESET["test"] = {TEST_SETTINGS}
sys.exit(train.main())
"""

FLAGS = ("--preset test --max_steps 20 --seq_len 16 --batch_tokens 128 --micro_batch 4 "
         "--warmup_steps 6 --lr 0.01 --dtype fp32 --threads 1 --eval_every 8 --eval_tokens 256 "
         "--benchmark_from 2 --sample_every 0 --save_every 5 --keep_every 0").split()


def pytest_addoption(parser):
    parser.addoption("--row", type=int, help="run only the tests of this promise (test_rows.py)")


def pytest_collection_modifyitems(config, items):
    number = config.getoption("row")
    if number is not None:
        items[:] = [item for item in items
                    if any(number in mark.args for mark in item.iter_markers("row"))]


@pytest.fixture(autouse=True)
def preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "test", TEST)
    monkeypatch.setitem(train.BY_PRESET, "test", TEST_SETTINGS)
    # Drawing takes a second at the end of each run. The run of the fixture `whole` does draw.
    monkeypatch.setattr(plot_dynamics, "main", lambda argv: 0)


@pytest.fixture
def short_samples(monkeypatch):
    """Samples of 4 tokens: the time goes into what is tested."""
    brief = functools.partial(evaluate.continue_prompt, max_new_tokens=4)
    monkeypatch.setattr(evaluate, "continue_prompt", brief)


@pytest.fixture
def one_thread_afterwards():
    yield
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)


# -------------------------------------------------------------------------------------------------
# Data

ENDINGS = ["a test.", "the end of it.", "not so.", "what it is."]


def question(n):
    context = f"Line {'and so on ' * n}".strip()
    return {"ctx": f"{context} is", "activity_label": f"line{n}", "ctx_a": context, "ctx_b": "is",
            "endings": ENDINGS, "label": n % 4}


QUESTIONS = [question(n) for n in range(6)]


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of two training shards and one for validation: periodic ids with some noise, so that
    there is something to learn."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(0)
    splits = {"train": [], "val": []}
    for name, n in (("train_0000", 1500), ("train_0001", 900), ("val_0000", 700)):
        periodic = np.arange(n) * 7 % 97
        noisy = random.rand(n) < 0.2
        ids = np.where(noisy, random.randint(0, 299, n), periodic).astype(np.uint16)
        file = folder / f"{name}.npy"
        np.save(file, ids)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        splits[name[:-5]].append({"file": file.name, "tokens": n, "sha256": sha256})
    write_lines(folder / "cloze.jsonl", QUESTIONS)
    meta = {"tokenizer": "gpt2", "vocab_size": 300, "eot": 299, "dtype": "uint16", "bytes": {},
            "splits": splits, "source": {}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


# A conversation in 64 tokens of a vocabulary of 300: nearly one token a letter.
INSTRUCTIONS = []
for n in range(6):
    for word in ("a", "be", "sea", "tea", "ideas"):
        INSTRUCTIONS.append({"instruction": f"{word}{n}?", "input": "in" * (n % 3 == 0),
                             "output": f"It is {word}{' no' * (n % 4)}."})
INSTRUCTIONS.append({"messages": [{"role": "user", "content": "a?"},
                                  {"role": "assistant", "content": "b."},
                                  {"role": "user", "content": "c?"},
                                  {"role": "assistant", "content": "d."}]})


@pytest.fixture(scope="session")
def instructions(tmp_path_factory):
    file = tmp_path_factory.mktemp("instructions") / "rows.jsonl"
    write_lines(file, INSTRUCTIONS)
    return file


# -------------------------------------------------------------------------------------------------
# Runs

def exit_code(main, argv):
    try:
        return main([str(argument) for argument in argv])
    except SystemExit as error:
        return error.code


def run(data, folder, *flags, base=FLAGS):
    """train.main with the settings of the tests; a later flag wins. Returns the exit code."""
    return exit_code(train.main, [*base, "--data", data, "--run", folder, *flags])


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """A run of 20 steps that was not disturbed."""
    PRESETS["test"] = TEST
    train.BY_PRESET["test"] = TEST_SETTINGS
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(data, folder) == 0
    return folder


TUNE = ("--max_steps 12 --batch_size 6 --micro_batch 3 --lr 0.01 --warmup_steps 2 --dtype fp32 "
        "--threads 1 --eval_every 4 --sample_every 4 --save_every 5 --held_out 0.2 "
        "--system S.").split()


def tune(base, file, folder, *flags):
    """sft.main with the settings of the tests; a later flag wins. Returns the exit code."""
    argv = [*TUNE, "--instructions", file, "--run", folder, *flags]
    if base is not None:
        argv.insert(0, base)
    return exit_code(sft.main, argv)


@pytest.fixture(scope="session", params=[[], ["--lora", 4]], ids=["full", "lora"])
def method(request):
    return request.param


@pytest.fixture(scope="session")
def tuned(whole, instructions, method, tmp_path_factory):
    """A tuning of 12 steps that was not disturbed."""
    folder = tmp_path_factory.mktemp("tuned") / "r"
    assert tune(whole, instructions, folder, *method) == 0
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Calls that run a trial (a run with a fault) in a process forked from a fresh one."""
    process = subprocess.Popen([sys.executable, str(ROOT / "tests/trials.py")],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stderr = str(tmp_path_factory.mktemp("trials") / "stderr")

    def trial(*flags, fault=(), kill_after=None, base=FLAGS, script="train"):
        request = {"script": script, "argv": [str(flag) for flag in (*base, *flags)],
                   "fault": fault, "kill_after": kill_after, "stderr": stderr}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield trial
    process.stdin.close()
    process.wait(10)


# -------------------------------------------------------------------------------------------------
# What a run left

def rows(folder, event="train", keys=("step", "tokens", "loss", "lr", "grad_norm")):
    """The fields `keys` of all rows of one kind in the run's log."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [tuple(row[key] for key in keys) for row in events if row["event"] == event]


def evals(folder):
    return rows(folder, "eval", ("step", "val_loss", "val_bpb", "position_loss"))


def tuning(folder):
    return rows(folder, "sft_eval", ("step", "heldout_loss", "token_acc"))


def state(folder, step=20):
    """All tensors of a checkpoint's full state, by name."""
    place = folder / "checkpoints" / f"step_{step:08d}"
    contents = {name: torch.load(place / name, weights_only=True)
                for name in ("model.pt", "train_state.pt")}
    return trees.named_tensors(contents)


def same(a, b, step=20):
    """Whether two runs are equal to the bit: losses, rates, norms, evaluations, and the state."""
    first = state(a, step)
    second = state(b, step)
    logs_equal = rows(a) == rows(b) and evals(a) == evals(b) and tuning(a) == tuning(b)
    if not logs_equal or first.keys() != second.keys():
        return False
    return all(torch.equal(first[name], second[name]) for name in first)


def messages(capsys):
    return capsys.readouterr().err.strip().splitlines()
