"""What may happen to a run, and what must follow: after a fault the same command, repeated, ends in
the same bits as a run without one. Rows are those of the table of faults.

Each group has a control, which shows that a difference would be seen.
"""
import errno
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import evaluate
import sample
import train
from conftest import CHILD, FLAGS, ROOT, evals, exit_code, messages, rows, run, same, state
from support import devices, durable, files, flags, runs, trees
from support.runs import UserError

pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.fixture
def resume(server, data):
    """Runs the same command with --resume in a forked process, with or without a fault."""
    def resumed(folder, *flags, **options):
        return server("--data", data, "--run", folder, "--resume", *flags, **options)
    return resumed


@pytest.fixture(scope="module")
def stopped(server, data, tmp_path_factory):
    """A run stopped at step 15. Its full states are those of steps 10 and 15."""
    folder = tmp_path_factory.mktemp("stopped") / "r"
    assert server("--data", data, "--run", folder, "--stop_at", 15)["code"] == 75
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of the stopped run."""
    return shutil.copytree(stopped, tmp_path / "copy")


def steps(folder):
    return [row[0] for row in rows(folder)]


def first(n):
    """Steps 1 to n."""
    return list(range(1, n + 1))


def newest(folder):
    """The step of the newest full state that is undamaged."""
    return int(durable.find(folder, full=True).name[5:])


def place(folder, step):
    return folder / "checkpoints" / f"step_{step:08d}"


def log_of(folder):
    """The questions and samples that equal runs have in common; `same` compares the rest."""
    return rows(folder, "benchmark", ("step", "acc", "n")), rows(folder, "sample", ("step", "text"))


# -------------------------------------------------------------------------------------------------
# Killed

SHORT = ("--max_steps", 6, "--save_every", 3)  # saves at 0, 1, 2, 3, 4 and 6, and prunes


@pytest.fixture(scope="module")
def short(server, data, tmp_path_factory):
    """A run with SHORT that was not disturbed: its folder, file operations and seconds."""
    for name in ("warm", "r"):
        folder = tmp_path_factory.mktemp("short") / name
        begin = time.monotonic()
        found = server("--data", data, "--run", folder, *SHORT)
    assert found["code"] == 0
    assert found["operations"] > 150
    return SimpleNamespace(folder=folder, operations=found["operations"],
                           seconds=time.monotonic() - begin)


def ends_like(resume, folder, short):
    """The killed run, resumed, ends like the undisturbed one and leaves nothing unfinished."""
    assert resume(folder, *SHORT)["code"] == 0
    assert same(folder, short.folder, 6)
    assert log_of(folder) == log_of(short.folder)
    assert not list((folder / "checkpoints").glob(".tmp*"))
    for step in durable.checkpoints(folder).values():
        files = {path.name for path in step.iterdir()} - {".meta.json.tmp"}
        assert files == {"meta.json", *durable.read_meta(step)["files"]}
    return True


@pytest.mark.row(4, 28, 30)
@pytest.mark.parametrize("every", [47, pytest.param(3, marks=pytest.mark.slow)])
def test_kill_at_every_file_operation_changes_nothing(resume, short, tmp_path, every):
    """Catches: a save or a prune that is not whole at some moment. (For lack of time at every
    third one, or 47th, beginning at another one each time.)"""
    folder = tmp_path / "r"
    for n in range(1 + os.getpid() % every, short.operations + 1, every):
        assert resume(folder, *SHORT, fault=["kill", n])["code"] == -signal.SIGKILL
        if durable.checkpoints(folder):
            assert newest(folder) >= 0  # raises if none can be used
        assert ends_like(resume, folder, short), f"killed at operation {n}"
        shutil.rmtree(folder)


@pytest.mark.row(3)
def test_kill_at_20_random_moments_changes_nothing(resume, short, tmp_path):
    """Catches: a moment without a file operation at which a kill changes the run."""
    draw = random.Random(os.getpid())
    folder = tmp_path / "r"
    kills = 0
    while kills < 20:
        found = resume(folder, *SHORT, kill_after=draw.uniform(0, short.seconds))
        if found["code"] == -signal.SIGKILL:
            kills += 1  # often killed again
        else:
            assert ends_like(resume, folder, short)
            shutil.rmtree(folder)
    assert ends_like(resume, folder, short)


@pytest.mark.row(41)
@pytest.mark.parametrize("where, step, logged, saved", [
    ("evaluate", 0, 0, 0), ("benchmark", 4, 4, 4), ("sample", 4, 4, 4), ("evaluate", 6, 6, 6),
    ("step", 6, 5, 4),  # control: there are kills that lose steps
])
def test_kill_in_an_evaluation_loses_no_step(resume, short, tmp_path, where, step, logged, saved):
    """Catches: an evaluation or a sample before the save that is due at the same step; a resume
    that does not repeat it, or that logs it twice."""
    folder = tmp_path / "r"
    fault = ["signal", where, step, "SIGKILL"]
    assert resume(folder, *SHORT, fault=fault)["code"] == -signal.SIGKILL
    assert steps(folder) == first(logged)
    assert newest(folder) == saved
    assert ends_like(resume, folder, short)


@pytest.mark.row(9, 28)
def test_leftovers_of_a_kill_are_removed_by_the_holder_of_the_lock(resume, copy):
    """Catches: half a checkpoint that stays; a second process that removes what the first one is
    writing."""
    half = copy / "checkpoints/.tmp_step_00000030"
    half.mkdir()
    lock = runs.hold(copy)
    assert not half.exists()
    half.mkdir()  # now it is of the run that holds the lock
    assert resume(copy)["code"] == 2
    assert half.exists()
    os.close(lock)
    assert resume(copy, "--stop_at", 15)["code"] == 75
    assert not half.exists()


class Killed(BaseException):
    """In the place of SIGKILL, in a process that goes on."""


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in (folder / "checkpoints").glob("step_*/*.*")}


@pytest.mark.row(4)
@pytest.mark.parametrize("keep_every", [0, 10])  # step 10 is removed, or shrinks to its weights
def test_prune_is_whole_at_every_moment(stopped, tmp_path, monkeypatch, keep_every):
    """Catches: an old checkpoint that is half removed, or whose meta.json promises a file that is
    gone."""
    left = 0  # file operations until the kill

    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return function(*args, **kwargs)
        return call

    for name in ("rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    found = []
    killed = True
    while killed:
        number = len(found) + 1
        folder = shutil.copytree(stopped, tmp_path / str(number))
        left = number
        try:
            durable.prune(folder, keep_last=1, keep_every=keep_every)
            killed = False
        except Killed:
            pass
        for step in durable.checkpoints(folder).values():
            promised = durable.read_meta(step)["files"]
            for name in promised:
                durable.verify(step, name, promised)
        left = 0
        durable.prune(folder, keep_last=1, keep_every=keep_every)  # at the next save
        found.append(files_of(folder))
    assert all(files == found[0] for files in found)
    assert len(found) > 2
    assert found[0] != files_of(stopped)  # control


@pytest.mark.row(4)
@pytest.mark.slow
def test_kill_while_starting_over_never_mixes_two_runs(server, data, stopped, tmp_path):
    """Catches: rows or checkpoints of the run before in the one that overwrites it."""
    other = ("--data", data, "--seed", 2, *SHORT)
    whole = tmp_path / "whole"
    folder = tmp_path / "r"
    assert server(*other, "--run", whole)["code"] == 0
    for n in range(1, 40, 3):
        shutil.copytree(stopped, folder)
        found = server(*other, "--run", folder, "--overwrite", fault=["kill", n])
        assert found["code"] == -signal.SIGKILL
        found = server(*other, "--run", folder, "--resume")
        if found["code"] == 2:  # still the old run, or what is left of it
            found = server(*other, "--run", folder, "--overwrite")
        assert found["code"] == 0
        assert same(folder, whole, 6)
        assert steps(folder) == first(6)
        shutil.rmtree(folder)


# -------------------------------------------------------------------------------------------------
# Damaged

def flipped(content, at):
    """The same bytes, but for one bit."""
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1:]


def flip(path):
    content = path.read_bytes()
    path.write_bytes(flipped(content, len(content) // 2))


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def damages(folder):
    """(file, its damaged content) in the folder of step 15."""
    meta = (folder / "meta.json").read_bytes()
    other_hash = meta.replace(b'"sha256": "', b'"sha256": "0', 1)
    other_step = meta.replace(b'"step": 15', b'"step": 14')
    found = [("meta.json", content) for content in (b"", meta[:99], other_hash, other_step)]
    for name in ("model.pt", "train_state.pt"):
        content = (folder / name).read_bytes()
        last = len(content) - 1
        found += [(name, content[:size]) for size in (0, 1, last // 2, last)]
        found += [(name, flipped(content, at)) for at in (9, last // 2, last)]
    return found


@pytest.mark.row(5, 6, 7)
def test_every_damage_of_a_checkpoint_is_seen(copy, capsys):
    """Catches: a damaged state that is used, or skipped without a word."""
    folder = place(copy, 15)
    for name, content in damages(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        assert newest(copy) == 10
        assert "step_00000015 is damaged" in capsys.readouterr().err
        (folder / name).write_bytes(whole)
        assert newest(copy) == 15  # control


@pytest.mark.row(5, 6, 7)
@pytest.mark.parametrize("name, damage", [("meta.json", Path.unlink), ("model.pt", flip)])
def test_damaged_checkpoint_is_named_and_skipped(resume, copy, whole, name, damage):
    """Catches: a damaged state that ends a run with an older good one, that counts as kept, so that
    the last good one is removed, or that is in the way of the good one of the same step."""
    damage(place(copy, 15) / name)
    found = resume(copy, "--save_every", 12, "--stop_at", 12)
    assert found["code"] == 75
    assert "step_00000015 is damaged" in found["stderr"]
    assert rows(copy, "resume", ("step",)) == [(10,)]
    assert max(durable.checkpoints(copy)) == 12  # no damaged one counts as kept later
    for step in (10, 12):
        promised = durable.read_meta(place(copy, step))["files"]
        durable.verify(place(copy, step), "train_state.pt", promised)
    durable.remove(place(copy, 12))
    assert resume(copy)["code"] == 0
    assert same(copy, whole)
    assert steps(copy) == first(20)


@pytest.mark.row(8)
def test_run_without_a_good_checkpoint_never_starts_over(data, copy, capsys):
    """Catches: a silent restart from step 0 that deletes the run."""
    log = (copy / "metrics.jsonl").read_bytes()
    for folder in durable.checkpoints(copy).values():
        flip(folder / "model.pt")
    assert run(data, copy, "--resume") == 2
    message = messages(capsys)[-1]
    for step in (10, 15):
        assert f"step {step}: model.pt is not what was written" in message
    assert (copy / "metrics.jsonl").read_bytes() == log


@pytest.mark.row(8)
def test_run_without_checkpoints_never_starts_over(data, copy, capsys):
    """Catches: checkpoints on a disk that is not mounted taken for a run that has not begun."""
    (copy / "checkpoints").rename(copy / "elsewhere")
    log = (copy / "metrics.jsonl").read_bytes()
    assert run(data, copy, "--resume") == 2
    assert "holds a run but no checkpoint" in messages(capsys)[-1]
    assert (copy / "metrics.jsonl").read_bytes() == log
    (copy / "elsewhere").rename(copy / "checkpoints")  # control
    assert run(data, copy, "--resume", "--stop_at", 15) == 75


@pytest.mark.row(38)
@pytest.mark.parametrize("main", [sample.main, evaluate.main])
def test_readers_skip_damaged_checkpoints(copy, tmp_path, capsys, main):
    """Catches: a sample or a score of damaged weights; a traceback, also at a wrong path."""
    assert not exit_code(main, [copy])
    assert "damaged" not in capsys.readouterr().err  # control
    flip(place(copy, 15) / "model.pt")
    assert not exit_code(main, [copy])
    assert "step_00000015 is damaged" in capsys.readouterr().err
    for folder in durable.checkpoints(copy).values():
        os.truncate(folder / "model.pt", 1)
    for argv, message in [([copy], "no usable checkpoint (step 15: "),
                          ([copy, "--step", 15], "no usable checkpoint (step 15: "),
                          ([tmp_path / "absent"], "no such run")]:
        assert exit_code(main, argv) == 2
        assert message in messages(capsys)[-1]


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.row(31)
@pytest.mark.parametrize("name", ["model.pt", "train_state.pt"])
def test_checkpoint_that_runs_code_is_refused(data, copy, tmp_path, capsys, name):
    """Catches: code in a downloaded checkpoint that runs, or that is skipped in silence."""
    exploded = tmp_path / "exploded"
    contents = {file: durable.load_file(place(copy, 15) / file)
                for file in ("model.pt", "train_state.pt")}
    contents[name]["bomb"] = Bomb(exploded)
    durable.write_checkpoint(copy, 15, contents)  # with the right hash
    assert run(data, copy, "--resume") == 2
    message, = messages(capsys)
    assert f"{name}: holds more than tensors and plain values, so it is not loaded" in message
    assert not exploded.exists()
    torch.load(place(copy, 15) / name, weights_only=False)
    assert exploded.exists()  # control: the bomb works


@pytest.fixture
def restored(stopped):
    """Restores a state into a new network and its optimizer; returns the moments there."""
    def restore(state):
        model, _, _ = checkpoint.load_model(stopped)
        optimizer = train.make_optimizer(model, train.read_settings(FLAGS), torch.device("cpu"))
        checkpoint.restore(state, model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
        return checkpoint.moments_of(optimizer, model)
    return restore


@pytest.fixture
def saved(stopped):
    """The full state of step 15."""
    return checkpoint.load(place(stopped, 15))


UP = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]  # of one shape


@pytest.mark.row(32)
def test_moments_are_restored_by_name(saved, restored):
    """Catches: moments that another parameter gets when the code creates them in another order."""
    moments = saved["optimizer"]
    saved["optimizer"] = dict(reversed(moments.items()))
    assert trees.differences(restored(saved), moments) == []
    # control: by position these two would be taken for each other
    saved["optimizer"] = {**moments, UP[0]: moments[UP[1]], UP[1]: moments[UP[0]]}
    assert trees.differences(restored(saved), moments) != []


def rename_norm(weights):
    return {name.replace("model.norm", "model.scale"): tensor for name, tensor in weights.items()}


@pytest.mark.row(32)
@pytest.mark.parametrize("path, change, message", [
    (["model"], rename_norm, r"weights do not fit .*model.scale.weight \(.*absent in the"),
    (["model", UP[0]], torch.Tensor.flatten, r"up_proj.weight \(\(2048,\) float32 saved"),
    (["model", UP[0]], torch.Tensor.half, r"up_proj.weight \(\(64, 32\) float16 saved"),
    (["optimizer"], lambda moments: {}, r"optimizer state do not fit"),
    (["optimizer", UP[0], "exp_avg"], torch.Tensor.flatten, r"exp_avg \(\(2048,\) float32 saved"),
    (["optimizer", UP[0], "exp_avg"], torch.Tensor.half, r"exp_avg \(\(64, 32\) float16 saved"),
    (["updates"], lambda number: 14, r"is of 15 updates, not of 14"),
    (["rng"], lambda state: {}, r"the checkpoint cannot be used \(KeyError: 'cpu'\)"),
])
def test_state_of_another_network_is_refused(saved, restored, path, change, message):
    """Catches: weights or moments that are left out, or loaded into another parameter."""
    part = saved
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = change(part[path[-1]])
    with pytest.raises(UserError, match=message):
        restored(saved)


def test_state_of_another_step_is_refused(copy):
    """Catches: a renamed checkpoint, with which the data would go on at another place."""
    place(copy, 15).rename(place(copy, 16))
    with pytest.raises(UserError, match="holds the state of step 15"):
        checkpoint.load(place(copy, 16))


def test_settings_that_are_newer_have_their_default(data, copy, saved, capsys, monkeypatch, whole):
    """Catches: runs that a new flag or a new field of ModelConfig makes unusable; the default of a
    preset, which is not what the code did before the flag."""
    monkeypatch.setitem(train.BY_PRESET["test"], "beta2", 0.5)
    assert saved["config"].pop("beta2") == 0.95
    assert saved["model_config"].pop("rope_theta") == 500_000.0
    checkpoint.save(copy, saved, keep_last=2, keep_every=0)
    assert run(data, copy, "--resume") == 0
    printed = capsys.readouterr().err
    assert "does not have the settings beta2 0.95: the default is used" in printed
    assert "config does not have rope_theta 500000.0: the default is used" in printed
    assert same(copy, whole)
    assert train.read_settings(["--preset", "test"]).beta2 == 0.5  # control


# -------------------------------------------------------------------------------------------------
# The disk

@pytest.mark.row(10)
@pytest.mark.parametrize("fault, reason", [
    (["full", 5], "No space left on device"),  # from this write into a checkpoint on
    (["full", 260], "No space left on device"),
    (["limit", 60_000], "File too large"),
])
def test_full_disk_keeps_older_checkpoints(resume, short, tmp_path, fault, reason):
    """Catches: half a checkpoint in the place of a whole one; PyTorch's "unexpected pos" in the
    place of the system's reason."""
    folder = tmp_path / "r"
    found = resume(folder, *SHORT, fault=fault)
    assert found["code"] == 4
    message, = found["stderr"].strip().splitlines()
    assert f"{reason}); it needs " in message
    assert " MB are free" in message
    assert not list(folder.glob("checkpoints/.tmp*"))
    for step in durable.checkpoints(folder).values():
        durable.verify(step, "model.pt", durable.read_meta(step)["files"])
    assert ends_like(resume, folder, short)


@pytest.mark.row(12)
def test_disk_too_small_for_one_state_ends_before_the_first_step(resume, tmp_path):
    """Catches: hours of training that cannot be saved."""
    assert resume(tmp_path / "r", fault=["full", 1])["code"] == 4
    assert evals(tmp_path / "r") == []


@pytest.mark.row(12)
def test_unusable_folder_is_one_line(data, tmp_path, capsys):
    """Catches: a run folder that cannot be made, found after the first step."""
    (tmp_path / "file").write_text("")
    assert run(data, tmp_path / "file/r") == 2
    message, = messages(capsys)
    assert "r: Not a directory" in message


@pytest.mark.row(11)
@pytest.mark.parametrize("n", [1, 20])  # which line of the log is cut
def test_half_a_line_of_a_full_disk_is_not_taken_for_a_line(resume, short, tmp_path, n):
    """Catches: a log that goes on after half a line; a full disk that nobody sees."""
    folder = tmp_path / "r"
    found = resume(folder, *SHORT, fault=["log full", n])
    assert found["code"] == 4
    assert "metrics.jsonl: not written at step" in found["stderr"]
    assert not (folder / "metrics.jsonl").read_text().endswith("\n")
    assert ends_like(resume, folder, short)
    assert steps(folder) == first(6)


@pytest.mark.row(30)
def test_log_that_was_changed_is_refused(data, copy, capsys):
    """Catches: rows that are lost or cut in the middle because the log is not the saved one."""
    log = copy / "metrics.jsonl"
    text = log.read_text()
    for changed in (text[:len(text) // 2], text.replace(" ", "", 3)):
        log.write_text(changed)
        assert run(data, copy, "--resume") == 2
        assert "was changed since the state to resume was saved" in messages(capsys)[-1]
    log.write_text(text)  # control
    assert run(data, copy, "--resume", "--stop_at", 15) == 75


@pytest.mark.row(4)
def test_save_is_forced_to_the_disk_before_its_rename(data, tmp_path, monkeypatch):
    """Catches: a checkpoint that after a power failure has its name but not its bytes, or that
    counts rows of the log that are not on the disk."""
    fsync = os.fsync
    rename = os.rename
    log = tmp_path / "r/metrics.jsonl"
    forced = set()  # inodes since the last commit
    commits = []  # how many files each has

    def watched_fsync(handle):
        forced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def watched_rename(source, target):
        if Path(target).name.startswith("step_"):
            inodes = {path.stat().st_ino for path in [*source.iterdir(), log]}
            commits.append(len(inodes))
            assert inodes <= forced
            forced.clear()
        rename(source, target)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    assert run(data, tmp_path / "r", "--stop_at", 2) == 75
    assert commits == [4, 4, 4]  # three files and the log
    assert (tmp_path / "r/checkpoints").stat().st_ino in forced  # the rename itself


SAVE_1_GB = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch, checkpoint
from model import Llama, ModelConfig
from support import durable, trees

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

run = Path(sys.argv[2])
model = Llama(ModelConfig(dim=1024, n_layers=4, n_heads=16, n_kv_heads=4, intermediate_size=2816,
                          vocab_size=30_000, max_seq_len=64))
optimizer = torch.optim.AdamW(model.parameters())
for parameter in model.parameters():
    parameter.grad = torch.full_like(parameter, 1e-3)
optimizer.step()
optimizer.zero_grad()
scaler = torch.amp.GradScaler("cpu", enabled=False)
progress = checkpoint.Progress(step=1, tokens=1, seconds=1.0, updates=1)
state = checkpoint.capture(model, optimizer, scaler, progress, config={}, env={}, data=[],
                           log_bytes=0)
size = sum(tensor.nbytes for tensor in trees.named_tensors(state).values())
largest = max(parameter.nbytes for parameter in model.parameters())
open("/proc/self/clear_refs", "w").write("5")  # the peak of memory starts anew
before = memory("VmRSS")
start = time.perf_counter()
checkpoint.save(run, state, keep_last=2, keep_every=0)
saved = time.perf_counter()
extra = memory("VmHWM") - before
folder = durable.find(run, full=True)
verified = time.perf_counter()
checkpoint.load(folder)
loaded = time.perf_counter()
print(f"{size / 1e9:.2f} GB: saved in {saved - start:.1f} s, verified in {verified - saved:.1f} s, "
      f"loaded in {loaded - verified:.1f} s; saving took {extra / 1e9:.2f} GB more memory, the "
      f"largest tensor has {largest / 1e9:.2f} GB")
assert size > 1e9
assert extra < largest, extra
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_needs_no_second_copy_in_memory(tmp_path):
    """Catches: a save that copies the state, for which a GPU machine may lack the memory."""
    command = [sys.executable, "-c", SAVE_1_GB, str(ROOT), str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True)
    print(child.stdout, child.stderr)
    shutil.rmtree(tmp_path / "checkpoints")
    assert child.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_share_what_they_load(tmp_path, monkeypatch):
    """Catches: eight copies of a state of 20 GB in the memory of a machine; a change of one process
    that reaches the file, and so the others."""
    file = tmp_path / "model.pt"
    durable.write_file(file, {"w": torch.ones(1000)})
    for several in (False, True):  # False: control
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: several)
        loaded = durable.load_file(file)["w"]
        assert (str(file) in Path("/proc/self/maps").read_text()) == several
        loaded += 1
        assert durable.load_file(file)["w"].sum() == 1000


@pytest.mark.row(60)
def test_old_state_that_cannot_be_removed_ends_nothing(data, copy, capsys, monkeypatch):
    """Catches: a training that ends although the new state is on the disk; a refusal without a
    word, or one that no later save tries again; a folder that --overwrite cannot free."""
    rename = os.rename

    def refused(path, target):
        if Path(path).name.startswith("step_"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        assert run(data, copy, "--resume") == 0
    assert "step_00000010: not removed (Device or resource busy)" in capsys.readouterr().err
    assert {10, 15, 20} <= set(durable.checkpoints(copy))
    assert run(data, copy, "--resume", "--max_steps", 21) == 0
    assert not {10, 15} & set(durable.checkpoints(copy))  # tried again

    with monkeypatch.context() as patch:  # a network drive keeps files that are open
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
        assert run(data, copy, "--overwrite", "--stop_at", 0) == 75
    assert "not removed; it takes room" in capsys.readouterr().err
    assert run(data, copy, "--overwrite", "--stop_at", 0) == 75
    assert not list(copy.glob(".tmp_*"))


@pytest.mark.row(60)
def test_folder_that_cannot_be_forced_to_the_disk_is_said(data, tmp_path, capsys, monkeypatch):
    """Catches: a network drive on which no run begins; a file that is not on the disk, taken for
    such a folder."""
    fsync = os.fsync
    refuses = stat.S_ISDIR

    def refused(handle):
        if refuses(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refused)
    runs.warn.cache_clear()
    assert run(data, tmp_path / "r", "--stop_at", 2) == 75
    assert capsys.readouterr().err.count("folders cannot be forced to the disk") == 1
    refuses = stat.S_ISREG  # control
    with pytest.raises(OSError, match="config.json"):
        files.sync(tmp_path / "r/config.json")


# -------------------------------------------------------------------------------------------------
# Signals

@pytest.mark.row(18)
@pytest.mark.parametrize("where, name", [
    ("step", "SIGTERM"), ("step", "SIGHUP"), ("step", "SIGUSR1"), ("evaluate", "SIGINT"),
    ("save", "SIGINT"),
])
def test_signal_saves_the_step(resume, short, tmp_path, where, name):
    """Catches: a step that is lost, or half done, when the run is told to stop."""
    folder = tmp_path / "r"
    assert resume(folder, *SHORT, fault=["signal", where, 4, name])["code"] == 75
    last = 4 if where == "step" else 5  # outside of a step, one more is made
    assert steps(folder) == first(last)
    assert newest(folder) == last
    end = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"reason": "stopped"' in end  # as a job script may look for it, see docs/1.7b.md
    assert ends_like(resume, folder, short)


def test_stop_at_the_last_step_leaves_its_evaluation_to_the_resume(resume, short, tmp_path):
    """Catches: a run that counts as finished without its last evaluation."""
    folder = tmp_path / "r"
    assert resume(folder, *SHORT, fault=["signal", "step", 6, "SIGTERM"])["code"] == 75
    assert newest(folder) == 6
    assert evals(folder) == evals(short.folder)[:-1]
    assert ends_like(resume, folder, short)


@pytest.mark.row(18, 50)
@pytest.mark.parametrize("names, code, saved", [
    (["SIGTERM", "SIGTERM"], 75, 5),
    (["SIGINT", "SIGINT"], -signal.SIGINT, 4),
])
def test_second_signal_at_once(resume, short, tmp_path, names, code, saved):
    """Catches: a cluster that sends one stop twice and so prevents the save; a second Ctrl-C that
    does not end the process."""
    folder = tmp_path / "r"
    assert resume(folder, *SHORT, fault=["signal", "step", 5, *names])["code"] == code
    assert newest(folder) == saved
    assert ends_like(resume, folder, short)


@pytest.mark.row(50)
def test_second_signal_after_10_seconds_ends_the_process(monkeypatch):
    """Catches: a process that cannot be stopped any more, as its save hangs."""
    raised = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    stop = devices.StopSignals(SimpleNamespace(say=print))
    for now in (1000, 1009, 1011):
        assert raised == []
        monkeypatch.setattr(devices.time, "monotonic", lambda: now)
        os.kill(os.getpid(), signal.SIGTERM)
    stop.restore()
    assert raised == [signal.SIGTERM]


@pytest.mark.row(18)
def test_ignored_hangup_stays_ignored():
    """Catches: a run under nohup that ends with its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = devices.StopSignals(SimpleNamespace(say=print))
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested
    os.kill(os.getpid(), signal.SIGTERM)  # control
    assert stop.requested
    stop.restore()
    signal.signal(signal.SIGHUP, before)


@pytest.mark.row(18, 50)
def test_stop_while_the_output_waits():
    """Catches: a traceback of the handler's own line, and so a stop that saves nothing, if another
    print waits for the terminal: after Ctrl-S, or before a reader that does not read."""
    code = """
import sys
from types import SimpleNamespace
from support import devices, runs
stop = devices.StopSignals(SimpleNamespace(say=runs.print_anyway))
print("ready", file=sys.stderr, flush=True)
while not stop.requested:
    runs.print_anyway("x" * 1000)
runs.print_anyway("saved")
"""
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr.readline() == "ready\n"
    time.sleep(0.5)  # until the pipe is full
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (0, "")
    assert stdout.endswith("x\nsaved\n")


def test_signals_that_windows_lacks_are_left_out(monkeypatch):
    """Catches: a training that cannot begin there."""
    for name in ("SIGUSR1", "SIGHUP"):
        monkeypatch.delattr(signal, name)
    stop = devices.StopSignals(SimpleNamespace(say=print))
    assert sorted(stop.before) == [signal.SIGINT, signal.SIGTERM]
    stop.restore()


# -------------------------------------------------------------------------------------------------
# Whole processes, one or two

def start(data, folder, *flags, stdout=subprocess.DEVNULL, rank=None, port=None, before=""):
    """train.py --resume as a process of its own; as one of two if `rank` is given. before: what it
    runs first."""
    child = folder.parent / "child.py"
    child.write_text(CHILD.replace("sys.exit", f"{before}\nsys.exit"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if rank is not None:
        env.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    argv = [*FLAGS, "--data", data, "--run", folder, "--resume", *flags]
    command = [sys.executable, str(child), *map(str, argv)]
    return subprocess.Popen(command, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True)


def two(data, folder, *flags, before=""):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--micro_batch", 2, *flags)
    return [start(data, folder, *flags, rank=rank, port=port, before=before) for rank in (0, 1)]


def ends(processes):
    """Wait for them; returns their exit codes and their error messages."""
    messages = [process.communicate(timeout=60)[1] for process in processes]
    print(*messages)  # shown when the test fails
    return [process.returncode for process in processes], messages


def wait_for(folder, step):
    """Wait until the log has that many steps."""
    log = folder / "metrics.jsonl"
    end = time.monotonic() + 60
    while not log.exists() or log.read_text().count('"train"') < step:
        assert time.monotonic() < end
        time.sleep(0.01)


def distance(folder, other):
    """The largest relative difference of the losses of two runs of equal length."""
    ours = np.array(rows(folder, keys=("loss",)))
    theirs = np.array(rows(other, keys=("loss",)))
    assert len(ours) == len(theirs)
    return np.abs(ours / theirs - 1).max()


@pytest.mark.row(15)
def test_number_of_processes_may_change(data, whole, tmp_path):
    """Catches: a batch that two processes read twice or in part, gradients that are averaged
    where the sum is meant; a state that only as many processes can read."""
    folder = tmp_path / "r"
    assert run(data, folder, "--stop_at", 5) == 75
    codes, _ = ends(two(data, folder, "--stop_at", 14))
    assert codes == [75, 75]
    assert run(data, folder, "--resume") == 0
    worlds = [env["world_size"] for env, in rows(folder, "resume", ("env",))]
    assert worlds == [2, 1]
    assert rows(folder, keys=("step", "tokens")) == rows(whole, keys=("step", "tokens"))
    assert distance(folder, whole) < 1e-5
    # control
    assert run(data, tmp_path / "other", "--seed", 2) == 0
    assert distance(tmp_path / "other", whole) > 1e-3


@pytest.mark.row(15)
@pytest.mark.slow
def test_two_processes_train_the_same_run(data, tmp_path):
    """Catches: as the test before, over 50 steps; evaluations of a part of the text or of the
    questions."""
    flags = ("--max_steps", 50, "--micro_batch", 2, "--benchmark_from", 0)
    codes, _ = ends(two(data, tmp_path / "two", *flags))
    assert codes == [0, 0]
    assert run(data, tmp_path / "one", *flags) == 0
    assert distance(tmp_path / "two", tmp_path / "one") < 1e-5
    for event, keys in (("eval", ("step", "val_loss")), ("benchmark", ("step", "acc", "acc_pmi"))):
        scores = rows(tmp_path / "one", event, keys)
        assert np.allclose(rows(tmp_path / "two", event, keys), scores, rtol=1e-5)
        assert scores[0][1:] != scores[-1][1:]  # control


@pytest.mark.slow
def test_closed_screen_does_not_end_the_training(data, whole, tmp_path):
    """Catches: a run that ends with its terminal, or with `| head`."""
    process = start(data, tmp_path / "r", stdout=subprocess.PIPE)
    process.stdout.close()
    process.stdout = None
    codes, _ = ends([process])
    assert codes == [0]
    assert same(tmp_path / "r", whole)


@pytest.mark.row(47)
def test_surroundings_do_not_end_a_script_in_a_traceback(whole, tmp_path):
    """Catches: a file that takes the number of the closed stdout, and what is printed; a matplotlib
    backend that a notebook set and that does not exist here. (This script needs no torch.)"""
    command = f"{sys.executable} plot_dynamics.py {whole} --out {tmp_path} >&- 2>&-"
    env = {**os.environ, "MPLBACKEND": "nonsense"}
    assert subprocess.run(command, shell=True, env=env, cwd=ROOT).returncode == 0
    assert (tmp_path / "dynamics.png").read_bytes().startswith(b"\x89PNG")


# The disk of rank 0 is full at step 8.
FULL = """
import errno, os
from support import durable
write_file = durable.write_file
def full(path, obj):
    if "step_00000008" in str(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write_file(path, obj)
durable.write_file = full
"""

# Rank 1 waits for it in a call that does not return, as in NCCL.
HANGING = """
import os, time
evaluate = train.Observer.evaluate
def hang(self, step, log):
    if step == 8 and os.environ["RANK"] == "1":
        time.sleep(600)
    evaluate(self, step, log)
train.Observer.evaluate = hang
"""


@pytest.mark.row(51)
@pytest.mark.slow
@pytest.mark.parametrize("before", [FULL, FULL + HANGING], ids=["exchanges", "hangs"])
def test_failure_of_one_process_ends_the_other(data, tmp_path, before):
    """Catches: a rank that waits ten minutes for another one that could not save; one that ends in
    a traceback of gloo, or with another code."""
    processes = two(data, tmp_path / "r", "--benchmark_items", 1, before=before)
    begin = time.monotonic()
    codes, errors = ends(processes)
    assert time.monotonic() - begin < 45
    assert codes == [4, 4]
    assert "step_00000008: not saved ([Errno 28]" in errors[0]
    assert "another process failed with exit code 4" in errors[1]
    assert "Traceback" not in errors[0] + errors[1]


OTHERWISE = """
import os, sys
if os.environ["RANK"] == "1":
    sys.argv += ["--max_steps", "19"]
"""


@pytest.mark.row(46)
@pytest.mark.slow
def test_processes_with_other_settings_are_refused(data, tmp_path):
    """Catches: two processes of which one takes more steps and waits for the other for ever."""
    codes, errors = ends(two(data, tmp_path / "r", before=OTHERWISE))
    assert codes == [2, 2]
    assert "other settings or data than rank 0 (max_steps)" in errors[1]
    assert "another process failed with exit code 2" in errors[0]


@pytest.mark.row(46)
@pytest.mark.slow
def test_waiting_for_other_processes_is_reported(data, tmp_path):
    """Catches: a start that waits without a word for a process that does not come, or that Ctrl-C
    does not end."""
    first, second = two(data, tmp_path / "r")
    first.kill()
    watchdog = threading.Timer(50, second.kill)
    watchdog.start()
    assert "rank 1 of 2 is waiting for the others at 127.0.0.1:" in second.stderr.readline()
    second.send_signal(signal.SIGINT)
    codes, _ = ends([first, second])
    watchdog.cancel()
    assert codes == [-signal.SIGKILL, -signal.SIGINT]


@pytest.mark.row(19, 20)
@pytest.mark.slow
def test_signal_to_one_of_two_processes_stops_both(data, tmp_path):
    """Catches: one process that goes on alone and waits for ever; a killed one that leaves half a
    checkpoint."""
    folder = tmp_path / "r"
    processes = two(data, folder, "--max_steps", 2000)
    wait_for(folder, 20)
    processes[1].terminate()  # rank 1, which writes nothing
    codes, _ = ends(processes)
    assert codes == [75, 75]
    step = steps(folder)[-1]
    assert newest(folder) == step

    processes = two(data, folder, "--max_steps", 2000)
    wait_for(folder, step + 20)
    processes[1].kill()
    codes, _ = ends(processes)  # within a minute
    assert codes[0] not in (0, 75)
    step = newest(folder)
    assert run(data, folder, "--max_steps", step + 5, "--resume") == 0


@pytest.mark.row(18)
@pytest.mark.slow
def test_torchrun_passes_the_stop_on(data, tmp_path):
    """Catches: a launcher that is stopped before its workers have saved."""
    folder = tmp_path / "r"
    (tmp_path / "child.py").write_text(CHILD)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", "--", tmp_path / "child.py", *FLAGS, "--data", data,
                "--run", folder, "--max_steps", "5000", "--micro_batch", "2"]
    launcher = subprocess.Popen(torchrun, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(folder, 20)
    launcher.terminate()
    codes, _ = ends([launcher])
    assert codes != [0]
    assert rows(folder, "end", ("reason",)) == [("stopped",)]
    assert newest(folder) == steps(folder)[-1]


# -------------------------------------------------------------------------------------------------
# Another experiment, or the same one elsewhere

CHANGES = {
    "preset": ["--preset", "tiny"],
    **{name: [f"--{name}", 2] for name in train.SIZES},
    "init_from": ["--init_from", "runs/tiny"],
    "seed": ["--seed", 1],
    "batch_tokens": ["--batch_tokens", 64],
    "seq_len": ["--seq_len", 32],
    "lr": ["--lr", 0.02],
    "min_lr": ["--min_lr", 0.002],
    "warmup_steps": ["--warmup_steps", 7],
    "schedule": ["--schedule", "linear"],
    "weight_decay": ["--weight_decay", 0],
    "beta1": ["--beta1", 0.8],
    "beta2": ["--beta2", 0.9],
    "grad_clip": ["--grad_clip", 2],
    "shuffle": ["--no-shuffle"],
}


@pytest.mark.row(13)
def test_resume_of_another_experiment_is_refused(data, copy, capsys):
    """Catches: a flag that turns the run into another one half way; a message that has to be met
    once for each setting."""
    fixed = vars(train.read_settings(FLAGS)).keys() - {*flags.MAY_CHANGE, *flags.ONCE}
    assert set(CHANGES) == fixed
    saved = json.loads((copy / "config.json").read_text())
    log = (copy / "metrics.jsonl").read_bytes()
    assert run(data, copy, "--resume", *sum(CHANGES.values(), [])) == 2
    message, = messages(capsys)
    for name in CHANGES:
        assert f"{name} (saved {saved[name]}, given " in message
    assert (copy / "metrics.jsonl").read_bytes() == log
    assert run(data, copy, "--resume", "--lr", 0.01, "--stop_at", 15) == 75  # control


@pytest.mark.row(13, 16, 36)
def test_harmless_changes_are_printed_and_logged(data, copy, whole, capsys, one_thread_afterwards):
    """Catches: a change of speed or last bits that nobody can find afterwards."""
    changes = ("--eval_every", 2, "--micro_batch", 2, "--threads", 2)
    assert run(data, copy, "--resume", *changes, "--stop_at", 16) == 75
    printed = capsys.readouterr().out.split("changed since it was saved: ")[1]
    for change in ("eval_every 8 → 2", "micro_batch 4 → 2", "threads 1 → 2"):
        assert change in printed
    assert "dtype" not in printed  # control
    (env, config), = rows(copy, "resume", ("env", "config"))
    assert (env["threads"], env["micro_batch"], config["eval_every"]) == (2, 2, 2)
    assert np.allclose(rows(copy), rows(whole)[:16], rtol=1e-4)


@pytest.mark.row(14)
def test_end_moves_only_on_request(data, copy, whole, capsys):
    """Catches: an end that moves by itself, or a schedule that changes in silence."""
    base = FLAGS[:2] + FLAGS[4:]  # FLAGS without --max_steps 20
    assert run(data, copy, "--resume", "--max_steps", 30, "--stop_at", 17, base=base) == 75
    printed = capsys.readouterr().out
    before = rows(whole, keys=("lr",))[15][0]
    now = rows(copy, keys=("lr",))[15][0]
    assert now > before
    assert f"lr {before:.2e} as saved, {now:.2e} now" in printed
    assert "max_steps 20 → 30" in printed
    assert run(data, copy, "--resume", base=base) == 0
    assert steps(copy) == first(30)
    assert "max_steps" not in capsys.readouterr().out  # control


@pytest.fixture
def data_copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "data")


@pytest.mark.row(25)
def test_data_edited_between_stop_and_resume_is_refused(copy, data, data_copy, capsys):
    """Catches: the rest of a run on other text, on the same shards in another order, or on not all
    of them."""
    def refusal():
        assert run(data_copy, copy, "--resume") == 2
        return messages(capsys)[-1]

    tokens = np.load(data_copy / "train_0001.npy")
    tokens[700] = (tokens[700] + 1) % 299
    np.save(data_copy / "train_0001.npy", tokens)
    assert "is not the data of this run (changed: train_0001.npy)" in refusal()
    shutil.copy(data / "train_0001.npy", data_copy)
    assert run(data_copy, copy, "--resume", "--stop_at", 15) == 75  # control: the same bytes
    meta = json.loads((data_copy / "meta.json").read_text())
    meta["splits"]["train"].reverse()
    (data_copy / "meta.json").write_text(json.dumps(meta))
    assert "(changed: the order of the shards)" in refusal()
    meta["splits"]["train"].pop()
    (data_copy / "meta.json").write_text(json.dumps(meta))
    assert "(changed: train_0000.npy)" in refusal()


@pytest.mark.row(24)
def test_flipped_bit_in_a_shard_is_refused_at_a_fresh_start(data_copy, tmp_path, capsys):
    """Catches: shards whose hashes are written but never compared."""
    assert run(data_copy, tmp_path / "r", "--stop_at", 0) == 75  # control
    flip(data_copy / "train_0001.npy")
    assert run(data_copy, tmp_path / "fresh") == 2
    message, = messages(capsys)
    assert "train_0001.npy" in message
    assert "SHA-256 differs" in message


# -------------------------------------------------------------------------------------------------
# NaN and infinity

def spoiled(function, number, spoil):
    """The same function, but its last argument is spoiled in its number-th call."""
    calls = []

    def call(*args):
        calls.append(1)
        if len(calls) == number:
            spoil(args[-1])
        return function(*args)
    return call


def spoil_gradient(optimizer):
    optimizer.param_groups[0]["params"][0].grad[0, 0] = float("nan")


def spoil_loss(loss):
    loss.fill_(float("inf"))


# Before step 9 the state was saved, and evaluated; before step 7 only the failure saves.
@pytest.mark.row(21)
@pytest.mark.parametrize("owner, name, spoil, step, message", [
    (torch.amp.GradScaler, "unscale_", spoil_gradient, 9, "gradient norm nan, lr "),
    (train, "sum_over_processes", spoil_loss, 7, "loss inf, gradient norm "),
])
def test_nan_never_reaches_the_weights(data, whole, tmp_path, capsys, owner, name, spoil, step,
                                       message):
    """Catches: an update with a NaN or an infinity, after which every weight is NaN; good steps
    that are lost with it; a state that is saved again after its evaluation, so that the log of the
    resumed run has the evaluation twice."""
    folder = tmp_path / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, spoiled(getattr(owner, name), step, spoil))
        assert run(data, folder) == 3
    line, = messages(capsys)
    assert line.startswith(f"train.py: step {step}: loss ")
    assert message in line
    assert rows(folder) == rows(whole)[:step - 1]
    assert newest(folder) == step - 1
    assert run(data, folder, "--resume") == 0
    assert same(folder, whole)


@pytest.mark.row(22)
def test_nan_is_never_saved(data, copy, capsys, monkeypatch):
    """Catches: a checkpoint with an infinity, whatever made it."""
    step = torch.optim.AdamW.step

    def broken(self, *args, **kwargs):
        step(self, *args, **kwargs)
        self.param_groups[0]["params"][3].data[0] = float("inf")
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    assert run(data, copy, "--resume") == 3
    message, = messages(capsys)
    assert "step 16: NaN or infinity in 1 tensors (model." in message
    assert newest(copy) == 15
    for tensor in state(copy, 15).values():
        assert tensor.isfinite().all()


# -------------------------------------------------------------------------------------------------

def test_comparison_of_runs_sees_one_changed_number(whole, tmp_path):
    """Catches: comparisons here that cannot fail, because `same` leaves something out. The control
    of them all."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    log = copy / "metrics.jsonl"
    text = log.read_text()
    for key in ('"grad_norm": ', '"position_loss": ['):
        replace(log, key, f"{key}1")
        assert not same(copy, whole)
        log.write_text(text)
    assert same(copy, whole)
    file = place(copy, 20) / "train_state.pt"
    contents = durable.load_file(file)
    contents["optimizer"][UP[0]]["exp_avg"][0, 0] += 1e-7
    torch.save(contents, file)
    assert not same(copy, whole)
