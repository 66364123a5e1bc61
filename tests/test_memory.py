"""bench/plan.py: what is computed about memory and time is what happens."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench import plan
from conftest import ROOT
from model import Llama, ModelConfig

SMALL = ModelConfig(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, intermediate_size=96,
                    vocab_size=512, max_seq_len=32)


@pytest.mark.parametrize("recompute", [False, True])
def test_two_sizes_tell_the_peak_of_any_number_of_layers(recompute):
    """Catches: a peak that is extrapolated to another network."""
    computed = plan.peak_of_step(SMALL, 2, recompute)
    assert computed == pytest.approx(plan.counted_peak(SMALL, 2, recompute), rel=1e-3)
    three = plan.counted_peak(replace(SMALL, n_layers=3), 2, recompute)
    assert computed != pytest.approx(three, rel=0.02)  # control


def test_counter_sees_what_is_freed():
    """Catches: a peak that is the sum of everything, or in which views count."""
    with plan.Peak() as counter:
        for _ in range(3):
            numbers = torch.zeros(1000)  # 4,000 bytes
            half = numbers[:500]
            del numbers
            half = half + 1  # the 4,000 bytes live until here
        assert (counter.now, counter.peak) == (2000, 6000)
        del half
    assert counter.now == 0


# Trains two steps in a fresh process, and prints how many bytes its memory grew at most.
MEASURE = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.distributed as dist
from model import Llama, ModelConfig
from support import fast, memory, sharding
from support.devices import Machine

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

def train(config, micro_batch, recompute, fsdp):
    llama = fast.use(Llama(config), ("attention", "loss"))
    if recompute:
        memory.checkpoint_activations(llama)
    if fsdp:
        sharding.shard(llama, Machine(dist.get_rank(), 2, torch.device("cpu"), torch.bfloat16))
    optimizer = torch.optim.AdamW(llama.parameters(), fused=True)
    for step in range(2):
        if step == 1:
            open("/proc/self/clear_refs", "w").write("5")  # the peak of memory starts anew
        tokens = torch.randint(0, config.vocab_size, (micro_batch, config.max_seq_len))
        for micro in range(2):
            if fsdp:
                llama.set_requires_gradient_sync(micro == 1)
            with torch.autocast("cpu", torch.bfloat16):
                _, loss = llama(tokens, tokens, reduction="sum")
            (loss / 1000).backward()
        optimizer.step()
        optimizer.zero_grad()

sizes, micro_batch, recompute, fsdp, place, rank = json.loads(sys.argv[1])
torch.set_num_threads(1)
if fsdp:
    dist.init_process_group("gloo", init_method="file://" + place, rank=rank, world_size=2)
small = ModelConfig(dim=64, n_layers=1, vocab_size=sizes["vocab_size"], max_seq_len=64)
train(small, 2, recompute, fsdp)  # now the libraries are loaded
before = status("VmRSS")
train(ModelConfig(**sizes), micro_batch, recompute, fsdp)
print(status("VmHWM") - before)
"""


def measured_peak(config, micro_batch, recompute, fsdp, place):
    """Bytes; of rank 0 of two processes with fsdp, which meet in a file at this place."""
    # The C library gives freed memory back at once.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    processes = []
    for rank in range(1 + fsdp):
        request = json.dumps([vars(config), micro_batch, recompute, fsdp, str(place), rank])
        processes.append(subprocess.Popen([sys.executable, "-c", MEASURE, request], env=env,
                                          text=True, stdout=subprocess.PIPE))
    printed = [process.communicate(timeout=120)[0] for process in processes]
    return int(printed[0])


# One in which the network is most of the memory, one in which the loss is: it comes in chunks.
WIDE = ModelConfig(dim=512, n_layers=8, n_heads=8, n_kv_heads=4, intermediate_size=1536,
                   vocab_size=4096, max_seq_len=256)
LARGE_VOCABULARY = ModelConfig(dim=384, n_layers=8, n_heads=6, n_kv_heads=6,
                               intermediate_size=1536, vocab_size=50_257, max_seq_len=256)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("config, recompute, fsdp", [
    (WIDE, True, True),
    (WIDE, False, False),
    (LARGE_VOCABULARY, False, True),
])
def test_computed_memory_is_that_of_a_process(config, recompute, fsdp, tmp_path):
    """Catches: a plan that promises a micro-batch which does not fit."""
    measured = measured_peak(config, 8, recompute, fsdp, tmp_path / "meeting")
    found = plan.peak_of_step(config, 8, recompute)
    if fsdp:
        found = plan.peak_when_sharded(found, Llama(config), 2)
    print(f"measured {measured / 1e9:.3f} GB, computed {found / 1e9:.3f} ({found / measured:.3f})")
    assert found == pytest.approx(measured, rel=0.15)
    if config is WIDE:  # control: the other way to train needs another amount
        other = plan.peak_of_step(config, 8, not recompute)
        assert other != pytest.approx(measured, rel=0.15)


# -------------------------------------------------------------------------------------------------
# The plan

def test_largest_micro_batch_fits_and_the_next_does_not(monkeypatch):
    """Catches: a table that takes the memory of the GPU for usable, or names one size too many."""
    gigabytes = {1: 21, 2: 22, 4: 43, 8: 100, 16: 200}  # usable are 21.6, 43.2, 72 and 126.9
    monkeypatch.setattr(plan, "peak_of_step", lambda config, n, recompute: gigabytes[n] * 1e9)
    monkeypatch.setattr(plan, "peak_when_sharded", lambda peak, *others: peak)
    _, _, plain, *_ = plan.memory_table(Llama(SMALL))
    assert plain.split() == ["plain", "1", "4", "4", "8"]
    # The largest that is tried fits: more may.
    assert plan.row("plain", {256: 60e9}).split() == ["plain", "—", "—", "256+", "256+"]


def test_hours_follow_from_the_stated_assumptions():
    """Catches: an evaluation at the price of training, a save that is counted once, 8 GPUs that
    save 8 times as fast."""
    # 1 GFLOP per token: 494,500 tokens/s on one GPU, and three times as many without a backward.
    # Evaluations at 152 multiples of 250 up to 38,147; at 16 powers of two, of which none is one of
    # these; at 0, which is one; and at the end.
    assert plan.how_often()[0] == 153 + 16 + 1
    training, evaluation, saving = plan.hours(1e9, 1e9, gpus=1)
    assert training == pytest.approx(20e9 / 494_500 / 3600)
    assert evaluation == pytest.approx(170 * 10_485_760 / (3 * 494_500) / 3600)
    assert saving == pytest.approx(plan.how_often()[1] * 12 / 0.44 / 3600)  # 12 GB each time
    assert plan.hours(1e9, 1e9, gpus=8) == pytest.approx((training / 8, evaluation / 8, saving))
