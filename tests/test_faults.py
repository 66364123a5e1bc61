"""What may happen to a run, and what must follow: after every fault the same command, repeated, ends in the same bits as a
run that nothing happened to. Each group has a control that shows that a difference would be seen.
"""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import evaluate
import runs
import sample
import train
from conftest import CHILD, FLAGS, evals, messages, rows, run, same, state

HERE = Path(__file__).parent


@pytest.fixture
def resume(server, data):
    """Runs the same command with --resume, with or without a fault."""
    return lambda folder, *flags, **fault: server("--data", data, "--run", folder, "--resume", *flags, **fault)


def steps_once(folder, steps=20):
    return [row[0] for row in rows(folder)] == list(range(1, steps + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Killed: rows 3, 4, 9, 28

SHORT = ["--max_steps", 8, "--save_every", 3]  # saves at 0, 1, 2, 3, 4, 6 and 8, and prunes at 6 and 8


@pytest.fixture(scope="module")
def short(server, data, tmp_path_factory):
    """(folder, file operations, seconds) of a run with SHORT that nothing happened to."""
    for name in ("warm", "r"):
        folder, start = tmp_path_factory.mktemp("short") / name, time.monotonic()
        found = server("--data", data, "--run", folder, *SHORT)
    assert found["code"] == 0 and found["operations"] > 150
    return folder, found["operations"], time.monotonic() - start


def killed_at(resume, folder, whole, n):
    """Kill a run at its n-th file operation, see what is left, let the same command finish."""
    assert resume(folder, *SHORT, fault=["kill", n])["code"] == -signal.SIGKILL
    left = checkpoint.checkpoints(folder)
    if left:
        assert checkpoint.find(folder, full=True) is not None  # raises if there are some and none is good
        assert min(left) == 0
    assert resume(folder, *SHORT)["code"] == 0
    assert same(folder, whole, 8) and steps_once(folder, 8)
    assert not list((folder / "checkpoints").glob(".tmp*"))
    for place in checkpoint.checkpoints(folder).values():  # nothing that its meta.json does not know of
        assert {path.name for path in place.iterdir()} - {".meta.json.tmp"} == {"meta.json", *checkpoint.read_meta(place)["files"]}
    shutil.rmtree(folder)


def test_a_kill_at_some_file_operations(resume, short, tmp_path):
    whole, total, _ = short
    for n in random.Random(0).sample(range(1, total + 1), 16):
        killed_at(resume, tmp_path / "r", whole, n)


@pytest.mark.slow
def test_a_kill_at_every_file_operation(resume, short, tmp_path):
    whole, total, _ = short
    for n in range(1, total + 1):
        killed_at(resume, tmp_path / "r", whole, n)


def test_a_kill_at_20_random_moments(resume, short, tmp_path):
    whole, _, seconds = short
    draw, kills, in_a_save = random.Random(os.getpid()), 0, 0
    while kills < 20:  # several kills to a run, as they come
        while (code := resume(tmp_path / "r", *SHORT, kill_after=draw.uniform(0, seconds))["code"]) == -signal.SIGKILL:
            kills += 1
            in_a_save += any((tmp_path / "r/checkpoints").glob(".tmp*"))
        assert code == 0 and same(tmp_path / "r", whole, 8) and steps_once(tmp_path / "r", 8)
        shutil.rmtree(tmp_path / "r")
    print(f"{kills} kills, {in_a_save} of them in a save")


def test_control_a_shorter_run_is_another(short, whole):
    assert rows(short[0]) != rows(whole)[:8]  # another horizon, another schedule


def test_what_a_kill_leaves_stays_in_the_way(resume, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    (tmp_path / "r/checkpoints/.tmp_step_00000030").mkdir()
    (tmp_path / "r/checkpoints/.tmp_step_00000030/model.pt").write_bytes(b"half")
    held = runs.lock(tmp_path / "r")  # in a run that is going on, they are its own: only the holder sweeps
    (tmp_path / "r/checkpoints/.tmp_step_00000031").mkdir()
    assert resume(tmp_path / "r", "--max_steps", 30)["code"] == 2
    assert (tmp_path / "r/checkpoints/.tmp_step_00000031").exists()
    held.close()
    assert resume(tmp_path / "r", "--max_steps", 30)["code"] == 0
    assert not list((tmp_path / "r/checkpoints").glob(".tmp*"))


@pytest.mark.slow
def test_a_kill_while_starting_over_brings_the_old_run_back(server, data, stopped, tmp_path):
    whole = tmp_path / "whole"
    assert server("--data", data, "--run", whole, "--seed", 2, *SHORT)["code"] == 0
    overwrite = ["--data", data, "--run", tmp_path / "r", "--seed", 2, *SHORT, "--overwrite"]
    for n in range(1, 40, 3):
        shutil.copytree(stopped, tmp_path / "r")
        assert server(*overwrite, fault=["kill", n])["code"] == -signal.SIGKILL
        found = server(*overwrite[:-1], "--resume")  # without --overwrite: goes on with the new run, or says why it cannot
        assert found["code"] == 0 or found["code"] == 2 and ("not the run that was saved" in found["stderr"] or "start over with --overwrite" in found["stderr"])
        assert found["code"] == 0 or server(*overwrite)["code"] == 0
        assert same(tmp_path / "r", whole, 8) and steps_once(tmp_path / "r", 8)
        shutil.rmtree(tmp_path / "r")


@pytest.mark.slow
def test_the_horizon_is_timed_again_after_a_kill(server, data, tmp_path):
    flags = ["--data", data, "--run", tmp_path / "r", "--resume"]
    base = FLAGS[:2] + FLAGS[4:]  # without --max_steps
    horizon = lambda: rows(tmp_path / "r", "horizon", ("step", "max_steps"))
    server("--data", data, "--run", tmp_path / "warm", base=base, max_minutes=0.01)
    for attempt in range(10):
        assert server(*flags, "--save_every", 0, base=base, max_minutes=0.1, kill_after=1 + 0.4 * attempt)["code"] == -signal.SIGKILL
        if (tmp_path / "r/checkpoints/step_00000020").exists():  # the step at which it is fixed
            break
    first = horizon()
    assert first and server(*flags, base=base, max_minutes=0.1)["code"] == 0
    assert horizon() == first and rows(tmp_path / "r")[-1][0] == first[0][1]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged: rows 5, 6, 7, 8

def truncate(path, size):
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def flip(path, share):
    """Turn one bit, at a share of the file's length."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(share * len(content)))] ^= 4
    path.write_bytes(content)


META = {"missing": lambda path: path.unlink(), "empty": lambda path: path.write_text(""), "half": lambda path: truncate(path, 40),
        "hash": lambda path: path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0', 1)),
        "step": lambda path: path.write_text(path.read_text().replace('"step": 15', '"step": 14'))}
DAMAGES = {**{f"{name} cut to {size}": (name, lambda path, size=size: truncate(path, size))
              for name in ("model.pt", "train_state.pt") for size in (0, 1, 30_000, -1)},
           **{f"{name} flipped at {share}": (name, lambda path, share=share: flip(path, share))
              for name in ("model.pt", "train_state.pt") for share in (0.0, 0.001, 0.5, 1.0)},
           **{f"meta.json {name}": ("meta.json", how) for name, how in META.items()}}


@pytest.fixture(scope="module")
def stopped(server, data, tmp_path_factory):
    """A run stopped at step 15: its full states are of steps 10 and 15."""
    folder = tmp_path_factory.mktemp("stopped") / "r"
    assert server("--data", data, "--run", folder, "--stop_at", 15)["code"] == 75
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_used_or_ends_the_run(resume, stopped, whole, tmp_path, damage):
    shutil.copytree(stopped, tmp_path / "r")
    name, how = DAMAGES[damage]
    how(tmp_path / "r/checkpoints/step_00000015" / name)
    found = resume(tmp_path / "r")
    assert found["code"] == 0 and "step_00000015 is damaged" in found["stderr"]
    assert same(tmp_path / "r", whole) and steps_once(tmp_path / "r")
    assert len(list((tmp_path / "r/checkpoints/step_00000015").iterdir())) == 3  # replaced by a good one on the way


def test_control_an_undamaged_one_is_not_passed_over(resume, stopped, whole, tmp_path):
    shutil.copytree(stopped, tmp_path / "r")
    assert "damaged" not in resume(tmp_path / "r")["stderr"] and same(tmp_path / "r", whole)


def test_with_every_checkpoint_bad_it_starts_again_from_nothing(resume, stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "r")
    log = (tmp_path / "r/metrics.jsonl").read_bytes()
    for place in (tmp_path / "r/checkpoints").iterdir():
        flip(place / "model.pt", 0.5)
    found = resume(tmp_path / "r")
    assert found["code"] == 2 and all(f"step {step}: model.pt" in found["stderr"].splitlines()[-1] for step in (10, 15))
    assert (tmp_path / "r/metrics.jsonl").read_bytes() == log
    for command in ([sample.main, []], [evaluate.main, []], [sample.main, ["--step", "15"]], [evaluate.main, ["--step", "15"]]):
        with pytest.raises(SystemExit) as error:  # row 38
            command[0]([str(tmp_path / "r"), *command[1]])
        assert error.value.code == 2 and "no usable checkpoint (step" in messages(capsys)[-1]


def test_with_its_checkpoints_gone_it_starts_again_from_nothing(resume, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "r")
    (tmp_path / "r/checkpoints").rename(tmp_path / "r/elsewhere")
    log = (tmp_path / "r/metrics.jsonl").read_bytes()
    found = resume(tmp_path / "r")
    assert found["code"] == 2 and "no checkpoint" in found["stderr"] and (tmp_path / "r/metrics.jsonl").read_bytes() == log
    (tmp_path / "r/checkpoints").mkdir()  # put aside by hand, and the log with them
    (tmp_path / "r/elsewhere").rename(tmp_path / "r/checkpoints/backup")
    (tmp_path / "r/metrics.jsonl").rename(tmp_path / "log")
    assert resume(tmp_path / "r")["code"] == 2 and len(list((tmp_path / "r/checkpoints/backup").iterdir())) > 2
    (tmp_path / "r/checkpoints/backup").rename(tmp_path / "r/elsewhere")
    (tmp_path / "r/checkpoints").rmdir()
    (tmp_path / "r/elsewhere").rename(tmp_path / "r/checkpoints")
    (tmp_path / "log").rename(tmp_path / "r/metrics.jsonl")
    assert resume(tmp_path / "r")["code"] == 0  # control


def test_a_link_or_a_file_in_the_place_of_a_checkpoint_is_in_the_way(resume, stopped, whole, tmp_path):
    shutil.copytree(stopped, tmp_path / "r")
    (tmp_path / "r/checkpoints/step_00000016").write_text("a file")
    (tmp_path / "far").mkdir()
    (tmp_path / "r/checkpoints/step_00000010").rename(tmp_path / "far/step_00000010")
    (tmp_path / "r/checkpoints/step_00000010").symlink_to(tmp_path / "far/step_00000010")
    assert resume(tmp_path / "r")["code"] == 0 and same(tmp_path / "r", whole)
    assert len(list((tmp_path / "far/step_00000010").iterdir())) == 3  # of a link only the link was removed
    (tmp_path / "r/checkpoints").rename(tmp_path / "far/checkpoints")
    (tmp_path / "r/checkpoints").symlink_to(tmp_path / "far/checkpoints")
    assert resume(tmp_path / "r", "--max_steps", 30)["code"] == 0


def test_readers_take_a_damaged_checkpoint(stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "r")
    flip(tmp_path / "r/checkpoints/step_00000015/model.pt", 0.5)
    assert not evaluate.main([str(tmp_path / "r")])
    printed = capsys.readouterr()
    assert "step 10" in printed.out and "step_00000015 is damaged" in printed.err
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "no such run, or one without checkpoints"), ("absent", "no such run")):
        for script in (sample, evaluate):
            with pytest.raises(SystemExit) as error:
                script.main([str(tmp_path / folder)])
            assert error.value.code == 2 and message in messages(capsys)[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The disk: rows 10, 11, 12, 30

@pytest.mark.parametrize("n", [1, 5, 100, 150, 260, 500])
def test_a_full_disk_breaks_what_was_saved(resume, whole, tmp_path, n):
    found = resume(tmp_path / "r", fault=["full", n])
    assert found["code"] == 4 and "No space left" in found["stderr"] and "it needs" in found["stderr"] and "MB are free" in found["stderr"]
    assert not list((tmp_path / "r/checkpoints").glob(".tmp*"))
    assert not checkpoint.checkpoints(tmp_path / "r") or checkpoint.find(tmp_path / "r", full=True)
    assert resume(tmp_path / "r")["code"] == 0 and same(tmp_path / "r", whole)


@pytest.mark.parametrize("limit", [60_000, 200_000])  # within model.pt, within train_state.pt
def test_what_the_system_says_is_hidden_by_torch(resume, whole, tmp_path, limit):
    found = resume(tmp_path / "r", fault=["limit", limit])
    assert found["code"] == 4 and "File too large" in found["stderr"] and ": not saved" in found["stderr"]
    assert resume(tmp_path / "r")["code"] == 0 and same(tmp_path / "r", whole)


SAVE_2_GB = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch, checkpoint
from model import Llama, ModelConfig

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

run = Path(sys.argv[2])
model = Llama(ModelConfig(dim=1024, n_layers=8, n_heads=16, n_kv_heads=4, intermediate_size=2816, vocab_size=42000, max_seq_len=64))
optimizer = torch.optim.AdamW(model.parameters())
for parameter in model.parameters():
    parameter.grad = torch.full_like(parameter, 1e-3)
optimizer.step()
optimizer.zero_grad()
weights, state = checkpoint.capture(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
size = sum(tensor.nbytes for tensor in checkpoint.named_tensors(weights, state).values())
largest = max(parameter.nbytes for parameter in model.parameters())
open("/proc/self/clear_refs", "w").write("5")  # the peak of memory starts anew
before, start = memory("VmRSS"), time.perf_counter()
checkpoint.save(run, 1, weights, state)
seconds = time.perf_counter() - start
extra = memory("VmHWM") - before
start = time.perf_counter()
folder = checkpoint.find(run, full=True)
verified = time.perf_counter() - start
start = time.perf_counter()
kept = [checkpoint.load_file(folder / name) for name in ("model.pt", "train_state.pt")]
loaded = time.perf_counter() - start
print(f"{size / 1e9:.2f} GB: saved in {seconds:.1f} s ({size / seconds / 1e9:.2f} GB/s), with {extra / 1e9:.2f} GB more memory (largest tensor {largest / 1e9:.2f} GB); "
      f"verified in {verified:.1f} s, loaded in {loaded:.1f} s; computed: a 1.7b state of 20.6 GB in {20.6e9 / size * seconds:.0f} s")
assert extra < largest, extra
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_needs_a_second_copy_in_memory(tmp_path):
    child = subprocess.run([sys.executable, "-c", SAVE_2_GB, str(HERE.parent), str(tmp_path)], capture_output=True, text=True)
    print(child.stdout, child.stderr)
    assert child.returncode == 0
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("n", [1, 7, 30])
def test_half_a_line_of_a_full_disk_counts_as_a_line(resume, whole, tmp_path, n):
    found = resume(tmp_path / "r", fault=["log full", n])
    assert found["code"] == 4 and "metrics.jsonl: not written at step" in found["stderr"]
    assert not (tmp_path / "r/metrics.jsonl").read_text().endswith("\n")
    assert resume(tmp_path / "r")["code"] == 0 and same(tmp_path / "r", whole) and steps_once(tmp_path / "r")


def test_an_impossible_folder_is_found_out_after_the_first_step(data, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert run(data, tmp_path / "file/r") == 2 and "check the path" in messages(capsys)[-1]
    if os.getuid():  # root may write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert run(data, tmp_path / "closed/r") == 2 and "check the path" in messages(capsys)[-1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10**5, 10**5))
    assert run(data, tmp_path / "r") == 2 and "do not fit" in messages(capsys)[-1]
    assert not (tmp_path / "r/metrics.jsonl").exists()


def test_a_log_changed_by_hand_loses_or_doubles_rows(resume, stopped, whole, tmp_path):
    for number, change in enumerate((lambda text: text.replace('{"event"', '{"note": "the best", "event"', 1), lambda text: text.replace(" ", ""), lambda text: "")):
        folder = tmp_path / str(number)
        shutil.copytree(stopped, folder)
        assert resume(folder, "--stop_at", 18)["code"] == 75
        flip(folder / "checkpoints/step_00000018/model.pt", 0.5)  # so that it goes back to step 15
        (folder / "metrics.jsonl").write_text(change((folder / "metrics.jsonl").read_text()))
        found = resume(folder)
        assert found["code"] == 0 and "is not as it was when step 15 was saved" in found["stderr"]
        assert [row[0] for row in rows(folder)] == (list(range(1, 21)) if number < 2 else list(range(16, 21)))


@pytest.mark.slow
def test_a_closed_screen_ends_the_training(data, whole, tmp_path):
    process = start(data, tmp_path / "r", stdout=subprocess.PIPE)
    process.stdout.close()
    assert codes([process]) == [0] and same(tmp_path / "r", whole)


def test_a_closed_terminal_loses_the_step(data, tmp_path):
    process = start(data, tmp_path / "r", "--max_steps", 100_000)
    wait_for(tmp_path / "r", 20)
    process.send_signal(signal.SIGHUP)
    assert codes([process]) == [75] and checkpoint.find(tmp_path / "r", full=True).name == f"step_{rows(tmp_path / 'r')[-1][0]:08d}"


def test_a_log_longer_than_the_checkpoint_tells_steps_twice(resume, stopped, whole, tmp_path):
    shutil.copytree(stopped, tmp_path / "r")
    with open(tmp_path / "r/metrics.jsonl", "a") as log:
        log.write('{"event": "train", "step": 16, "loss": 1.0}\n{"event": "train", "st')
    assert resume(tmp_path / "r")["code"] == 0
    assert steps_once(tmp_path / "r") and same(tmp_path / "r", whole)


# ---------------------------------------------------------------------------------------------------------------------
# Signals: rows 18, 19, 20

@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("where", ["step", "evaluate", "save"])
def test_a_signal_loses_the_step(resume, whole, tmp_path, where, name):
    assert resume(tmp_path / "r", fault=["signal", where, 8, name])["code"] == 75
    assert rows(tmp_path / "r")[-1][0] == (8 if where == "step" else 9)  # while looking at step 8: step 9 is made and saved
    assert checkpoint.find(tmp_path / "r", full=True).name == f"step_{rows(tmp_path / 'r')[-1][0]:08d}"
    assert resume(tmp_path / "r")["code"] == 0 and same(tmp_path / "r", whole)


def start(data, folder, *flags, rank=None, port=None, stdout=subprocess.DEVNULL):
    """train.py as a process of its own; of two, if `rank` is given."""
    folder.parent.mkdir(exist_ok=True)
    child = folder.parent / "child.py"
    if not child.exists():
        child.write_text(CHILD)
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | (
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if port else {})
    return subprocess.Popen([sys.executable, str(child), *FLAGS, "--data", str(data), "--run", str(folder), "--resume", *map(str, flags)],
                            env=env, stdout=stdout, stderr=subprocess.PIPE, text=True)


def two(data, folder, *flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(data, folder, "--micro_batch", 2, *flags, rank=rank, port=port) for rank in (0, 1)]


def codes(processes):
    found = [process.wait(60) for process in processes]
    print(*(process.stderr.read() for process in processes))  # shown when the test fails
    return found


def wait_for(folder, steps):
    end = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count('"train"') < steps:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_second_ctrl_c_is_not_heard(data, tmp_path):
    process = start(data, tmp_path / "r", "--max_steps", 100_000, "--batch_tokens", 128 * 512)  # long steps
    wait_for(tmp_path / "r", 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT


@pytest.mark.slow
def test_a_mistake_is_a_traceback_on_other_processes(data, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "r")
    processes = two(data, tmp_path / "r", "--seed", 5)
    found = [process.wait(60) for process in processes]
    said = [process.stderr.read().strip().splitlines()[-1] for process in processes]
    assert found == [2, 2] and "not the run that was saved: seed" in said[0]
    processes = two(data / "nowhere", tmp_path / "r")
    assert [process.wait(60) for process in processes] == [2, 2] and not any("Traceback" in process.stderr.read() for process in processes)


@pytest.mark.slow
def test_one_of_two_processes_goes_on_alone(data, tmp_path):
    processes = two(data, tmp_path / "r", "--max_steps", 2000)
    wait_for(tmp_path / "r", 20)
    processes[1].terminate()  # rank 1, which writes nothing
    assert codes(processes) == [75, 75]
    step = rows(tmp_path / "r")[-1][0]
    assert checkpoint.find(tmp_path / "r", full=True).name == f"step_{step:08d}"
    processes = two(data, tmp_path / "r", "--max_steps", 2000)
    wait_for(tmp_path / "r", step + 20)
    processes[1].kill()
    assert processes[0].wait(60) not in (0, 75)  # in bounded time
    assert checkpoint.find(tmp_path / "r", full=True)
    assert run(data, tmp_path / "r", "--max_steps", rows(tmp_path / "r")[-1][0] + 5, "--resume") == 0


@pytest.mark.slow
def test_torchrun_hides_the_stop(data, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    launcher = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", str(tmp_path / "child.py"), *FLAGS,
                                 "--data", str(data), "--run", str(tmp_path / "r"), "--max_steps", "5000", "--micro_batch", "2"],
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "r", 20)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert rows(tmp_path / "r", "end", ("reason",)) == [("stopped",)] and checkpoint.find(tmp_path / "r", full=True)


# ---------------------------------------------------------------------------------------------------------------------
# Another experiment, or the same one elsewhere: rows 13 to 16, 25, 36

CHANGES = {"preset": ["--preset", "tiny"], "seed": ["--seed", 1], "batch_tokens": ["--batch_tokens", 64], "seq_len": ["--seq_len", 32],
           "lr": ["--lr", 0.02], "min_lr": ["--min_lr", 0.002], "warmup_steps": ["--warmup_steps", 7], "schedule": ["--schedule", "linear"],
           "weight_decay": ["--weight_decay", 0], "beta1": ["--beta1", 0.8], "beta2": ["--beta2", 0.9], "grad_clip": ["--grad_clip", 2],
           "shuffle": ["--no-shuffle"], "init_from": ["--init_from", "runs/tiny"]}


def test_a_resume_becomes_another_experiment(stopped, data, tmp_path, capsys):
    assert set(CHANGES) == set(train.EXPERIMENT)
    saved = json.loads((stopped / "config.json").read_text())
    shutil.copytree(stopped, tmp_path / "r")
    for name, flags in CHANGES.items():
        assert run(data, tmp_path / "r", "--resume", *flags) == 2
        assert f"{name} (saved {saved[name]}, given " in messages(capsys)[-1]
    assert run(data, tmp_path / "r", "--resume", "--lr", 0.02, "--seed", 3) == 2
    assert all(f"{name} (saved" in messages_ for messages_ in messages(capsys)[-1:] for name in ("lr", "seed"))


def test_what_changed_on_resume_is_not_said(stopped, data, whole, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "r")
    assert run(data, tmp_path / "r", "--resume", "--eval_every", 2, "--micro_batch", 2, "--threads", 2, "--stop_at", 18) == 75
    printed = capsys.readouterr().out
    assert all(change in printed for change in ("eval_every 8 → 2", "micro_batch 4 → 2", "threads 1 → 2"))
    assert "dtype" not in printed.split("changed since")[1].split("\n")[0]
    env, = rows(tmp_path / "r", "resume", ("env",))[0]
    assert env["threads"] == 2 and env["micro_batch"] == 2
    assert np.allclose([row[2] for row in rows(tmp_path / "r")], [row[2] for row in rows(whole)][:18], rtol=1e-5)
    train.torch.set_num_threads(1)


def test_the_horizon_moves_by_itself(stopped, data, whole, tmp_path, capsys):
    for flags, lr in (([], rows(whole)[-1][3]), (["--max_steps", 40], None)):
        shutil.copytree(stopped, tmp_path / "r", dirs_exist_ok=True)
        base = FLAGS[:2] + FLAGS[4:]  # without --max_steps 20
        assert run(data, tmp_path / "r", "--resume", *flags, base=base) == 0
        assert rows(tmp_path / "r")[-1][0] == (40 if flags else 20)
        printed = capsys.readouterr().out
        settings = json.loads((tmp_path / "r/config.json").read_text())
        assert f"lr {train.lr_at(15, {**settings, 'max_steps': 20}):.2e} as saved, {train.lr_at(15, settings):.2e} now" in printed
        assert lr is None or rows(tmp_path / "r")[-1][3] == lr
        shutil.rmtree(tmp_path / "r")


def test_two_processes_or_one_go_on_differently(data, tmp_path, whole):
    straight = tmp_path / "straight"
    assert run(data, straight, "--max_steps", 50, "--save_every", 0) == 0
    for counts in ((1, 2), (2, 1)):
        folder = tmp_path / f"r{counts[0]}"
        for count, stop in zip(counts, (25, 50)):
            flags = ["--max_steps", 50, "--save_every", 0, *(["--stop_at", 25] if stop == 25 else [])]
            assert (codes(two(data, folder, *flags)) if count == 2 else [run(data, folder, *flags, "--resume")]) == [75 if stop == 25 else 0] * count
        losses, wanted = (np.array([row[2] for row in rows(place)]) for place in (folder, straight))
        assert len(losses) == 50 and np.abs(losses / wanted - 1).max() < 1e-5
        assert [row[1] for row in rows(folder)] == [row[1] for row in rows(straight)]
    assert run(data, tmp_path / "other", "--max_steps", 50, "--seed", 2, "--save_every", 0) == 0  # control
    assert np.abs(np.array([row[2] for row in rows(tmp_path / "other")]) / wanted - 1).max() > 1e-3


def test_other_data_is_trained_on(stopped, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    ids = np.load(tmp_path / "data/train_0001.npy")
    ids[700] = (ids[700] + 1) % 299
    np.save(tmp_path / "data/train_0001.npy", ids)
    shutil.copytree(stopped, tmp_path / "r")
    assert run(tmp_path / "data", tmp_path / "r", "--resume") == 2
    assert "changed: train_0001.npy" in messages(capsys)[-1]
    meta = json.loads((data / "meta.json").read_text())
    np.save(tmp_path / "data/train_0001.npy", np.load(data / "train_0001.npy"))
    meta["splits"]["train"].reverse()  # the same shards in another order
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    assert run(tmp_path / "data", tmp_path / "r", "--resume") == 2 and "changed: train_000" in messages(capsys)[-1]
    shutil.copy(data / "meta.json", tmp_path / "data")
    assert run(tmp_path / "data", tmp_path / "r", "--resume") == 0  # control: the same bytes elsewhere


def test_moments_go_to_another_parameter(stopped, tmp_path):  # row 32
    place = stopped / "checkpoints/step_00000015"
    weights, kept = (checkpoint.load_file(place / name) for name in ("model.pt", "train_state.pt"))
    model, _, _ = checkpoint.load_model(stopped)
    settings, scaler = json.loads((stopped / "config.json").read_text()), torch.amp.GradScaler("cpu", enabled=False)

    def restored(moments):
        optimizer = train.make_optimizer(model, settings, torch.device("cpu"))
        checkpoint.restore(weights, {**kept, "optimizer": moments}, model, optimizer, scaler)
        return {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}

    moments = kept["optimizer"]
    other_order = restored(dict(reversed(moments.items())))
    assert all(torch.equal(value, moments[name]["exp_avg"]) for name, value in other_order.items())
    keys = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]  # of one shape: by position they would be taken for each other
    swapped = restored({**moments, keys[0]: moments[keys[1]], keys[1]: moments[keys[0]]})
    assert not torch.equal(swapped[keys[0]], moments[keys[0]]["exp_avg"])  # control
    for wrong in ({name: value for name, value in moments.items() if name != keys[0]}, {**moments, "lm_head.bias": moments[keys[0]]}):
        with pytest.raises(checkpoint.UserError, match="optimizer state differ from the network in 1 parameters"):
            restored(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are none: rows 21, 22

def test_a_gradient_that_is_no_number_reaches_the_weights(data, whole, tmp_path, capsys, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def broken(parameters, *args):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 7:
            parameters[0].grad[0, 0] = float("nan")
        return clip(parameters, *args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    assert run(data, tmp_path / "r") == 3
    report = json.loads((tmp_path / "r/non_finite.json").read_text())
    assert report["step"] == 7 and len(report["windows"]) == 8 and report["grad_norm"] == "nan" and report["lr"] == rows(whole)[6][3]
    assert rows(tmp_path / "r") == rows(whole)[:6]
    assert all(tensor.isfinite().all() for tensor in state(tmp_path / "r", 5).values())


def test_a_failed_update_is_saved(data, tmp_path, capsys, monkeypatch):
    step = torch.optim.AdamW.step

    def broken(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        if len(self.state) and int(next(iter(self.state.values()))["step"]) == 10:
            with torch.no_grad():
                self.param_groups[0]["params"][3][0] = float("inf")
        return result
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    monkeypatch.setattr(train.Observer, "evaluate", lambda *args: None)
    assert run(data, tmp_path / "r") == 3
    assert "step 10: 1 tensors are no longer finite" in messages(capsys)[-1]
    newest = checkpoint.find(tmp_path / "r", full=True)
    assert newest.name == "step_00000005" and all(tensor.isfinite().all() for tensor in state(tmp_path / "r", 5).values())
    monkeypatch.undo()


def test_rows_and_losses_of_two_runs_are_equal_by_construction(whole):
    losses = [row[1] for row in rows(whole, keys=("step", "loss"))]
    assert len(set(losses)) == 20 and len({row[1] for row in evals(whole)}) == len(evals(whole))
