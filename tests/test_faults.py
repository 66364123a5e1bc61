"""What may happen to a run, and what must follow: after a fault the same command, repeated, ends in
the same bits as a run without one. Rows are those of the table of faults.

Each group has a control, which shows that a difference would be seen.
"""
import errno
import functools
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
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import evaluate
import prepare_data
import sample
import train
from conftest import CHILD, FLAGS, ROOT, TEST, evals, exit_code, messages, rows, run, same, state
from support import devices, durable, files, flags, runs
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
    """What the logs of equal runs have in common: these rows in their order, without times."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["event"] in ("train", "eval", "benchmark", "sample"):
            found.append({key: value for key, value in row.items()
                          if key not in ("seconds", "dt_ms", "tok_per_s")})
    return found


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


def survives_kill(resume, folder, short, n):
    """Kill a run at its n-th file operation. What is left is usable; the resume is bitwise."""
    assert resume(folder, *SHORT, fault=["kill", n])["code"] == -signal.SIGKILL
    left = durable.checkpoints(folder)
    if left:
        assert min(left) == 0
        assert durable.find(folder, full=True) is not None  # raises if none can be used
    assert ends_like(resume, folder, short)
    shutil.rmtree(folder)
    return True


@pytest.mark.row(4, 28, 30)
def test_kill_at_some_file_operations_changes_nothing(resume, short, tmp_path):
    """Catches: a save or a prune that is not whole at some moment."""
    for n in random.Random(0).sample(range(1, short.operations + 1), 12):
        assert survives_kill(resume, tmp_path / "r", short, n)


@pytest.mark.row(4, 28, 30)
@pytest.mark.slow
def test_kill_at_every_file_operation_changes_nothing(resume, short, tmp_path):
    """Catches: as the test before, at every moment."""
    for n in range(1, short.operations + 1):
        assert survives_kill(resume, tmp_path / "r", short, n)


@pytest.mark.row(3)
def test_kill_at_20_random_moments_changes_nothing(resume, short, tmp_path):
    """Catches: a moment without a file operation at which a kill changes the run."""
    draw = random.Random(os.getpid())
    folder = tmp_path / "r"
    kills = 0
    in_a_save = 0
    while kills < 20:
        found = resume(folder, *SHORT, kill_after=draw.uniform(0, short.seconds))
        if found["code"] == -signal.SIGKILL:
            kills += 1
            in_a_save += any(folder.glob("checkpoints/.tmp*"))
            continue  # often killed again
        assert found["code"] == 0
        assert same(folder, short.folder, 6)
        assert log_of(folder) == log_of(short.folder)
        shutil.rmtree(folder)
    print(f"{kills} kills, {in_a_save} of them in a save")
    assert ends_like(resume, folder, short)


@pytest.mark.row(41)
@pytest.mark.parametrize("step", [0, 4, 6])
@pytest.mark.parametrize("where", ["evaluate", "benchmark", "sample"])
def test_kill_in_an_evaluation_loses_no_step(resume, short, tmp_path, where, step):
    """Catches: an evaluation or a sample before the save that is due at the same step; a resume
    that does not repeat it, or that logs it twice."""
    folder = tmp_path / "r"
    fault = ["signal", where, step, "SIGKILL"]
    assert resume(folder, *SHORT, fault=fault)["code"] == -signal.SIGKILL
    assert steps(folder) == first(step)
    assert newest(folder) == step
    assert ends_like(resume, folder, short)


def test_kill_in_a_step_loses_the_steps_since_the_save(resume, short, tmp_path):
    """Catches: a test before this one that could not fail: there are kills that lose steps."""
    folder = tmp_path / "r"
    resume(folder, *SHORT, fault=["signal", "step", 6, "SIGKILL"])
    assert steps(folder) == first(5)
    assert newest(folder) == 4
    assert ends_like(resume, folder, short)


@pytest.mark.row(9, 28)
def test_leftovers_of_a_kill_are_removed_by_the_holder_of_the_lock(resume, copy):
    """Catches: half a checkpoint that stays; a second process that removes what the first one is
    writing."""
    half = copy / "checkpoints/.tmp_step_00000030"
    half.mkdir()
    (half / "model.pt").write_bytes(b"half")
    lock = runs.hold(copy)
    assert not half.exists()
    half.mkdir()  # now it is of the run that holds the lock
    assert resume(copy)["code"] == 2
    assert half.exists()
    os.close(lock)
    assert resume(copy)["code"] == 0
    assert not half.exists()


class Killed(BaseException):
    """In the place of SIGKILL, in a process that goes on."""


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in (folder / "checkpoints").glob("step_*/*.*") if path.is_file()}


def prune_killed_at(number, folder, keep_every):
    """Prune, and raise Killed in the place of the file operation of that number, from 0; returns
    whether there were so many."""
    done = []

    def counted(function):
        def call(*args, **kwargs):
            if len(done) == number:
                raise Killed
            done.append(function)
            return function(*args, **kwargs)
        return call
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            durable.prune(folder, 15, keep_last=1, keep_every=keep_every)
        except Killed:
            return True
    return False


@pytest.mark.row(4)
@pytest.mark.parametrize("keep_every", [0, 10])  # step 10 is removed, or shrinks to its weights
def test_prune_is_whole_at_every_moment(stopped, tmp_path, keep_every):
    """Catches: an old checkpoint that is half removed, or whose meta.json promises a file that is
    gone."""
    expected = shutil.copytree(stopped, tmp_path / "expected")
    durable.prune(expected, 15, keep_last=1, keep_every=keep_every)
    assert files_of(expected) != files_of(stopped)
    number = 0
    killed = True
    while killed:
        folder = shutil.copytree(stopped, tmp_path / str(number))
        killed = prune_killed_at(number, folder, keep_every)
        for step in durable.checkpoints(folder).values():
            files = durable.read_meta(step)["files"]
            for name in files:
                durable.verify(step, name, files)
        durable.prune(folder, 15, keep_last=1, keep_every=keep_every)  # at the next save
        assert files_of(folder) == files_of(expected)
        number += 1
    assert number > 2


@pytest.mark.row(4)
@pytest.mark.slow
def test_kill_while_starting_over_never_mixes_two_runs(server, data, stopped, tmp_path):
    """Catches: rows or checkpoints of the run before in the one that overwrites it."""
    other = ("--data", data, "--seed", 2, *SHORT)
    whole = tmp_path / "whole"
    folder = tmp_path / "r"
    assert server(*other, "--run", whole)["code"] == 0
    refusals = ("not the run that was saved", "start over with --overwrite")
    for n in range(1, 40, 3):
        shutil.copytree(stopped, folder)
        found = server(*other, "--run", folder, "--overwrite", fault=["kill", n])
        assert found["code"] == -signal.SIGKILL
        found = server(*other, "--run", folder, "--resume")
        if found["code"] == 2:  # still the old run, or what is left of it
            assert any(refusal in found["stderr"] for refusal in refusals)
            found = server(*other, "--run", folder, "--overwrite")
        assert found["code"] == 0
        assert same(folder, whole, 6)
        assert steps(folder) == first(6)
        shutil.rmtree(folder)


# -------------------------------------------------------------------------------------------------
# Damaged

def cut(path, size):
    """Keep that many bytes; a negative number counts from the end, a share from the start."""
    whole = path.stat().st_size
    if isinstance(size, float):
        size = int(size * whole)
    os.truncate(path, size if size >= 0 else whole + size)


def flip(path, share):
    """Flip one bit, at a share of the file's length."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(share * len(content)))] ^= 4
    path.write_bytes(content)


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


DAMAGES = {
    "meta.json missing": ("meta.json", Path.unlink),
    "meta.json empty": ("meta.json", functools.partial(cut, size=0)),
    "meta.json half": ("meta.json", functools.partial(cut, size=0.5)),
    "meta.json with another hash":
        ("meta.json", functools.partial(replace, old='"sha256": "', new='"sha256": "0')),
    "meta.json of another step":
        ("meta.json", functools.partial(replace, old='"step": 15', new='"step": 14')),
}
for name in ("model.pt", "train_state.pt"):
    DAMAGES[f"{name} missing"] = (name, Path.unlink)
    for size in (0, 1, 0.5, -1):
        DAMAGES[f"{name} cut to {size}"] = (name, functools.partial(cut, size=size))
    for share in (0.001, 0.5, 1.0):
        DAMAGES[f"{name} flipped at {share}"] = (name, functools.partial(flip, share=share))


@pytest.mark.row(5, 6, 7)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_skipped(resume, copy, whole, damage):
    """Catches: a damaged state that is trained on, or that ends a run with an older good one."""
    name, spoil = DAMAGES[damage]
    spoil(place(copy, 15) / name)
    found = resume(copy)
    assert found["code"] == 0
    assert "step_00000015 is damaged" in found["stderr"]
    assert rows(copy, "resume", ("step",)) == [(10,)]
    assert same(copy, whole)
    assert steps(copy) == first(20)


@pytest.mark.row(5)
@pytest.mark.parametrize("damage", ["meta.json missing", "model.pt cut to 0.5"])
def test_damaged_checkpoint_is_replaced(resume, copy, damage):
    """Catches: a damaged folder in the way of the good one of the same step."""
    name, spoil = DAMAGES[damage]
    spoil(place(copy, 15) / name)
    assert resume(copy, "--stop_at", 15)["code"] == 75
    assert newest(copy) == 15


@pytest.mark.row(5)
def test_damaged_newer_checkpoint_is_not_one_of_the_kept(resume, copy):
    """Catches: a damaged state that counts as kept, so that the last good one is removed."""
    flip(place(copy, 15) / "model.pt", 0.5)
    assert resume(copy, "--save_every", 12, "--stop_at", 12)["code"] == 75
    for step in (10, 12):
        files = durable.read_meta(place(copy, step))["files"]
        durable.verify(place(copy, step), "train_state.pt", files)


def test_undamaged_checkpoint_is_used(resume, copy, whole):
    """Catches: a good checkpoint that is skipped. The control of the tests before."""
    found = resume(copy)
    assert "damaged" not in found["stderr"]
    assert rows(copy, "resume", ("step",)) == [(15,)]
    assert same(copy, whole)


@pytest.mark.row(8)
def test_run_without_a_good_checkpoint_never_starts_over(resume, copy):
    """Catches: a silent restart from step 0 that deletes the run."""
    log = (copy / "metrics.jsonl").read_bytes()
    for folder in durable.checkpoints(copy).values():
        flip(folder / "model.pt", 0.5)
    found = resume(copy)
    assert found["code"] == 2
    last = found["stderr"].splitlines()[-1]
    for step in (10, 15):
        assert f"step {step}: model.pt is not what was written" in last
    assert (copy / "metrics.jsonl").read_bytes() == log


@pytest.mark.row(8)
def test_run_without_checkpoints_never_starts_over(resume, copy):
    """Catches: checkpoints on a disk that is not mounted taken for a run that has not begun."""
    (copy / "checkpoints").rename(copy / "elsewhere")
    log = (copy / "metrics.jsonl").read_bytes()
    found = resume(copy)
    assert found["code"] == 2
    assert "holds a run but no checkpoint" in found["stderr"]
    assert (copy / "metrics.jsonl").read_bytes() == log
    # control
    (copy / "elsewhere").rename(copy / "checkpoints")
    assert resume(copy, "--stop_at", 15)["code"] == 75


READERS = {"sample": sample.main, "evaluate": evaluate.main}


@pytest.mark.row(38)
@pytest.mark.parametrize("reader", READERS)
def test_readers_skip_damaged_checkpoints(copy, tmp_path, capsys, reader):
    """Catches: a sample or a score of damaged weights; a traceback."""
    def read(*argv):
        code = exit_code(READERS[reader], [copy, *argv])
        return code, capsys.readouterr().err

    _, message = read()
    assert "damaged" not in message  # control
    flip(place(copy, 15) / "model.pt", 0.5)
    code, message = read()
    assert not code
    assert "step_00000015 is damaged" in message
    code, message = read("--step", 15)
    assert code == 2
    assert "no usable checkpoint (step 15: " in message.splitlines()[-1]
    for folder in durable.checkpoints(copy).values():
        cut(folder / "model.pt", 1)
    code, message = read()
    assert code == 2
    assert "no usable checkpoint (step 15: " in message.splitlines()[-1]


@pytest.mark.row(38)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["empty", "absent"])
def test_readers_refuse_a_folder_without_a_run(tmp_path, capsys, reader, name):
    """Catches: a traceback at a wrong path."""
    (tmp_path / "empty").mkdir()
    assert exit_code(READERS[reader], [tmp_path / name]) == 2
    message, = messages(capsys)
    assert "no such run" in message


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
    contents = {file: durable.load_file(place(copy, 15) / file)
                for file in ("model.pt", "train_state.pt")}
    contents[name]["bomb"] = Bomb(tmp_path / "exploded")
    durable.write_checkpoint(copy, 15, contents)  # with the right hash
    assert run(data, copy, "--resume") == 2
    message, = messages(capsys)
    assert f"{name}: holds more than tensors and plain values, so it is not loaded" in message
    if name == "model.pt":
        for reader in READERS.values():
            assert exit_code(reader, [copy]) == 2
            assert "not loaded" in messages(capsys)[-1]
    assert not (tmp_path / "exploded").exists()
    # control: the bomb works
    torch.load(place(copy, 15) / name, weights_only=False)
    assert (tmp_path / "exploded").exists()


@pytest.fixture
def restored(stopped):
    """Restores a state into a new network and its optimizer; returns both."""
    def restore(state):
        model, _, _ = checkpoint.load_model(stopped)
        optimizer = train.make_optimizer(model, train.read_settings(FLAGS), torch.device("cpu"))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        checkpoint.restore(state, model, optimizer, scaler)
        return model, optimizer
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
    model, optimizer = restored(saved)
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[name]["exp_avg"])
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], moments[name]["exp_avg_sq"])
    # control: by position these two would be taken for each other
    saved["optimizer"] = {**moments, UP[0]: moments[UP[1]], UP[1]: moments[UP[0]]}
    model, optimizer = restored(saved)
    parameter = dict(model.named_parameters())[UP[0]]
    assert not torch.equal(optimizer.state[parameter]["exp_avg"], moments[UP[0]]["exp_avg"])


def rename_weight(state):
    state["model"]["model.norm.scale"] = state["model"].pop("model.norm.weight")


def reshape_weight(state):
    state["model"][UP[0]] = state["model"][UP[0]].flatten()


def lose_moments(state):
    del state["optimizer"][UP[0]]


def add_moments(state):
    state["optimizer"]["lm_head.bias"] = state["optimizer"][UP[0]]


def reshape_moments(state):
    state["optimizer"][UP[0]]["exp_avg_sq"] = torch.zeros(3)


def lose_all_moments(state):
    state["optimizer"] = {}


def round_weights(state):
    state["model"][UP[0]] = state["model"][UP[0]].half()


def thin_out_weight(state):
    state["model"][UP[0]] = state["model"][UP[0]].to_sparse()


def round_moments(state):
    state["optimizer"][UP[0]]["exp_avg_sq"] = state["optimizer"][UP[0]]["exp_avg_sq"].half()


def lose_an_update(state):
    for moments in state["optimizer"].values():
        moments["step"] -= 1


def lose_random_state(state):
    del state["rng"]["cpu"]


@pytest.mark.row(32)
@pytest.mark.parametrize("spoil, message", [
    (rename_weight, r"weights do not fit .* 2 parameters: .*model.norm.scale \(.*absent in the"),
    (reshape_weight, r"weights do not fit .* 1 parameters: .*up_proj.weight \(\(2048,\) float32"),
    (round_weights, r"weights do not fit .*up_proj.weight \(\(64, 32\) float16 saved"),
    (lose_moments, r"optimizer state do not fit .* 3 parameters: .*\(absent saved"),
    (add_moments, r"optimizer state do not fit .* lm_head.bias"),
    (reshape_moments, r"optimizer state do not fit .*exp_avg_sq \(\(3,\) float32 saved"),
    (round_moments, r"optimizer state do not fit .*exp_avg_sq \(\(64, 32\) float16 saved"),
    (lose_all_moments, r"optimizer state do not fit"),
    (lose_an_update, r"is of 14.0 updates, not of 15"),
    (thin_out_weight, r"weights do not fit .*\(\(64, 32\) float32 sparse_coo saved"),
    (lose_random_state, r"the checkpoint cannot be used \(KeyError: 'cpu'\)"),
])
def test_state_of_another_network_is_refused(saved, restored, spoil, message):
    """Catches: weights or moments that are left out, or loaded into another parameter."""
    spoil(saved)
    with pytest.raises(UserError, match=message):
        restored(saved)


def test_state_of_another_step_is_refused(data, copy, capsys):
    """Catches: a renamed checkpoint, with which the data would go on at another place."""
    place(copy, 15).rename(place(copy, 16))
    replace(place(copy, 16) / "meta.json", '"step": 15', '"step": 16')
    assert run(data, copy, "--resume") == 2
    message, = messages(capsys)
    assert "holds the state of step 15" in message


def test_setting_that_is_unknown_is_refused(data, copy, saved, capsys):
    """Catches: a run that goes on with a setting forgotten."""
    saved["config"]["dropout"] = 0.1
    checkpoint.save(copy, saved, keep_last=2, keep_every=0)
    log = (copy / "metrics.jsonl").read_bytes()
    assert run(data, copy, "--resume") == 2
    message, = messages(capsys)
    assert "another version of this code" in message
    assert "dropout" in message
    assert (copy / "metrics.jsonl").read_bytes() == log


def test_setting_that_is_newer_has_its_default(data, copy, saved, capsys, monkeypatch, whole):
    """Catches: runs that a new flag makes unusable; the default of a preset, which is not what the
    code did before the flag."""
    monkeypatch.setitem(train.BY_PRESET["test"], "beta2", 0.5)
    assert saved["config"].pop("beta2") == 0.95
    checkpoint.save(copy, saved, keep_last=2, keep_every=0)
    assert run(data, copy, "--resume") == 0
    note = "note: the run does not have the settings beta2 0.95: the default is used"
    assert note in messages(capsys)
    assert same(copy, whole)
    assert train.read_settings(["--preset", "test"]).beta2 == 0.5  # control


def test_config_that_is_older_has_the_defaults(saved, capsys):
    """Catches: checkpoints that a new field of ModelConfig makes unusable, or a field that is
    forgotten."""
    sizes = saved["model_config"]
    assert sizes.pop("rope_theta") == 500_000.0
    assert checkpoint.read_config(sizes) == TEST
    assert messages(capsys) == [
        "note: the checkpoint's config does not have rope_theta 500000.0: the default is used"]
    with pytest.raises(UserError, match="unexpected keyword argument 'activation'"):
        checkpoint.read_config({**sizes, "activation": "gelu"})


# -------------------------------------------------------------------------------------------------
# The disk

@pytest.mark.row(10)
@pytest.mark.parametrize("n", [5, 100, 150, 260, 500])  # which write into a checkpoint fails
def test_full_disk_keeps_older_checkpoints(resume, whole, tmp_path, n):
    """Catches: half a checkpoint in the place of a whole one; a reason that is not told."""
    folder = tmp_path / "r"
    found = resume(folder, fault=["full", n])
    assert found["code"] == 4
    message, = found["stderr"].strip().splitlines()
    assert "not saved ([Errno 28] No space left on device); it needs " in message
    assert " MB are free" in message
    assert not list(folder.glob("checkpoints/.tmp*"))
    for step in durable.checkpoints(folder).values():
        durable.verify(step, "model.pt", durable.read_meta(step)["files"])
    assert resume(folder)["code"] == 0
    assert same(folder, whole)


@pytest.mark.row(10)
@pytest.mark.parametrize("limit", [60_000, 200_000])  # within model.pt, within train_state.pt
def test_reason_of_the_system_is_told(resume, whole, tmp_path, limit):
    """Catches: PyTorch's "unexpected pos" in the place of the system's reason."""
    found = resume(tmp_path / "r", fault=["limit", limit])
    assert found["code"] == 4
    assert "File too large" in found["stderr"]
    assert "unexpected pos" not in found["stderr"]
    assert resume(tmp_path / "r")["code"] == 0
    assert same(tmp_path / "r", whole)


@pytest.mark.row(12)
def test_disk_too_small_for_one_state_ends_before_the_first_step(resume, whole, tmp_path):
    """Catches: hours of training that cannot be saved."""
    folder = tmp_path / "r"
    found = resume(folder, fault=["full", 1])
    assert found["code"] == 4
    assert log_of(folder) == []  # not even an evaluation
    assert durable.checkpoints(folder) == {}
    assert resume(folder)["code"] == 0
    assert same(folder, whole)


@pytest.mark.row(12)
def test_unusable_folder_is_one_line(data, tmp_path, capsys):
    """Catches: a run folder that cannot be made, or not be written, found after the first step."""
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0o500)
    assert run(data, tmp_path / "file/r") == 2
    message, = messages(capsys)
    assert "r: Not a directory" in message
    if os.getuid() != 0:  # root may write everywhere
        assert run(data, tmp_path / "closed/r") == 2
        message, = messages(capsys)
        assert "r: Permission denied" in message


@pytest.mark.row(11)
@pytest.mark.parametrize("n", [1, 7, 30])  # which line of the log is cut
def test_half_a_line_of_a_full_disk_is_not_taken_for_a_line(resume, whole, tmp_path, n):
    """Catches: a log that goes on after half a line; a full disk that nobody sees."""
    folder = tmp_path / "r"
    found = resume(folder, fault=["log full", n])
    assert found["code"] == 4
    assert "metrics.jsonl: not written at step" in found["stderr"]
    assert not (folder / "metrics.jsonl").read_text().endswith("\n")
    assert resume(folder)["code"] == 0
    assert same(folder, whole)
    assert steps(folder) == first(20)


@pytest.mark.row(30)
def test_log_longer_than_the_checkpoint_is_cut(resume, copy, whole):
    """Catches: steps that stand twice in the log, or a row behind half a row."""
    with open(copy / "metrics.jsonl", "a") as log:
        log.write('{"event": "train", "step": 16, "loss": 1.0}\n{"event": "train", "st')
    assert resume(copy)["code"] == 0
    assert steps(copy) == first(20)
    assert same(copy, whole)


@pytest.mark.row(30)
@pytest.mark.parametrize("change", ["shorter", "edited", "deleted"])
def test_log_that_was_changed_is_refused(resume, copy, change):
    """Catches: rows that are lost or cut in the middle because the log is not the saved one."""
    log = copy / "metrics.jsonl"
    text = log.read_text()
    if change == "shorter":
        log.write_text(text[:len(text) // 2])
    if change == "edited":
        log.write_text(text.replace('"loss"', '"nats"', 1).replace(" ", "", 3))
    if change == "deleted":
        log.unlink()
    found = resume(copy)
    assert found["code"] == 2
    message, = found["stderr"].strip().splitlines()
    assert "was changed since the state to resume was saved" in message
    log.write_text(text)  # control
    assert resume(copy, "--stop_at", 15)["code"] == 75


@pytest.mark.row(4)
def test_save_is_forced_to_the_disk_before_its_rename(data, tmp_path, monkeypatch):
    """Catches: a checkpoint that after a power failure has its name but not its bytes, or that
    counts rows of the log that are not on the disk."""
    fsync = os.fsync
    rename = os.rename
    log = tmp_path / "r/metrics.jsonl"
    forced = set()  # inodes since the last commit
    commits = []

    def watched_fsync(handle):
        forced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def watched_rename(source, target):
        if Path(target).name.startswith("step_"):
            files = {path.name: path.stat().st_ino for path in [*source.iterdir(), log]}
            commits.append(sorted(files))
            assert set(files.values()) <= forced
            forced.clear()
        rename(source, target)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    assert run(data, tmp_path / "r", "--stop_at", 2) == 75
    assert commits == [["meta.json", "metrics.jsonl", "model.pt", "train_state.pt"]] * 3
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


def has_own_checksums(file):
    """Whether the checksums of PyTorch in one of its files, which is a zip, are right."""
    with zipfile.ZipFile(file) as archive:
        return archive.testzip() is None


def test_one_checksum_is_enough(tmp_path):
    """Catches: a second checksum of 20 GB; a file without it that cannot be read, or whose damage
    is not seen."""
    file = tmp_path / "model.pt"
    tensors = {"a": torch.arange(1000.0)}
    recorded = durable.write_file(file, tensors)
    assert not has_own_checksums(file)
    assert torch.equal(durable.load_file(file)["a"], tensors["a"])
    durable.verify(tmp_path, "model.pt", {"model.pt": recorded})
    flip(file, 0.5)
    with pytest.raises(durable.Damaged):
        durable.verify(tmp_path, "model.pt", {"model.pt": recorded})
    torch.save(tensors, file)  # control; and other files of the user are as they were
    assert has_own_checksums(file)


LOAD_100_MB = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from support import durable

def memory():  # what this process has for itself; pages of a file are shared
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

if sys.argv[3] == "several":
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
before = memory()
weights = durable.load_file(sys.argv[2])["w"]
total = weights.sum().item()  # reads all of it
grown = memory() - before
weights += 1                  # what one process changes
again = durable.load_file(sys.argv[2])["w"].sum().item()
print(grown, total == again == 25_000_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_share_what_they_load(tmp_path):
    """Catches: eight copies of a state of 20 GB in the memory of a machine; a change of one process
    that reaches the file, and so the others."""
    file = tmp_path / "model.pt"
    durable.write_file(file, {"w": torch.ones(25_000_000)})
    grown = {}
    for processes in ("several", "one"):
        command = [sys.executable, "-c", LOAD_100_MB, str(ROOT), str(file), processes]
        child = subprocess.run(command, capture_output=True, text=True)
        print(child.stderr)
        bytes_, is_equal = child.stdout.split()
        grown[processes] = int(bytes_)
        assert is_equal == "True"
    assert grown["several"] < 20e6
    assert grown["one"] > 80e6  # control


@pytest.mark.row(60)
def test_old_state_that_cannot_be_removed_ends_nothing(data, tmp_path, capsys, monkeypatch):
    """Catches: a training that ends although the new state is on the disk; a refusal without a
    word, or one that no later save tries again; a folder that --overwrite cannot free."""
    folder = tmp_path / "r"
    rename = os.rename

    def refused(path, *rest, **options):
        if "step_" in str(path) and ".tmp_" not in str(path):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "rename", refused)
        assert run(data, folder, "--save_every", 3) == 0
        assert newest(folder) == 20
        said = [line for line in messages(capsys)
                if "not removed (Device or resource busy)" in line]
        assert said and len(set(said)) == len(said)  # each folder once
    kept = durable.checkpoints(folder)
    assert len(kept) > 4
    assert run(data, folder, "--max_steps", 24, "--resume", "--save_every", 3) == 0
    assert not set(durable.checkpoints(folder)) & {3, 6, 9, 12}  # control: tried again

    with monkeypatch.context() as patch:  # a network drive keeps files that are open
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
        for _ in range(2):
            assert run(data, folder, "--overwrite", "--stop_at", 1) == 75
        assert any("not removed; it takes room" in line for line in messages(capsys))
    assert run(data, folder, "--overwrite", "--stop_at", 1) == 75
    assert not list(folder.glob(".tmp_*"))


@pytest.mark.row(60)
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_folder_that_cannot_be_forced_to_the_disk_is_said(data, tmp_path, capsys, monkeypatch,
                                                          number):
    """Catches: a network drive on which no run begins, or a preparation that is thrown away."""
    fsync = os.fsync
    runs.warn.cache_clear()

    def refused(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refused)
    assert run(data, tmp_path / "r", "--stop_at", 2) == 75
    said = [line for line in messages(capsys) if "folders cannot be forced to the disk" in line]
    assert len(said) == 1
    (tmp_path / "a.txt").write_text("Some words of my own. " * 999)
    argv = ["text", tmp_path / "a.txt", "--out", tmp_path / "o"]
    assert exit_code(prepare_data.main, argv) is None

    def no_room(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)  # control: of a file it is an error, with its name
    with pytest.raises(OSError, match="a.txt"):
        files.sync(tmp_path / "a.txt")


# -------------------------------------------------------------------------------------------------
# Signals

@pytest.mark.row(18)
@pytest.mark.parametrize("where, name", [
    ("step", "SIGTERM"), ("step", "SIGINT"), ("step", "SIGHUP"), ("step", "SIGUSR1"),
    ("evaluate", "SIGTERM"), ("evaluate", "SIGINT"),
    ("save", "SIGTERM"), ("save", "SIGINT"),
])
def test_signal_saves_the_step(resume, whole, tmp_path, where, name):
    """Catches: a step that is lost, or half done, when the run is told to stop."""
    folder = tmp_path / "r"
    found = resume(folder, fault=["signal", where, 8, name])
    assert found["code"] == 75
    last = 8 if where == "step" else 9  # outside of a step, one more is made
    assert steps(folder) == first(last)
    assert newest(folder) == last
    assert rows(folder, "end", ("step", "reason")) == [(last, "stopped")]
    assert resume(folder)["code"] == 0
    assert same(folder, whole)


@pytest.mark.parametrize("flags, fault", [
    (["--stop_at", 20], []),
    ([], ["signal", "step", 20, "SIGTERM"]),
])
def test_stop_at_the_last_step_leaves_its_evaluation_to_the_resume(
        resume, whole, tmp_path, flags, fault):
    """Catches: a run that counts as finished without its last evaluation."""
    folder = tmp_path / "r"
    assert resume(folder, *flags, fault=fault)["code"] == 75
    assert steps(folder) == first(20)
    assert newest(folder) == 20
    assert [row[0] for row in evals(folder)] == [0, 1, 2, 4, 8, 16]
    assert resume(folder)["code"] == 0
    assert same(folder, whole)
    assert rows(folder, "end", ("step", "reason")) == [(20, "done")]


@pytest.mark.row(18, 50)
@pytest.mark.parametrize("names, code", [
    (["SIGTERM", "SIGTERM"], 75),
    (["SIGINT", "SIGTERM"], 75),
    (["SIGINT", "SIGINT"], -signal.SIGINT),
    (["SIGTERM", "SIGINT"], -signal.SIGINT),
])
def test_second_signal_at_once(resume, whole, tmp_path, names, code):
    """Catches: a cluster that sends one stop twice and so prevents the save; a second Ctrl-C that
    does not end the process."""
    folder = tmp_path / "r"
    assert resume(folder, fault=["signal", "step", 7, *names])["code"] == code
    saved_at = 7 if code == 75 else 5
    assert newest(folder) == saved_at
    assert resume(folder)["code"] == 0
    assert same(folder, whole)


@pytest.mark.row(50)
@pytest.mark.parametrize("seconds, ends", [(9, []), (11, [signal.SIGTERM])])
def test_second_signal_after_10_seconds_ends_the_process(monkeypatch, seconds, ends):
    """Catches: a process that cannot be stopped any more, as its save hangs."""
    now = [1000.0]
    raised = []
    monkeypatch.setattr(devices.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    stop = devices.StopSignals(SimpleNamespace(say=print))
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    now[0] += seconds
    os.kill(os.getpid(), signal.SIGTERM)
    stop.restore()
    assert raised == ends


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
    flags = ("--max_steps", 50, "--micro_batch", 2)
    codes, _ = ends(two(data, tmp_path / "two", *flags))
    assert codes == [0, 0]
    assert run(data, tmp_path / "one", *flags) == 0
    assert run(data, tmp_path / "other", *flags, "--seed", 2) == 0
    assert distance(tmp_path / "two", tmp_path / "one") < 1e-5
    assert distance(tmp_path / "other", tmp_path / "one") > 1e-3  # control

    def scores(name):
        keys = ("step", "acc", "acc_norm", "acc_pmi", "n")
        return rows(tmp_path / name, "benchmark", keys)
    assert scores("two") == scores("one")
    assert scores("other") != scores("one")  # control
    one = [row[1] for row in evals(tmp_path / "one")]
    two_ = [row[1] for row in evals(tmp_path / "two")]
    assert np.allclose(two_, one, rtol=1e-5)


GRADIENTS_IN_BUCKETS = '''
has_diverged = train.has_diverged

def count_storages(*args):
    import gc, torch
    held = [x for x in gc.get_objects() if isinstance(x, torch.nn.Parameter) and x.grad is not None]
    storages = {x.grad.untyped_storage().data_ptr() for x in held}
    print("gradients", len(held), len(storages), file=sys.stderr, flush=True)
    return has_diverged(*args)

train.has_diverged = count_storages
'''


@pytest.mark.slow
def test_gradients_of_several_processes_are_held_once(data, tmp_path):
    """Catches: 7 GB of gradients twice on each GPU, in the parameters and in the buckets in which
    they are exchanged."""
    codes, errors = ends(two(data, tmp_path / "two", "--stop_at", 3, before=GRADIENTS_IN_BUCKETS))
    assert codes == [75, 75]
    counts = [line.split()[1:] for line in errors[0].splitlines() if line.startswith("gradients")]
    parameters, storages = map(int, counts[-1])  # the buckets are final after the first step
    assert storages < parameters / 4
    one = start(data, tmp_path / "one", "--stop_at", 3, before=GRADIENTS_IN_BUCKETS)
    codes, errors = ends([one])
    lines = [line for line in errors[0].splitlines() if line.startswith("gradients")]
    assert lines[-1] == f"gradients {parameters} {parameters}"  # control


@pytest.mark.row(18)
@pytest.mark.slow
def test_ctrl_c_at_a_random_moment_changes_nothing(data, tmp_path):
    """Catches: a moment at which Ctrl-C ends a real process without a save."""
    flags = ("--max_steps", 150, "--eval_every", 50)
    process = start(data, tmp_path / "r", *flags)
    wait_for(tmp_path / "r", 20)
    time.sleep(0.2 * random.random())
    process.send_signal(signal.SIGINT)
    codes, _ = ends([process])
    assert codes == [75]
    assert run(data, tmp_path / "r", *flags, "--resume") == 0
    assert run(data, tmp_path / "straight", *flags) == 0
    assert same(tmp_path / "r", tmp_path / "straight", 150)


@pytest.mark.row(18)
@pytest.mark.slow
def test_second_ctrl_c_ends_a_long_step(data, tmp_path):
    """Catches: a second Ctrl-C that waits for the end of the step."""
    long = ("--max_steps", 100_000, "--batch_tokens", 128 * 512)
    process = start(data, tmp_path / "r", *long)
    wait_for(tmp_path / "r", 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT


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
def test_surroundings_do_not_end_a_run_in_a_traceback(data, tmp_path):
    """Catches: a log that takes the number of the closed stdout, and what is printed; a matplotlib
    backend that a notebook set and that does not exist here."""
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    argv = [*FLAGS, "--data", data, "--run", tmp_path / "r", "--max_steps", 2]
    command = " ".join(map(str, [sys.executable, child, *argv]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "nonsense"}
    done = subprocess.run(f"{command} >&- 2>{tmp_path}/stderr", shell=True, env=env)
    assert done.returncode == 0
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    assert (tmp_path / "r/dynamics.png").exists()
    lines = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines][-1] == "end"
    assert subprocess.run(f"{command} --resume >&- 2>&-", shell=True, env=env).returncode == 0


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


@pytest.mark.slow
def test_mistake_is_one_line_on_each_process(data, copy):
    """Catches: tracebacks of the processes that wait for the one with the message."""
    codes, found = ends(two(data, copy, "--seed", 5))
    assert codes == [2, 2]
    # One of them says why; it is quick enough to end the other before that says anything.
    assert "not the run that was saved: seed" in found[0] + found[1]
    assert "Traceback" not in found[0] + found[1]
    codes, found = ends(two(data / "nowhere", copy))
    assert codes == [2, 2]
    assert "Traceback" not in found[0] + found[1]


@pytest.mark.row(18)
@pytest.mark.slow
def test_torchrun_passes_the_stop_on(data, tmp_path):
    """Catches: a launcher that is stopped before its workers have saved."""
    folder = tmp_path / "r"
    (tmp_path / "child.py").write_text(CHILD)
    flags = [*FLAGS, "--data", data, "--run", folder, "--max_steps", 5000, "--micro_batch", 2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", "--", tmp_path / "child.py", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen([str(word) for word in torchrun], env=env,
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
@pytest.mark.parametrize("name", CHANGES)
def test_resume_of_another_experiment_is_refused(data, copy, capsys, name):
    """Catches: a flag that turns the run into another one half way."""
    fixed = vars(train.read_settings(FLAGS)).keys() - {*flags.MAY_CHANGE, *flags.ONCE}
    assert set(CHANGES) == fixed
    saved = json.loads((copy / "config.json").read_text())
    log = (copy / "metrics.jsonl").read_bytes()
    assert run(data, copy, "--resume", *CHANGES[name]) == 2
    message, = messages(capsys)
    assert f"not the run that was saved: {name} (saved {saved[name]}, given " in message
    assert (copy / "metrics.jsonl").read_bytes() == log


@pytest.mark.row(13)
def test_resume_of_another_experiment_names_all_settings(data, copy, capsys):
    """Catches: a message that has to be met once for each setting."""
    assert run(data, copy, "--resume", "--lr", 0.02, "--seed", 3) == 2
    message, = messages(capsys)
    assert "seed (saved 1337, given 3), lr (saved 0.01, given 0.02)" in message
    assert run(data, copy, "--resume", "--lr", 0.01, "--stop_at", 15) == 75  # control


@pytest.mark.row(13, 16, 36)
def test_harmless_changes_are_printed_and_logged(data, copy, whole, capsys, one_thread_afterwards):
    """Catches: a change of speed or last bits that nobody can find afterwards."""
    changes = ("--eval_every", 2, "--micro_batch", 2, "--threads", 2)
    assert run(data, copy, "--resume", *changes, "--stop_at", 16) == 75
    printed = capsys.readouterr().out
    line, = [line for line in printed.splitlines() if "changed since it was saved" in line]
    for change in ("eval_every 8 → 2", "micro_batch 4 → 2", "threads 1 → 2"):
        assert change in line
    assert "dtype" not in line  # control
    (env, config), = rows(copy, "resume", ("env", "config"))
    assert env["threads"] == 2
    assert env["micro_batch"] == 2
    assert config["eval_every"] == 2
    assert np.allclose(rows(copy), rows(whole)[:16], rtol=1e-4)


WITHOUT_END = FLAGS[:2] + FLAGS[4:]  # FLAGS without --max_steps 20


@pytest.mark.row(14)
@pytest.mark.parametrize("flags, end", [([], 20), (["--max_steps", 30], 30)])
def test_end_moves_only_on_request(data, copy, whole, capsys, flags, end):
    """Catches: an end that moves by itself, or a schedule that changes in silence."""
    assert run(data, copy, "--resume", *flags, base=WITHOUT_END) == 0
    assert steps(copy) == first(end)
    assert (rows(copy)[:20] == rows(whole)) == (end == 20)
    assert json.loads((copy / "config.json").read_text())["max_steps"] == end
    (config,), = rows(copy, "resume", ("config",))
    assert config["max_steps"] == end
    printed = capsys.readouterr().out
    # The formula of the cosine, at 9 of the 14 or 24 steps after the warm-up.
    before, now = [0.001 + 0.009 * (1 + np.cos(np.pi * 9 / length)) / 2
                   for length in (14, end - 6)]
    assert f"lr {before:.2e} as saved, {now:.2e} now" in printed
    assert (f"max_steps 20 → {end}" in printed) == (end != 20)


@pytest.fixture
def data_copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "data")


@pytest.mark.row(25)
def test_data_edited_between_stop_and_resume_is_refused(copy, data, data_copy, capsys):
    """Catches: the rest of a run on other text."""
    tokens = np.load(data_copy / "train_0001.npy")
    tokens[700] = (tokens[700] + 1) % 299
    np.save(data_copy / "train_0001.npy", tokens)
    assert run(data_copy, copy, "--resume") == 2
    message, = messages(capsys)
    assert "is not the data of this run (changed: train_0001.npy)" in message
    # control: the same bytes in another folder
    shutil.copy(data / "train_0001.npy", data_copy)
    assert run(data_copy, copy, "--resume", "--stop_at", 15) == 75


@pytest.mark.row(25)
@pytest.mark.parametrize("change, what", [("reordered", "the order of the shards"),
                                          ("fewer", "train_0001.npy")])
def test_data_with_other_shards_is_refused(copy, data_copy, capsys, change, what):
    """Catches: the same shards in another order, or not all of them."""
    meta = json.loads((data_copy / "meta.json").read_text())
    if change == "reordered":
        meta["splits"]["train"].reverse()
    if change == "fewer":
        meta["splits"]["train"].pop()
    (data_copy / "meta.json").write_text(json.dumps(meta))
    assert run(data_copy, copy, "--resume") == 2
    message, = messages(capsys)
    assert f"is not the data of this run (changed: {what})" in message


@pytest.mark.row(24)
@pytest.mark.parametrize("name", ["train_0001.npy", "val_0000.npy"])
def test_flipped_bit_in_a_shard_is_refused_at_a_fresh_start(data_copy, tmp_path, capsys, name):
    """Catches: shards whose hashes are written but never compared."""
    assert run(data_copy, tmp_path / "r", "--stop_at", 0) == 75  # control
    flip(data_copy / name, 0.7)
    assert run(data_copy, tmp_path / "fresh") == 2
    message, = messages(capsys)
    assert name in message
    assert "SHA-256 differs" in message
    assert not (tmp_path / "fresh/metrics.jsonl").exists()


# -------------------------------------------------------------------------------------------------
# NaN and infinity

def break_gradient(patch, step=7):
    """The gradient of a step has a NaN."""
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def broken(parameters, *args):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == step:
            parameters[0].grad[0, 0] = float("nan")
        return clip(parameters, *args)
    patch.setattr(torch.nn.utils, "clip_grad_norm_", broken)


def break_loss(patch):
    """The loss of step 7 is infinite."""
    forward = train.Llama.forward
    calls = []

    def broken(*args, **kwargs):
        logits, loss = forward(*args, **kwargs)
        if kwargs.get("reduction") == "sum":
            calls.append(1)
            if len(calls) == 14:
                loss = loss + float("inf")
        return logits, loss
    patch.setattr(train.Llama, "forward", broken)


@pytest.mark.row(21)
@pytest.mark.parametrize("fail, message", [
    (break_gradient, "gradient norm nan, lr 1.00e-02; this update was not made"),
    (break_loss, "step 7: loss inf, gradient norm "),
])
def test_nan_never_reaches_the_weights(data, whole, tmp_path, capsys, monkeypatch, fail, message):
    """Catches: an update with a NaN or an infinity, after which every weight is NaN; good steps
    that are lost with it."""
    folder = tmp_path / "r"
    with monkeypatch.context() as patch:
        fail(patch)
        assert run(data, folder) == 3
    line, = messages(capsys)
    assert line.startswith("train.py: step 7: loss ")
    assert message in line
    assert rows(folder) == rows(whole)[:6]
    assert newest(folder) == 6  # where only the failure saves
    assert run(data, folder, "--resume") == 0
    assert same(folder, whole)


@pytest.mark.row(21)
def test_failure_after_an_evaluation_does_not_repeat_it(data, whole, tmp_path, monkeypatch):
    """Catches: a state that is saved again after its evaluation, so that the log of the resumed run
    has the evaluation twice."""
    folder = tmp_path / "r"
    with monkeypatch.context() as patch:
        break_gradient(patch, step=9)
        assert run(data, folder) == 3
    assert newest(folder) == 8  # saved, and evaluated
    assert run(data, folder, "--resume") == 0
    assert evals(folder) == evals(whole)


@pytest.mark.row(21)
def test_diverging_run_ends_with_its_last_good_state(data, tmp_path, capsys):
    """Catches: a NaN in a checkpoint after too high a learning rate."""
    folder = tmp_path / "r"
    diverging = ("--lr", 1e12, "--grad_clip", 0, "--warmup_steps", 0)
    assert run(data, folder, *diverging) == 3
    message, = messages(capsys)
    assert "a lower --lr" in message
    for tensor in state(folder, newest(folder)).values():
        assert tensor.isfinite().all()


@pytest.mark.row(22)
def test_nan_is_never_saved(data, tmp_path, capsys, monkeypatch):
    """Catches: a checkpoint with an infinity, whatever made it."""
    step = torch.optim.AdamW.step
    calls = []

    def broken(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 12:  # in step 10: two were made to read back the states of steps 1 and 2
            with torch.no_grad():
                self.param_groups[0]["params"][3][0] = float("inf")
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    monkeypatch.setattr(train.Observer, "evaluate", lambda *args: None)
    folder = tmp_path / "r"
    assert run(data, folder) == 3
    message, = messages(capsys)
    assert "step 10: NaN or infinity in 1 tensors (model." in message
    assert newest(folder) == 8
    for tensor in state(folder, 8).values():
        assert tensor.isfinite().all()


# -------------------------------------------------------------------------------------------------

def test_comparison_of_runs_sees_one_changed_number(whole, tmp_path):
    """Catches: comparisons here that cannot fail, because `same` leaves something out or all
    numbers are equal. The control of them all."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    assert same(copy, whole)
    losses = [row[0] for row in rows(whole, keys=("loss",))]
    assert len(set(losses)) == 20
    assert len({row[1] for row in evals(whole)}) == len(evals(whole))

    log = (copy / "metrics.jsonl").read_text()
    replace(copy / "metrics.jsonl", '"grad_norm": ', '"grad_norm": 1')
    assert not same(copy, whole)
    (copy / "metrics.jsonl").write_text(log)
    replace(copy / "metrics.jsonl", '"position_loss": [', '"position_loss": [1')
    assert not same(copy, whole)
    (copy / "metrics.jsonl").write_text(log)
    file = place(copy, 20) / "train_state.pt"
    contents = durable.load_file(file)
    contents["optimizer"][UP[0]]["exp_avg"][0, 0] += 1e-7
    torch.save(contents, file)
    assert not same(copy, whole)
