"""reproduce.sh and experiments/: the commands are valid, the statistics are right, and the figures
and numbers in logs/ are those of the logs."""
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import model
import sft
import train
from conftest import ROOT, TEST, exit_code

sys.path.insert(0, str(ROOT / "experiments"))
import common  # noqa: E402
import keep  # noqa: E402
import repeats  # noqa: E402

SCRIPTS = sorted((ROOT / "experiments").glob("[1-9]_*.py"))


def load(script):
    """The module of a file whose name starts with a digit."""
    spec = importlib.util.spec_from_file_location(f"experiment_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------------------------------------
# The numbers in logs/

@pytest.fixture
def copied(tmp_path, monkeypatch):
    """logs/ in another folder, which the experiments take for it."""
    shutil.copytree(ROOT / "logs", tmp_path / "logs")
    monkeypatch.setattr(common, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    return tmp_path / "logs"


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_numbers_are_those_of_the_logs(script, copied):
    """Catches: a number in logs/summary.json, from which README quotes, that the logs do not
    give."""
    kept = (ROOT / "logs" / "summary.json").read_text(encoding="utf-8")
    name = script.stem
    changed = json.loads(kept)
    for what in changed[name]:
        changed[name][what] = "?"
    (copied / "summary.json").write_text(json.dumps(changed))
    assert (copied / "summary.json").read_text(encoding="utf-8") != kept  # control
    (copied / name / "figure.png").unlink()
    module = load(script)
    module.main([])
    assert (copied / "summary.json").read_text(encoding="utf-8") == kept
    assert (copied / "numbers.md").read_bytes() == (ROOT / "logs" / "numbers.md").read_bytes()
    assert (copied / name / "figure.png").stat().st_size > 10_000


NUMBER = re.compile(r"[+-]?\d+\.\d+ ± \d+\.\d+|[+-]?\d+\.\d{2,}")


def not_in_summary(text, summary):
    """The numbers in a text's table rows of experiments ("… | 2 |" for the second) that
    logs/summary.json does not have for this experiment."""
    absent = []
    for row, number in re.findall(r"^\|(.*)\| (\d) \|$", text, re.M):
        known = [values for name, values in summary.items() if name[0] in (number, "7")]
        there = NUMBER.findall(" ".join(str(values) for values in known))
        absent += [found for found in NUMBER.findall(row) if found not in there]
    return absent


def test_readme_tells_of_the_experiments():
    """Catches: a number in README's table of experiments that is not in logs/summary.json."""
    summary = json.loads((ROOT / "logs" / "summary.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Training dynamics")[1].split("\n## ")[0]
    assert len(re.findall(r"^\|.*\| \d \|$", section, re.M)) >= 8
    assert not_in_summary(section, summary) == []
    summary["1_emergence"]["acc_pmi at the end"] = "0.791 ± 0.024"  # control
    assert not_in_summary(section, summary) == ["0.790 ± 0.024"]


def test_missing_log_names_its_command(copied):
    """Catches: a traceback where an experiment was not run."""
    shutil.rmtree(copied / "7_seeds")
    with pytest.raises(common.UserError, match="run: bash reproduce.sh 7"):
        common.log_of("7_seeds", "seed1")


# -------------------------------------------------------------------------------------------------
# reproduce.sh

RECORDER = """#!/usr/bin/env bash
# Notes a command, and makes the run folder that it would make.
line=$(printf '%s\\x1f' "$@")
echo "$line" >> commands
while [ $# -gt 0 ]; do
  [ "$1" = --run ] && mkdir -p "$2" && echo '"done"' > "$2/metrics.jsonl"
  shift
done
"""


@pytest.mark.slow
def test_commands_are_valid(tmp_path, whole, monkeypatch):
    """Catches: a command of reproduce.sh whose flags train.py or sft.py do not have (any more)."""
    shutil.copy(ROOT / "reproduce.sh", tmp_path)
    (tmp_path / "python").write_text(RECORDER)
    (tmp_path / "python").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python"}
    done = subprocess.run(["bash", "reproduce.sh"], cwd=tmp_path, env=env, capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (0, "")
    commands = [line.split("\x1f")[:-1] for line in (tmp_path / "commands").read_text().split("\n")]
    commands = [command[command.index("--") + 1:] if "--" in command else command
                for command in commands if command]
    for seed in (1, 2, 3):  # sft.py reads the settings of its base
        shutil.copy(whole / "config.json", tmp_path / f"runs/reproduce/1/seed{seed}")
    monkeypatch.chdir(tmp_path)
    parsers = {"train.py": train.read_settings, "sft.py": sft.read_settings}
    checked = [parsers[command[0]](command[1:]) for command in commands if command[0] in parsers]
    assert len(checked) > 150
    others = {command[0] for command in commands} - set(parsers) - {"-c"}
    assert all((ROOT / name).is_file() for name in others if "*" not in name)
    command = next(command for command in commands if command[0] == "train.py")
    with pytest.raises(common.UserError, match="unrecognized arguments: --no_such_flag"):  # control
        train.read_settings([*command[1:], "--no_such_flag"])


@pytest.mark.parametrize("argument", ["9", "two"])
def test_mistake_in_the_number_is_one_line(argument):
    """Catches: an experiment that is not there, and an exit code of 0."""
    done = subprocess.run(["bash", ROOT / "reproduce.sh", argument], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{argument} is not an experiment" in done.stderr


# -------------------------------------------------------------------------------------------------
# Statistics

def test_interval_is_students():
    """Catches: a normal interval, or one without the n − 1. By hand: for 1, 2, 3 the mean is 2, the
    standard deviation 1, and t with 2 degrees of freedom 4.30."""
    mean, half = common.interval([1, 2, 3])
    assert (mean, half) == (2, pytest.approx(4.30 / math.sqrt(3)))
    assert half != pytest.approx(1.96 / math.sqrt(3), rel=0.1)  # control
    assert common.text([1, 2, 3], 1, sign=True) == "+2.0 ± 2.5"


def test_ranks_share_ties():
    """Catches: equal values that get different ranks, by their places."""
    assert common.ranks(np.array([10, 30, 20, 20])).tolist() == [1, 4, 2.5, 2.5]
    x = np.array([1.0, 2, 3, 4])
    assert common.spearman(x, np.exp(x)) == pytest.approx(1)
    assert common.pearson(x, np.exp(x)) < 0.95  # control


def test_changes_have_no_common_trend():
    """Catches: a correlation that two curves have because both fall and level off."""
    random = np.random.RandomState(0)
    steps = 150.0 * np.arange(1, 27)
    trend = 3 + 5 / np.sqrt(steps)
    noise = 0.01 * random.randn(3, len(steps))
    one, other = trend + noise[0], trend + noise[1]
    assert common.pearson(one, other) > 0.9
    assert abs(common.pearson(common.changes(steps, one), common.changes(steps, other))) < 0.4
    related = trend + noise[0] + 0.2 * noise[2]  # control: what is common to the noise stays
    assert common.pearson(common.changes(steps, one), common.changes(steps, related)) > 0.9


def test_kept_log_is_thin_and_true(whole, tmp_path):
    """Catches: rows that are lost or changed, and settings that are kept a hundred times."""
    assert not keep.main([tmp_path / "logs", whole, "--every", "4"])
    rows = [json.loads(line) for line in (tmp_path / "logs" / "whole.jsonl").open()]
    full = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    losses = {row["step"]: row["loss"] for row in full if row["event"] == "train"}
    found = {row["step"]: row["loss"] for row in rows if row["event"] == "train"}
    assert sorted(found) == [4, 8, 12, 16, 20]
    assert all(math.isclose(losses[step], loss, rel_tol=1e-5) for step, loss in found.items())
    assert losses[4] != losses[8]  # control
    assert [row["event"] for row in rows if row["event"] != "train"] == [
        row["event"] for row in full if row["event"] != "train"]
    assert not any("config" in row for row in rows)


# -------------------------------------------------------------------------------------------------
# Repeats

def test_sequences_repeat_and_differ(tmp_path):
    """Catches: copies of another length than said; the same sequence twice; a validation sequence
    that was trained on."""
    assert not repeats.main(["make", tmp_path / "r", "--sequences", "50"])
    seen = set()
    for split in ("train", "val"):
        rows = np.load(tmp_path / "r" / f"{split}_0000.npy")[:-1].reshape(-1, repeats.WINDOW)
        for row in rows:
            periods = [p for p in range(1, 65) if (row[p:] == row[:-p]).all()]
            assert 16 <= periods[0] <= 32
            seen.add(row.tobytes())
    assert len(seen) == 50 + 256
    assert exit_code(repeats.main, ["make", tmp_path / "r"]) == 2  # it is there already


def test_prefix_matching_of_uniform_attention():
    """Catches: attention to another place than the one after the last occurrence; a score that is
    no share. With queries of 0 every place before has the same weight: 1 / (i + 1) at position
    i."""
    torch.manual_seed(0)
    network = model.Llama(replace(TEST, max_seq_len=128))
    tokens = repeats.sequences_like(64, None, n=4)
    plain, _ = network(tokens[:, :-1])
    before = model.attention
    found = repeats.score(network, tokens)
    assert model.attention is before
    assert torch.equal(network(tokens[:, :-1])[0], plain)
    with torch.no_grad():
        for block in network.model.layers:
            block.self_attn.q_proj.weight.zero_()
    uniform = np.mean([1 / (i + 1) for i in range(32, 127)])
    heads = repeats.score(network, tokens)["prefix_matching"]
    assert np.shape(heads) == (TEST.n_layers, TEST.n_heads)
    assert np.allclose(heads, uniform, rtol=1e-5)
    assert not np.allclose(found["prefix_matching"], uniform, rtol=1e-5)  # control


def test_prefix_matching_of_a_perfect_head(monkeypatch):
    """Catches: an offset by one. A head that looks at the token after the last occurrence scores
    1."""
    network = model.Llama(replace(TEST, max_seq_len=128))
    tokens = repeats.sequences_like(64, None, n=2)

    def perfect(self, x, cos, sin, mask, cache=None):
        T = x.shape[1]
        q = torch.zeros(x.shape[0], 2, T, 256)
        k = torch.zeros(x.shape[0], 1, T, 256)
        for i in range(T):
            k[:, :, i, i] = 100.0
            q[:, :, i, max(0, i - self.shift)] = 100.0
        return x + 0 * model.attention(q, k, k, mask[:T, :T]).sum()
    monkeypatch.setattr(model.Attention, "forward", perfect)
    monkeypatch.setattr(model.Attention, "shift", 31, raising=False)
    heads = repeats.score(network, tokens)["prefix_matching"]
    assert np.allclose(heads, 1)
    monkeypatch.setattr(model.Attention, "shift", 32)  # control: the token itself
    assert np.allclose(repeats.score(network, tokens)["prefix_matching"], 0, atol=1e-3)
