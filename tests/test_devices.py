"""support/devices.py, as far as it can be seen without a GPU: what PyTorch is told about one."""
import runpy
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import checkpoint
from conftest import ROOT
from model import Llama
from support import devices
from support.runs import UserError

# -------------------------------------------------------------------------------------------------
# The device

@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are two GPUs: the list of what PyTorch is asked to do with them."""
    asked = []

    def empty(size, device):
        asked.append(f"touch {device}")
        return SimpleNamespace(device=torch.device(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(f"set {device}"))
    monkeypatch.setattr(torch, "empty", empty)
    yield asked
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_cudnn_attention_is_off_unless_asked_for(gpus, monkeypatch):
    """Catches: the kernel with reports of NaN in its gradients, chosen by PyTorch in silence."""
    monkeypatch.delenv("CUDNN_ATTENTION", raising=False)
    devices.choose_device("cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()  # control: PyTorch's default
    devices.choose_device("cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setenv("CUDNN_ATTENTION", "1")
    devices.choose_device("cuda")
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_each_process_uses_the_gpu_of_its_rank_alone(gpus, monkeypatch):
    """Catches: memory taken on GPU 0 by every process, and more processes than GPUs; a device that
    is not the current one, whose name and memory would be GPU 0's."""
    monkeypatch.setattr(devices, "join", lambda *args, **kwargs: None)
    monkeypatch.setattr(devices, "watch_others", lambda: None)
    monkeypatch.setattr(devices, "ranks", lambda: (3, 4, 1))
    assert devices.start_processes(None) == torch.device("cuda:1")
    assert gpus == ["set cuda:1", "touch cuda:1", "set cuda:1"]
    monkeypatch.setattr(devices, "ranks", lambda: (3, 4, 2))
    with pytest.raises(UserError, match="as many processes as GPUs"):
        devices.start_processes("cuda")
    assert devices.start_processes("cpu") == torch.device("cpu")  # control: not counted


@pytest.mark.parametrize("name, visible, is_told", [
    (None, "0", True),
    (None, "", False),  # controls: a GPU that the user has hidden; a CPU on request
    ("cpu", "0", False)])
def test_gpu_that_torch_cannot_use_is_reported(monkeypatch, tmp_path, capsys, name, visible,
                                               is_told):
    """Catches: days of training on a CPU because the driver is too old for this build of torch."""
    monkeypatch.setattr(devices, "NVIDIA", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices.warn.cache_clear()
    for _ in range(2):
        assert devices.choose_device(name) == torch.device("cpu")
    assert capsys.readouterr().err.count("cannot use this machine's GPU") == is_told
    devices.warn.cache_clear()


def test_processes_wait_as_long_as_rank_0_may_save(monkeypatch):
    """Catches: the 10 minutes of NCCL, in which a slow disk does not take 20 GB."""
    given = {}
    monkeypatch.setattr(dist, "init_process_group",
                        lambda backend, **options: given.update(options))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    devices.join(0, 2, "gloo")
    assert given["timeout"] >= timedelta(seconds=20.6e9 / 10e6)  # at 10 MB/s


# -------------------------------------------------------------------------------------------------
# What the log says of it

@pytest.mark.parametrize("device, dtype, teraflops", [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
    ("NVIDIA H100 PCIe", "bfloat16", 756),
    ("NVIDIA A100-SXM4-80GB", "float16", 312),
    ("NVIDIA RTX A1000", "bfloat16", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
    ("NVIDIA H100 80GB HBM3", "float32", None)])
def test_utilization_is_of_the_peak_of_this_device(device, dtype, teraflops):
    """Catches: the share of a peak that this card, a slice of it, or this precision does not
    have."""
    env = {"device": device, "dtype": dtype, "world_size": 8}
    expected = None if teraflops is None else 8 * teraflops * 1e12 / 1e10
    assert devices.peak_rate(env, flops_per_token=1e10) == pytest.approx(expected)


def test_log_tells_the_gpu(monkeypatch):
    """Catches: a claim about a GPU or an attention kernel that no log can support."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")

    def env_on(device):
        machine = devices.Machine(0, 1, device, torch.bfloat16)
        return devices.environment(machine, 8, ["loss"], {"model.py": "0"})

    gpu = torch.device("cuda")
    cpu = torch.device("cpu")  # control
    assert env_on(gpu).keys() - env_on(cpu).keys() == {"cuda", "cudnn_attention"}
    assert env_on(gpu)["device"] == "NVIDIA H200"


# -------------------------------------------------------------------------------------------------
# Batches and weights on their way to the device

def test_batch_is_copied_without_waiting(monkeypatch):
    """Catches: a GPU that is idle in each micro-batch, until its tokens have arrived."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pin") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda *args, **options: asked.append(options))
    for name in ("cuda", "cpu"):
        devices.to_device(np.arange(12), torch.device(name))
    assert asked == ["pin", {"non_blocking": True}, {}]  # control: a CPU has nothing to pin


def test_loaded_weights_are_not_drawn_first(whole):
    """Catches: 40 seconds of random numbers for 1.7 billion weights that are overwritten at once;
    a table that is neither drawn nor loaded."""
    before = torch.get_rng_state()
    model, _, _ = checkpoint.load_model(whole)
    assert torch.equal(torch.get_rng_state(), before)
    fresh = Llama(model.config)
    assert not torch.equal(torch.get_rng_state(), before)  # control
    assert torch.equal(model.model.rope_cos, fresh.model.rope_cos)


# -------------------------------------------------------------------------------------------------
# gpu_check.sh

def test_gpu_check_fails_where_nothing_ran(tmp_path, monkeypatch, capsys):
    """Catches: a mistake in a script that nobody runs for months; a table in which a part that did
    not run has passed."""
    script = ROOT / "bench/gpu_check.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    checks = script.read_text().split("<<'PYTHON'\n")[1]
    (tmp_path / "check.py").write_text(checks.removesuffix("PYTHON\n"))

    def printed(name):
        monkeypatch.setattr(sys, "argv", ["check.py", "cpu", str(tmp_path), name])
        runpy.run_path(str(tmp_path / "check.py"))
        return capsys.readouterr().out.splitlines()

    results = printed("table")[2:]
    assert len(results) > 20
    assert all(line.endswith("| **FAIL** |") for line in results)
    assert printed("machine")[-1].startswith("| versions |  | torch")  # control
