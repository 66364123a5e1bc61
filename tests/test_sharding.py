"""--fsdp: a run whose weights, gradients and moments are divided among processes is the same run,
and its checkpoints are those of any other."""
import json
import shutil

import numpy as np
import pytest

from conftest import evals, messages, rows, run, same, state
from support import devices
from test_faults import distance, ends, newest, two

pytestmark = pytest.mark.usefixtures("short_samples")


def shapes(folder):
    """What kind of tensor each name in the last checkpoint stands for."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state(folder).items()}


def test_run_moves_between_one_process_ddp_and_fsdp(data, whole, tmp_path):
    """Catches: a checkpoint that only as many processes can read, or that has parts of tensors;
    moments that are lost or mixed up on the way; gradients that are a mean where the sum is
    meant."""
    folder = tmp_path / "r"
    assert run(data, folder, "--stop_at", 5) == 75
    assert ends(two(data, folder, "--fsdp", "--stop_at", 10))[0] == [75, 75]
    shutil.copytree(folder, tmp_path / "forgetful")
    assert ends(two(data, folder, "--no-fsdp", "--stop_at", 15))[0] == [75, 75]
    assert run(data, folder, "--resume") == 0
    found = [(config["fsdp"], env["world_size"])
             for config, env in rows(folder, "resume", ("config", "env"))]
    assert found == [(True, 2), (False, 2), (False, 1)]
    assert rows(folder, keys=("step", "tokens")) == rows(whole, keys=("step", "tokens"))
    assert distance(folder, whole) < 1e-5
    assert shapes(folder) == shapes(whole)
    # control: without the moments that the sharded run has saved it is another run
    alone = ("--resume", "--no-fsdp", "--reset_optimizer")
    assert run(data, tmp_path / "forgetful", *alone) == 0
    assert distance(tmp_path / "forgetful", whole) > 1e-3


def test_impossible_sharding_is_one_line(data, tmp_path, capsys, monkeypatch):
    """Catches: a --fsdp that does nothing, or updates that one process skips and another makes."""
    assert run(data, tmp_path, "--fsdp") == 2
    [line] = messages(capsys)
    assert "--fsdp shards the model over several processes, and this is the only one" in line
    monkeypatch.setattr(devices, "processes", lambda: (0, 2))
    assert run(data, tmp_path, "--fsdp", "--dtype", "fp16") == 2
    [line] = messages(capsys)
    assert "--fsdp does not work in fp16" in line


@pytest.mark.slow
def test_resume_of_a_sharded_run_is_bitwise(data, whole, tmp_path):
    """Catches: state of a process that its part of the checkpoint does not hold; evaluations that
    differ from those of one process."""
    straight = tmp_path / "straight"
    stopped = tmp_path / "stopped"
    assert ends(two(data, straight, "--fsdp"))[0] == [0, 0]
    assert ends(two(data, stopped, "--fsdp", "--stop_at", 10))[0] == [75, 75]
    shutil.copytree(stopped, tmp_path / "forgetful")
    assert ends(two(data, stopped))[0] == [0, 0]  # --fsdp is saved with the run
    assert same(stopped, straight)
    assert distance(straight, whole) < 1e-5
    losses = [[row[1] for row in evals(folder)] for folder in (straight, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # control
    assert ends(two(data, tmp_path / "forgetful", "--reset_optimizer"))[0] == [0, 0]
    assert not same(tmp_path / "forgetful", straight)


TIED = """
import dataclasses
model.PRESETS["test"] = dataclasses.replace(model.PRESETS["test"], tie_embeddings=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("before, flags, tolerance", [
    ("", ["--compile", "--activation_checkpointing"], 1e-5),
    ("", ["--dtype", "bf16"], 1e-2),
    (TIED, ["--micro_batch", 4], 1e-5),  # one micro-batch a step: nothing accumulates
], ids=["compiled and checkpointed", "bf16", "tied"])
def test_sharded_run_is_that_of_ddp(data, tmp_path, before, flags, tolerance):
    """Catches: two features that work alone and not together."""
    for name in ("fsdp", "no-fsdp"):
        codes, _ = ends(two(data, tmp_path / name, f"--{name}", *flags, before=before))
        assert codes == [0, 0]
    assert distance(tmp_path / "fsdp", tmp_path / "no-fsdp") < tolerance
    # control: other steps
    losses = rows(tmp_path / "fsdp", keys=("loss",))
    assert not np.allclose(losses[1:], losses[:-1], rtol=1e-2)


# Each process writes down how many numbers it holds at the end, of weights and of moments.
COUNT = """
import json, os
make_optimizer = train.make_optimizer
end_processes = train.end_processes
def keep(*args):
    train.optimizer = make_optimizer(*args)
    return train.optimizer
def count(code):
    held = {"weights": 0, "moments": 0}
    for parameter, moments in train.optimizer.state.items():
        for kind, tensor in (("weights", parameter), ("moments", moments["exp_avg"])):
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            held[kind] += local.untyped_storage().nbytes() // 4
    with open(os.environ["HELD"] + os.environ["RANK"], "w") as file:
        json.dump(held, file)
    return end_processes(code)
train.make_optimizer = keep
train.end_processes = count
"""


@pytest.mark.slow
@pytest.mark.parametrize("flag, share", [("--fsdp", 0.5), ("--no-fsdp", 1)])  # the second: control
def test_each_process_holds_its_part(data, tmp_path, monkeypatch, flag, share):
    """Catches: a sharded run in which each process has everything after all: gathered once and
    never freed, restored in whole, or views of whole tensors."""
    monkeypatch.setenv("HELD", str(tmp_path / "held"))
    for stop in (4, 8):  # new, and restored
        codes, _ = ends(two(data, tmp_path / "r", flag, "--stop_at", stop, before=COUNT))
        assert codes == [75, 75]
        for rank in (0, 1):
            held = json.loads((tmp_path / f"held{rank}").read_text())
            for kind in ("weights", "moments"):
                assert held[kind] / 43_168 == pytest.approx(share, rel=0.01)


# The gradient of rank 1's part has a NaN in step 7.
NAN = """
import os, torch
clip = torch.nn.utils.clip_grad_norm_
calls = []
def broken(parameters, *args):
    parameters = list(parameters)
    calls.append(1)
    if len(calls) == 7 and os.environ["RANK"] == "1":
        parameters[0].grad.to_local()[0, 0] = float("nan")
    return clip(parameters, *args)
torch.nn.utils.clip_grad_norm_ = broken
"""


@pytest.mark.slow
def test_nan_in_one_part_stops_all(data, tmp_path):
    """Catches: a process that updates its part while another stops, or waits for it for ever."""
    codes, errors = ends(two(data, tmp_path / "r", "--fsdp", before=NAN))
    assert codes == [3, 3]
    assert "step 7: loss" in errors[0]
    assert "gradient norm nan" in errors[0]
    assert newest(tmp_path / "r") == 6
    assert ends(two(data, tmp_path / "r", "--stop_at", 8))[0] == [75, 75]
