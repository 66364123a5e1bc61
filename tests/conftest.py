"""What several test files share: a preset small enough for a test, data for it, and a run that nothing happened to."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # not amid the first run: an exception in this import keeps alive the frames it came through, and the run's lock with them

import plot_dynamics
import sft
import train
from model import PRESETS, ModelConfig

ROOT = Path(__file__).parent.parent
TEST = ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=64, vocab_size=300, max_seq_len=64)
# What a child process runs: train.py, with a preset small enough for a test.
CHILD = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import model, train
model.PRESETS["test"] = model.{TEST!r}
train.BY_PRESET["test"] = {{}}
sys.exit(train.main())
"""
ENDINGS = ["a test.", "the end of it.", "not so.", "what it is."]
QUESTIONS = [{"ctx": f"Line {'and so on ' * n}is", "activity_label": f"line{n}", "ctx_a": f"Line {'and so on ' * n}".strip(), "ctx_b": "is",
              "endings": ENDINGS, "label": n % 4} for n in range(6)]
FLAGS = ("--preset test --max_steps 20 --seq_len 16 --batch_tokens 128 --micro_batch 4 --warmup_steps 6 --lr 0.01 --dtype fp32 --threads 1 "
         "--eval_every 8 --eval_tokens 256 --sample_every 0 --save_every 5 --keep_every 0").split()


@pytest.fixture(autouse=True)
def preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "test", TEST)
    monkeypatch.setitem(train.BY_PRESET, "test", {})
    monkeypatch.setattr(plot_dynamics, "main", lambda argv: 0)  # a second for each run; `whole` does draw


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of two training shards and one for validation: periodic ids with noise, so that there is something to learn."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    splits = {"train": [], "val": []}
    for name, split, n in (("train_0000", "train", 1500), ("train_0001", "train", 900), ("val_0000", "val", 700)):
        ids = np.where(random.rand(n) < 0.2, random.randint(0, 299, n), np.arange(n) * 7 % 97).astype(np.uint16)
        np.save(folder / f"{name}.npy", ids)
        splits[split].append({"file": f"{name}.npy", "tokens": n, "sha256": ""})
    (folder / "cloze.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": 300, "eot": 299, "dtype": "uint16",
                                                  "bytes": {}, "splits": splits, "source": {}}))
    return folder


def run(data, folder, *flags, base=FLAGS):
    """train.main with the test's settings; a later flag wins. Returns its exit code."""
    try:
        return train.main([*base, "--data", str(data), "--run", str(folder), *map(str, flags)])
    except SystemExit as error:
        return error.code


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """The run that nothing happened to."""
    PRESETS["test"], train.BY_PRESET["test"] = TEST, {}
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(data, folder) == 0
    return folder


# A conversation in 64 tokens of a vocabulary of 300: nearly one a letter.
INSTRUCTIONS = [{"instruction": f"{word}{n}?", "input": "in" * (n % 3 == 0), "output": f"It is {word}{' no' * (n % 4)}."} for n in range(6)
                for word in ("a", "be", "sea", "tea", "ideas")]
INSTRUCTIONS += [{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."},
                               {"role": "user", "content": "c?"}, {"role": "assistant", "content": "d."}]}]
TUNE = ("--max_steps 12 --batch_size 6 --micro_batch 3 --lr 0.01 --warmup_steps 2 --dtype fp32 --threads 1 --eval_every 4 --save_every 5 "
        "--held_out 0.2 --system S.").split()


@pytest.fixture(scope="session")
def instructions(tmp_path_factory):
    file = tmp_path_factory.mktemp("instructions") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in INSTRUCTIONS))
    return file


def tune(base, file, folder, *flags):
    """sft.main with the test's settings; a later flag wins. Returns its exit code."""
    try:
        return sft.main([*([str(base)] if base else []), *TUNE, "--instructions", str(file), "--run", str(folder), *map(str, flags)])
    except SystemExit as error:
        return error.code


@pytest.fixture(scope="session", params=[[], ["--lora", 4]], ids=["full", "lora"])
def method(request):
    return request.param


@pytest.fixture(scope="session")
def tuned(whole, instructions, method, tmp_path_factory):
    """The tuning that nothing happened to."""
    folder = tmp_path_factory.mktemp("tuned") / "r"
    assert tune(whole, instructions, folder, *method) == 0
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Calls that run a trial in a process forked from a fresh one: see trials.py."""
    process = subprocess.Popen([sys.executable, str(ROOT / "tests/trials.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stderr = str(tmp_path_factory.mktemp("trials") / "stderr")

    def trial(*flags, fault=(), kill_after=None, base=FLAGS, max_minutes=None, script="train"):
        base = [*base, "--max_minutes", max_minutes] if max_minutes else base
        process.stdin.write(json.dumps({"script": script, "argv": [*map(str, base), *map(str, flags)], "fault": fault, "kill_after": kill_after,
                                        "stderr": stderr}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield trial
    process.stdin.close()
    process.wait(10)


def rows(folder, event="train", keys=("step", "tokens", "loss", "lr", "grad_norm")):
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in keys) for row in events if row["event"] == event]


def evals(folder):
    return rows(folder, "eval", ("step", "val_loss", "val_bpb", "position_loss"))


def tuning(folder):
    return rows(folder, "sft_eval", ("step", "heldout_loss", "token_acc"))


def state(folder, step=20):
    """All tensors of a checkpoint's full state, by name."""
    place = folder / "checkpoints" / f"step_{step:08d}"
    tensors = dict(torch.load(place / "model.pt", weights_only=True)["model"])
    for name, moments in torch.load(place / "train_state.pt", weights_only=True)["optimizer"].items():
        tensors |= {f"{name}.{key}": value for key, value in moments.items()}
    return tensors


def same(a, b, step=20):
    """Equal to the bit: losses, rates, norms, evaluations, weights, moments."""
    first, second = state(a, step), state(b, step)
    return (rows(a) == rows(b) and evals(a) == evals(b) and tuning(a) == tuning(b) and first.keys() == second.keys()
            and all(torch.equal(first[name], second[name]) for name in first))


def messages(capsys):
    return capsys.readouterr().err.strip().splitlines()
