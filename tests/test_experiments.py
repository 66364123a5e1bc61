"""reproduce.sh and experiments/: the commands are valid, the statistics are right, and the figures
and numbers in logs/ are those of the logs."""
import importlib
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
from matplotlib.figure import Figure

import checkpoint
import model
import sft
import train
from conftest import ROOT, TEST, exit_code, rows, run
from support import durable, trees

sys.path.insert(0, str(ROOT / "experiments"))
import common

import edit_state
import keep
import repeats

SCRIPTS = sorted(file.stem for file in (ROOT / "experiments").glob("[1-9]_*.py"))


# -------------------------------------------------------------------------------------------------
# The numbers in logs/

@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers_are_those_of_the_logs(name, tmp_path, monkeypatch):
    """Catches: a number in logs/summary.json, from which docs/dynamics.md quotes, that the logs do
    not give."""
    logs = shutil.copytree(ROOT / "logs", tmp_path / "logs")
    monkeypatch.setattr(common, "LOGS", logs)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "open_figure", Figure)  # without its layout, half of the time
    summary = logs / "summary.json"
    kept = summary.read_text(encoding="utf-8")
    summary.write_text(json.dumps({**json.loads(kept), name: {}}))
    (logs / "numbers.md").unlink()
    (logs / name / "figure.png").unlink()
    importlib.import_module(name).main([])
    assert summary.read_text(encoding="utf-8") == kept
    assert (logs / "numbers.md").read_bytes() == (ROOT / "logs/numbers.md").read_bytes()
    assert (logs / name / "figure.png").stat().st_size > 10_000


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


def test_docs_tell_of_the_experiments():
    """Catches: a number in the table of experiments that is not in logs/summary.json."""
    summary = json.loads((ROOT / "logs" / "summary.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/dynamics.md").read_text(encoding="utf-8")
    section = page.split("\n## ")[0]
    assert len(re.findall(r"^\|.*\| \d \|$", section, re.M)) >= 8
    assert not_in_summary(section, summary) == []
    found = summary["1_emergence"].pop("acc_pmi at the end")  # control
    assert not_in_summary(section, summary) == [found]


def test_missing_log_names_its_command():
    """Catches: a traceback where an experiment was not run."""
    with pytest.raises(common.UserError, match="run: bash reproduce.sh 7"):
        common.log_of("7_seeds", "seed99")


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


def recorded(folder):
    """The commands of `bash reproduce.sh` in `folder`, as lists, noted by a Python that does
    nothing else."""
    shutil.copy(ROOT / "reproduce.sh", folder)
    (folder / "python").write_text(RECORDER)
    (folder / "python").chmod(0o755)
    (folder / "commands").write_text("")
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "python"}
    done = subprocess.run(["bash", "reproduce.sh"], cwd=folder, env=env, capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.removesuffix("\x1f").split("--\x1f")[-1].split("\x1f")
            for line in (folder / "commands").read_text().splitlines()]


@pytest.mark.slow
def test_commands_are_valid(tmp_path, whole, monkeypatch):
    """Catches: a command of reproduce.sh whose flags train.py or sft.py do not have (any more);
    after a stop, an experiment that is made again, and one that is left out."""
    commands = recorded(tmp_path)
    for seed in (1, 2, 3):  # sft.py reads the settings of its base
        shutil.copy(whole / "config.json", tmp_path / f"runs/reproduce/1/seed{seed}")
    monkeypatch.chdir(tmp_path)
    parsers = {"train.py": train.read_settings, "sft.py": sft.read_settings}
    checked = 0
    for script, *arguments in commands:
        if script in parsers:
            parsers[script](arguments)
            checked += 1
        elif script != "-c" and "*" not in script:
            assert (ROOT / script).is_file()
    assert checked > 300
    with pytest.raises(common.UserError, match="unrecognized arguments"):  # control
        train.read_settings(["--no_such_flag"])

    assert not [command for command in recorded(tmp_path) if command[0] == "train.py"]
    (tmp_path / "runs/reproduce/7.minutes").unlink()
    made = [command for command in recorded(tmp_path) if command[0] == "train.py"]
    assert len(made) == 8 and all("runs/reproduce/7/" in " ".join(command) for command in made)


@pytest.mark.parametrize("failing, code", [("seed3", 1), ("seed8", 1), ("none", 0)])
def test_failed_job_ends_it(tmp_path, failing, code):
    """Catches: a run that failed in the background, and figures that are drawn all the same."""
    shutil.copy(ROOT / "reproduce.sh", tmp_path)
    (tmp_path / "data/pydocs").mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *{failing}*) exit 2;; esac\n')
    python.chmod(0o755)
    done = subprocess.run(["bash", "reproduce.sh", "7"], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHON": "./python"})
    assert done.returncode == code
    assert (tmp_path / "runs/reproduce/7.minutes").exists() == (code == 0)
    assert ("failed: ./python train.py" in done.stderr) == (code == 1)


def test_mistake_in_the_number_is_one_line():
    """Catches: an experiment that is not there, and an exit code of 0."""
    done = subprocess.run(["bash", ROOT / "reproduce.sh", "10"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "10 is not an experiment" in done.stderr


# -------------------------------------------------------------------------------------------------
# Statistics

def test_interval_is_students():
    """Catches: a normal interval, or one without the n − 1. By hand: for 1, 2, 3 the mean is 2, the
    standard deviation 1, and t with 2 degrees of freedom 4.30."""
    mean, half = common.interval([1, 2, 3])
    assert (mean, half) == (2, pytest.approx(4.30 / math.sqrt(3)))
    assert half != pytest.approx(1.96 / math.sqrt(3), rel=0.1)  # control


def test_changes_have_no_common_trend():
    """Catches: a correlation that two curves have because both fall and level off."""
    random = np.random.RandomState(0)
    steps = 150.0 * np.arange(1, 27)
    trend = 3 + 5 / np.sqrt(steps)
    one = trend + 0.01 * random.randn(26)
    other = trend + 0.01 * random.randn(26)
    assert common.pearson(one, other) > 0.9
    changes = common.changes(steps, one)
    assert abs(common.pearson(changes, common.changes(steps, other))) < 0.4
    related = common.changes(steps, one + trend)
    assert common.pearson(changes, related) > 0.9  # control: what they share stays


def test_kept_log_is_thin_and_true(whole, tmp_path):
    """Catches: rows that are lost or changed, and settings that are kept a hundred times."""
    assert not keep.main([tmp_path, whole, "--every", "4"])
    (tmp_path / "whole.jsonl").rename(tmp_path / "metrics.jsonl")
    kept = rows(tmp_path, keys=("step", "loss"))
    full = rows(whole, keys=("step", "loss"))
    assert kept == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in full[3::4]]
    assert kept[0] != full[4]  # control
    assert rows(tmp_path, "eval", ("step",)) == rows(whole, "eval", ("step",))
    assert '"config"' not in (tmp_path / "metrics.jsonl").read_text()


# -------------------------------------------------------------------------------------------------
# The parts of a state

@pytest.fixture
def stopped(data, tmp_path):
    """A run that was stopped after 10 of 20 steps."""
    assert run(data, tmp_path / "stopped", "--stop_at", 10) == 75
    return tmp_path / "stopped"


def state_of(folder):
    return checkpoint.load(durable.newest(folder))


def test_edit_changes_what_it_names(stopped, tmp_path):
    """Catches: a part that is not set to 0, and one that is and was not named; a changed source."""
    before = state_of(stopped)
    assert not edit_state.main([stopped, tmp_path / "new", "--zero", "exp_avg_sq"])
    state = state_of(tmp_path / "new")
    assert trees.differences(before, state_of(stopped)) == []
    changed = trees.differences(before, state)
    assert changed == sorted(f"optimizer.{name}.exp_avg_sq" for name in before["model"])
    assert all(not each["exp_avg_sq"].any() for each in state["optimizer"].values())
    assert all(each["exp_avg"].any() for each in state["optimizer"].values())  # control
    state["optimizer"]["lm_head.weight"] = {}  # as of a weight that had no gradient
    edit_state.zero(state, "exp_avg")
    assert not any(each["exp_avg"].any() for each in state["optimizer"].values() if each)

    assert not edit_state.main([stopped, tmp_path / "bit", "--flip_bit"])
    state = state_of(tmp_path / "bit")
    name, *more = trees.differences(before, state)
    name = name.removeprefix("model.")
    old, new = before["model"][name].bfloat16(), state["model"][name].bfloat16()
    assert more == [] and (new != old).sum() == 1
    assert torch.allclose(new, old, rtol=0.01)


def test_edited_runs_go_on_as_they_should(data, stopped, tmp_path):
    """Catches: an edited state whose resume is not the one of the formula. All three parts at 0 are
    what --reset_optimizer makes; one bit is seen by bf16, and moves the losses little."""
    def losses(name, *flags):
        edit_state.main([stopped, tmp_path / name, *flags])
        assert exit_code(train.main, ["--run", tmp_path / name, "--resume"]) == 0
        return rows(tmp_path / name)

    zeros = losses("zeros", "--zero", "exp_avg", "--zero", "exp_avg_sq", "--zero", "step")
    second = losses("second", "--zero", "exp_avg_sq")
    bit, same = losses("bit", "--flip_bit"), losses("same")
    assert bit != same and np.allclose(bit, same, rtol=0.01)
    reset = ["--run", stopped, "--resume", "--reset_optimizer"]
    assert exit_code(train.main, reset) == 0
    assert zeros == rows(stopped)
    assert second != rows(stopped) and not np.allclose(zeros, same, rtol=0.01)  # controls


@pytest.mark.parametrize("change, message", [
    (["--zero", "exp"], "--zero exp: the optimizer keeps exp_avg, exp_avg_sq, step"),
    (["--seed", 2**32], "--seed: 4294967296 is out of range"),
])
def test_mistake_in_an_edit_is_one_line(stopped, tmp_path, capsys, change, message):
    """Catches: a traceback, and a run that is made all the same."""
    capsys.readouterr()
    assert exit_code(edit_state.main, [stopped, tmp_path / "new", *change]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_edit_needs_a_stopped_run_and_a_new_folder(whole, stopped, tmp_path, capsys):
    """Catches: a run that is written over; a change that nothing would follow."""
    for source, new, message in ((stopped, whole, "exists already"), (whole, "x", "is finished"),
                                 (tmp_path / "no", "x", "has no checkpoint")):
        assert exit_code(edit_state.main, [source, tmp_path / new]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("way", ["first", "both", "count", "all"])
def test_predicted_updates_are_those_of_noise(way):
    """Catches: a wrong formula. PyTorch's AdamW, given noise, makes the updates."""
    parts = importlib.import_module("9_state")
    zeroed = parts.PARTS[way][2]
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.zeros(50_000))
    optimizer = torch.optim.AdamW([weights], lr=1.0, betas=(0.9, 0.99), weight_decay=0)
    sizes = []
    for step in range(201):
        if step == 200:
            for part in zeroed:
                optimizer.state[weights][part].zero_()
        weights.grad = torch.randn(50_000)
        before = weights.detach().clone()
        optimizer.step()
        sizes.append((weights - before).detach().square().mean().sqrt().item())
    usual, edited = parts.predicted([], 0.99, 0), parts.predicted(zeroed, 0.99, 1)
    assert sizes[199:] == pytest.approx([usual, edited], rel=0.03)
    assert sizes[200] != pytest.approx(usual, rel=0.03)  # control


# -------------------------------------------------------------------------------------------------
# Repeats

def test_sequences_repeat_and_differ(tmp_path):
    """Catches: copies of another length than said; the same sequence twice; a validation sequence
    that was trained on."""
    assert not repeats.main(["make", tmp_path / "r", "--sequences", "50"])
    seen = set()
    for split in ("train", "val"):
        tokens = np.load(tmp_path / "r" / f"{split}_0000.npy")
        for row in tokens[:-1].reshape(-1, repeats.WINDOW):
            periods = [p for p in range(1, 65) if (row[p:] == row[:-p]).all()]
            assert 16 <= periods[0] <= 32
            seen.add(row.tobytes())
    assert len(seen) == 50 + 256


@pytest.mark.parametrize("shift, share", [(31, 1), (32, 0)], ids=["behind", "control: the same"])
def test_prefix_matching_of_known_attention(monkeypatch, shift, share):
    """Catches: attention to another place than the one after the last occurrence; a score that is
    not a share. The first head looks `shift` places back, to where a token stands that came 32
    places back. The queries of the second are 0: at position i, i + 1 places have equal weight."""
    def forward(self, x, cos, sin, mask, cache=None):
        B, T, _ = x.shape
        k = 100 * torch.eye(T).expand(B, 1, T, T)
        back = k.roll(shift, dims=2)  # the row of position i is that of i − shift
        q = torch.cat([back, 0 * k], dim=1)
        self.attend(q, k, k, mask[:T, :T])
        return x

    monkeypatch.setattr(model.Attention, "forward", forward)
    network = model.Llama(replace(TEST, max_seq_len=128))
    found = repeats.score(network, repeats.sequences_like(64, None, n=2))
    uniform = np.mean([1 / (i + 1) for i in range(32, 127)])
    assert np.shape(found["prefix_matching"]) == (TEST.n_layers, 2)
    assert np.allclose(found["prefix_matching"], [share, uniform], atol=1e-3, rtol=1e-5)
    assert network.model.layers[0].self_attn.attend is model.attention  # as before
