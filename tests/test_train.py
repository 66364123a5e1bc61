"""A run is its full state: stopped and resumed, on one process or two, looked at often or rarely, it is the same run.

Each comparison has a control: the same comparison with a mistake made on purpose, which must show.
"""
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import runs
import sample
import train
from conftest import CHILD, FLAGS, evals, messages, rows, run, same

# ---------------------------------------------------------------------------------------------------------------------
# Stop and resume

@pytest.mark.parametrize("stop", [1, 3, 8, 17, 19])  # in the warm-up, after it, right after an evaluation, past an epoch's end
def test_a_resumed_run_is_another_run(data, whole, tmp_path, stop):
    assert run(data, tmp_path / "r", "--stop_at", stop) == 75
    assert rows(tmp_path / "r")[-1][0] == stop
    assert run(data, tmp_path / "r", "--resume") == 0
    assert same(tmp_path / "r", whole)
    assert [row[0] for row in rows(tmp_path / "r")] == list(range(1, 21))


@pytest.mark.parametrize("mistake", ["reset", "moments", "step", "seed", "rounded"])
def test_control_a_state_that_is_not_the_full_state_shows(data, whole, tmp_path, mistake):
    folder = tmp_path / "r"
    run(data, folder, "--stop_at", 10)
    if mistake == "reset":
        assert run(data, folder, "--resume", "--reset_optimizer") == 0
    else:
        place = checkpoint.find(folder, full=True)
        weights, kept = (torch.load(place / name, weights_only=True) for name in ("model.pt", "train_state.pt"))
        if mistake == "moments":
            for moments in kept["optimizer"].values():
                moments["exp_avg"].zero_()
        elif mistake == "step":
            kept["step"] += 1
        elif mistake == "seed":
            kept["config"]["seed"] += 1
        else:
            weights["model"] = {name: value.half().float() for name, value in weights["model"].items()}
        checkpoint.save(folder, 10, weights, kept)
        assert run(data, folder, "--resume") == 0
    assert not same(folder, whole)


def test_a_second_process_or_a_used_folder_mixes_two_runs(data, whole, tmp_path, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    assert run(data, whole) == 2
    assert "--resume" in messages(capsys)[-1]
    held = runs.lock(whole)
    assert run(data, whole, "--overwrite") == 2 and "in use" in messages(capsys)[-1]
    held.close()
    assert run(data, whole, "--resume") == 0  # finished: one line, nothing changes
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_signal_at_a_random_moment_changes_the_run(data, whole, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    length = ["--max_steps", "150", "--eval_every", "50"]
    command = list(map(str, [sys.executable, tmp_path / "child.py", *FLAGS, "--data", data, "--run", tmp_path / "r", *length]))
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    log = tmp_path / "r" / "metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.read_text().count('"train"') > 20):
        time.sleep(0.01)
    time.sleep(0.2 * np.random.RandomState(os.getpid()).rand())
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 75
    assert run(data, tmp_path / "r", *length, "--resume") == 0
    assert run(data, tmp_path / "straight", *length) == 0
    assert rows(tmp_path / "r") == rows(tmp_path / "straight") and evals(tmp_path / "r") == evals(tmp_path / "straight")
    assert rows(tmp_path / "r")[:20] != rows(whole)  # control: another horizon is another schedule


def test_looking_more_often_changes_the_training(data, whole, tmp_path):
    assert run(data, tmp_path / "r", "--eval_every", 1, "--sample_every", 2, "--save_every", 3, "--eval_tokens", 64) == 0
    assert rows(tmp_path / "r") == rows(whole)
    assert run(data, tmp_path / "s", "--seed", 1) == 0
    assert rows(tmp_path / "s") != rows(whole)  # control


def test_the_trajectory_loses_its_checkpoints_or_keeps_too_many(whole):
    kept = {step: set(p.name for p in folder.iterdir()) for step, folder in checkpoint.checkpoints(whole).items()}
    assert list(kept) == [0, 1, 2, 4, 8, 15, 16, 20]
    full = {step for step, names in kept.items() if "train_state.pt" in names}
    assert full == {15, 20}  # the newest two; the full state of step 0 shrank to its weights


def test_events_come_in_another_order(whole):
    events = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events][:8] == [
        ("start", 0), ("eval", 0), ("benchmark", 0), ("sample", 0), ("train", 1), ("eval", 1), ("benchmark", 1), ("train", 2)]
    assert events[-1]["event"] == "end" and events[-1]["reason"] == "done"


# ---------------------------------------------------------------------------------------------------------------------
# The step

@pytest.mark.slow
def test_two_processes_train_another_run(data, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    flags = [*FLAGS, "--data", str(data), "--max_steps", "50", "--micro_batch", "2"]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", str(tmp_path / "child.py"), *flags,
                    "--run", str(tmp_path / "two")], check=True, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run(data, tmp_path / "one", "--max_steps", 50, "--micro_batch", 2) == 0
    assert run(data, tmp_path / "other", "--max_steps", 50, "--micro_batch", 2, "--seed", 2) == 0
    one, two, other = (np.array([row[2] for row in rows(tmp_path / name)]) for name in ("one", "two", "other"))
    assert len(two) == 50 and np.abs(two / one - 1).max() < 1e-5
    assert np.abs(other / one - 1).max() > 1e-5  # control
    assert np.allclose([row[1] for row in evals(tmp_path / "two")], [row[1] for row in evals(tmp_path / "one")], rtol=1e-5)
    one, two, other = (rows(tmp_path / name, "benchmark", ("step", "acc", "acc_norm", "acc_pmi", "n")) for name in ("one", "two", "other"))
    assert one == two != other


def test_micro_batches_that_are_averaged_one_by_one(data, whole, tmp_path):
    assert run(data, tmp_path / "r", "--micro_batch", 1) == 0
    few, many = (np.array([row[2:] for row in rows(folder)]) for folder in (whole, tmp_path / "r"))
    assert np.abs(many / few - 1).max() < 1e-4
    assert run(data, tmp_path / "s", "--batch_tokens", 64, "--micro_batch", 1) == 0  # control: half the batch
    assert np.abs(np.array([row[2:] for row in rows(tmp_path / "s")]) / few - 1).max() > 1e-2


def test_the_schedule_is_not_what_it_says():
    base = dict(lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    for schedule, half in (("cosine", 0.1 + 0.9 * 0.5), ("linear", 0.55), ("wsd", 1.0)):
        settings = {**base, "schedule": schedule}
        assert [train.lr_at(s, settings) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
        assert math.isclose(train.lr_at(60, settings), half)
        assert math.isclose(train.lr_at(110, settings), 0.1)
        values = [train.lr_at(s, settings) for s in range(10, 111)]
        assert values == sorted(values, reverse=True)
    assert math.isclose(train.lr_at(99, {**base, "schedule": "wsd"}), 0.1 + 0.9 * 11 / 22)  # in the middle of the last 20 %
    assert train.lr_at(50, {**base, "schedule": "cosine", "max_steps": None}) == 1.0


def test_decay_of_vectors_or_a_forgotten_parameter(whole):
    model, _, _ = checkpoint.load_model(whole)
    settings = json.loads((whole / "config.json").read_text())
    matrices, vectors = train.make_optimizer(model, settings, torch.device("cpu")).param_groups
    assert matrices["weight_decay"] == 0.1 and all(p.dim() == 2 for p in matrices["params"])
    assert vectors["weight_decay"] == 0.0 and all(p.dim() == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_fp16_forgets_its_loss_scale(data, tmp_path):
    for name, stops in (("straight", []), ("resumed", ["--stop_at", 9])):
        code = run(data, tmp_path / name, "--dtype", "fp16", *stops)
    assert code == 75 and run(data, tmp_path / "resumed", "--dtype", "fp16", "--resume") == 0
    assert same(tmp_path / "straight", tmp_path / "resumed")
    kept = torch.load(tmp_path / "resumed/checkpoints/step_00000020/train_state.pt", weights_only=True)
    assert kept["scaler"]["_growth_tracker"] == 20 and kept["scaler"]["scale"] == 65536.0


def test_a_loss_that_is_no_number_reaches_the_weights(data, tmp_path, capsys):
    assert run(data, tmp_path / "r", "--lr", 1e12, "--grad_clip", 0, "--warmup_steps", 0) == 3
    assert "update was not made" in messages(capsys)[-1] and (tmp_path / "r" / "non_finite.json").exists()
    model, _, _ = checkpoint.load_model(tmp_path / "r", step=0)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_minutes_do_not_become_a_fixed_horizon(data, tmp_path, monkeypatch):
    monkeypatch.setitem(train.BY_PRESET, "test", {"max_minutes": 0.2})
    flags = [flag for flag in FLAGS if flag not in ("--max_steps", "20")]
    assert run(data, tmp_path / "r", "--stop_at", 25, base=flags) == 75
    (step, horizon), = rows(tmp_path / "r", "horizon", ("step", "max_steps"))
    assert step == 20 and horizon > 20
    assert run(data, tmp_path / "r", "--resume", "--max_steps", 30, base=flags) == 0  # another one is accepted when it is asked for
    assert rows(tmp_path / "r")[-1][0] == 30 and json.loads((tmp_path / "r/config.json").read_text())["max_steps"] == 30


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and mistakes

def test_a_checkpoint_runs_code(whole, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))
    place = tmp_path / "r/checkpoints/step_00000001"
    place.mkdir(parents=True)
    torch.save({"config": {}, "model": Bomb()}, place / "model.pt")
    content = (place / "model.pt").read_bytes()
    checkpoint.write_json(place / "meta.json", {"step": 1, "files": {"model.pt": {"bytes": len(content), "sha256": __import__("hashlib").sha256(content).hexdigest()}}})
    with pytest.raises(SystemExit) as error:
        sample.main([str(tmp_path / "r")])
    assert error.value.code == 2 and "not loaded" in messages(capsys)[-1] and not (tmp_path / "exploded").exists()
    torch.load(place / "model.pt", weights_only=False, pickle_module=pickle)  # control: the bomb is live
    assert (tmp_path / "exploded").exists()


def test_parameters_of_another_network_are_loaded(whole):
    model, _, _ = checkpoint.load_model(whole)
    weights = {"model": dict(model.state_dict())}
    weights["model"]["model.norm.scale"] = weights["model"].pop("model.norm.weight")
    with pytest.raises(checkpoint.UserError, match=r"model\.norm\.scale .*absent in the code"):
        checkpoint.restore_weights(weights, model)


@pytest.mark.parametrize("flags, message", [
    (["--data", "nowhere"], "no train shards in nowhere — run: python prepare_data.py text"),
    (["--batch_tokens", 100], "use --batch_tokens 64 or 128"),
    (["--lr", 0.5, "--resume"], "lr (saved 0.01, given 0.5)"),
    (["--device", "cuda:77", "--overwrite"], "no device cuda:77"), (["--device", "meta"], "no device meta"),
    (["--max_minutes", 1], "give one"),
    (["--keep_last", 1], "it can be 2 to"),
    (["--seed", 2**40, "--overwrite"], "--seed"), (["--lr", "nan", "--overwrite"], "--lr nan"), (["--beta1", 1, "--overwrite"], "--beta1"),
    (["--resume", "--overwrite"], "choose"), (["--reset_optimizer"], "choose"),
    (["--data", "nowhere", "--overwrite"], "no train shards"),
    (["--seq_len", 100_000, "--batch_tokens", 400_000, "--overwrite"], "do not fill one window"),
])
def test_a_mistake_ends_in_a_traceback_or_loses_a_run(data, whole, tmp_path, capsys, flags, message):
    used = tmp_path / "r"
    if {"--resume", "--overwrite"} & set(flags):
        shutil.copytree(whole, used, ignore=shutil.ignore_patterns(".lock", checkpoint.NEEDED))
    before = sorted((p, p.stat().st_size) for p in used.rglob("*") if p.is_file())
    assert run(data, used, *flags) == 2
    assert message in messages(capsys)[-1]
    assert sorted((p, p.stat().st_size) for p in used.rglob("*") if p.is_file() and p.name != ".lock") == before


def test_out_of_memory_does_not_say_what_to_do(data, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train.Llama, "forward", full)
    monkeypatch.setattr(train.Observer, "evaluate", lambda *args: None)
    monkeypatch.setattr(train.Observer, "sample", lambda *args: None)
    assert run(data, tmp_path / "r") == 2
    assert "use --micro_batch 2" in messages(capsys)[-1]
