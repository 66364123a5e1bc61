"""support/devices.py, as far as it can be seen without a GPU: what PyTorch is told about one."""
import os
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import checkpoint
from conftest import ROOT, rows
from model import Llama
from support import devices, durable
from support.runs import Log, UserError

# -------------------------------------------------------------------------------------------------
# The device

@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are GPUs: the list of what PyTorch is asked to do with them."""
    asked = []

    def empty(size, device):
        asked.append(f"touch {device}")
        return SimpleNamespace(device=torch.device(device))

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(f"set {device}"))
        monkeypatch.setattr(torch, "empty", empty)
        return asked
    yield pretend
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("value, is_on", [(None, False), ("0", False), ("1", True)])
def test_cudnn_attention_is_off_unless_asked_for(gpus, monkeypatch, value, is_on):
    """Catches: the kernel with reports of NaN in its gradients, chosen by PyTorch in silence."""
    monkeypatch.delenv("CUDNN_ATTENTION", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDNN_ATTENTION", value)
    gpus(1)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # control: PyTorch's default
    devices.choose_device("cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    devices.choose_device("cuda")
    assert torch.backends.cuda.cudnn_sdp_enabled() == is_on


@pytest.mark.parametrize("name", [None, "cuda"])
def test_each_process_uses_the_gpu_of_its_rank_alone(gpus, monkeypatch, name):
    """Catches: memory taken on GPU 0 by every process, and more processes than GPUs."""
    monkeypatch.setattr(devices, "ranks", lambda: (3, 4, 1))
    monkeypatch.setattr(devices, "join", lambda *args, **kwargs: None)
    monkeypatch.setattr(devices, "watch_others", lambda: None)
    asked = gpus(2)
    device = devices.start_processes(name)
    assert device == torch.device("cuda:1")
    assert asked == ["set cuda:1", "touch cuda:1", "set cuda:1"]
    with pytest.raises(UserError, match="as many processes as GPUs"):
        gpus(1)
        devices.start_processes(name)
    # control: processes on the CPU are not counted
    device = devices.start_processes("cpu")
    assert device == torch.device("cpu")


def test_the_gpu_that_is_named_is_the_current_one(gpus):
    """Catches: `--device cuda:1` that reports the name and the memory of GPU 0."""
    asked = gpus(2)
    devices.choose_device("cuda:1")
    assert asked[-1] == "set cuda:1"


@pytest.mark.parametrize("name, is_there, visible, is_told", [
    (None, True, None, True),
    (None, False, None, False),  # controls: no GPU; one that the user has hidden; a CPU on request
    (None, True, "", False),
    ("cpu", True, None, False)])
def test_gpu_that_torch_cannot_use_is_reported(monkeypatch, tmp_path, capsys, name, is_there,
                                               visible, is_told):
    """Catches: days of training on a CPU because the driver is too old for this build of torch."""
    file = tmp_path / "nvidia0"
    if is_there:
        file.touch()
    monkeypatch.setattr(devices, "NVIDIA", file)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices.note_unused_gpu.cache_clear()
    for _ in range(2):
        assert devices.choose_device(name) == torch.device("cpu")
    assert capsys.readouterr().err.count("cannot use this machine's GPU") == is_told
    devices.note_unused_gpu.cache_clear()


def test_processes_wait_as_long_as_rank_0_may_save(monkeypatch):
    """Catches: the 10 minutes of NCCL, in which a slow disk does not take 20 GB."""
    given = {}
    monkeypatch.setattr(dist, "init_process_group",
                        lambda backend, **options: given.update(options))
    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setitem(os.environ, name, value)
    devices.join(0, 2, "gloo")
    assert given["timeout"] >= timedelta(seconds=20.6e9 / 10e6)  # at 10 MB/s


# -------------------------------------------------------------------------------------------------
# What the log says of it

@pytest.mark.parametrize("device, dtype, teraflops", [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
    ("NVIDIA H100 PCIe", "bfloat16", 756),
    ("NVIDIA H100 NVL", "bfloat16", 835),
    ("NVIDIA H200", "bfloat16", 989),
    ("NVIDIA GH200 480GB", "bfloat16", 989),
    ("NVIDIA A100-SXM4-80GB", "float16", 312),
    ("NVIDIA RTX A6000", "bfloat16", 154.8),
    ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
    ("NVIDIA H100 80GB HBM3", "float32", None),
    ("NVIDIA RTX 6000 Ada Generation", "bfloat16", None),
    ("x86_64", "bfloat16", None)])
def test_utilization_is_of_the_peak_of_this_device(device, dtype, teraflops):
    """Catches: the share of a peak that this card, a slice of it, or this precision does not
    have."""
    env = {"device": device, "dtype": dtype, "world_size": 8}
    expected = None if teraflops is None else 8 * teraflops * 1e12 / 1e10
    assert devices.peak_rate(env, flops_per_token=1e10) == pytest.approx(expected)


def test_log_tells_gpu_and_memory(monkeypatch, tmp_path):
    """Catches: a claim about memory or an attention kernel that no log can support."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    added = {"cuda", "cudnn_attention"}
    for name, keys, memory in (("cuda", added, 123), ("cpu", set(), None)):
        device = torch.device(name)
        machine = devices.Machine(0, 1, device, torch.bfloat16)
        env = devices.environment(machine, 8, ["loss"], {"model.py": "0"})
        assert env.keys() & added == keys
        assert (env["device"] == "NVIDIA H200") == (name == "cuda")
        (tmp_path / name).mkdir()
        log = Log(tmp_path / name, 0, max_steps=1)
        log.train(1, 128, 3.0, 0.1, 1.0, 0.5, 128, skipped=False,
                  memory=devices.peak_memory(device))
        logged = [row for row in rows(tmp_path / name, keys=("step",))]
        assert len(logged) == 1
        assert ("peak_memory" in (tmp_path / name / "metrics.jsonl").read_text()) == (memory == 123)


# -------------------------------------------------------------------------------------------------
# Batches and weights on their way to the device

def test_batch_is_copied_without_waiting(monkeypatch):
    """Catches: a GPU that is idle in each micro-batch, until its tokens have arrived."""
    batch = np.arange(12).reshape(3, 4)
    assert devices.to_device(batch, torch.device("cpu")).tolist() == batch.tolist()
    asked = []

    def pin(tensor):
        asked.append("pinned")
        return tensor

    def to(tensor, device, non_blocking=False):
        asked.append(f"{device}, non_blocking {non_blocking}")
        return tensor
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    devices.to_device(batch, torch.device("cuda"))
    assert asked == ["pinned", "cuda, non_blocking True"]
    asked.clear()
    devices.to_device(batch, torch.device("cpu"))
    assert asked == ["cpu, non_blocking False"]  # control: a CPU has nothing to pin


def test_loaded_weights_are_not_drawn_first(whole):
    """Catches: 40 seconds of random numbers for 1.7 billion weights that are overwritten at once;
    a weight that is neither drawn nor loaded."""
    before = torch.get_rng_state()
    model, _, _ = checkpoint.load_model(whole)
    assert torch.equal(torch.get_rng_state(), before)
    saved = durable.load_file(whole / "checkpoints/step_00000020/model.pt")["model"]
    found = model.state_dict()
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    fresh = Llama(model.config)
    assert not torch.equal(torch.get_rng_state(), before)  # control
    assert torch.equal(model.model.rope_cos, fresh.model.rope_cos)  # a table that is not saved


# -------------------------------------------------------------------------------------------------
# gpu_check.sh

def test_gpu_check_fails_where_nothing_ran(tmp_path):
    """Catches: a mistake in a script that nobody runs for months; a table in which a part that did
    not run has passed."""
    script = ROOT / "bench/gpu_check.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    checks = script.read_text().split("<<'PYTHON'\n")[1]
    (tmp_path / "check.py").write_text(checks.removesuffix("PYTHON\n"))
    command = [sys.executable, str(tmp_path / "check.py"), "cpu", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    table = subprocess.run([*command, "table"], env=env, capture_output=True, text=True)
    print(table.stderr)
    assert table.returncode == 0
    results = table.stdout.splitlines()[2:]
    assert len(results) > 20
    assert all(line.endswith("| **FAIL** |") for line in results)
    machine = subprocess.run([*command, "machine"], env=env, capture_output=True, text=True)
    assert machine.stdout.splitlines()[-1].startswith("| versions |  | torch")  # control
    assert not machine.stdout.endswith("| **FAIL** |\n")
