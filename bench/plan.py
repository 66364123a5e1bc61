"""plan.py — what a training will need, computed before it runs: `python -m bench plan 1.7b`.

Memory is counted by running the code with tensors that have no memory; a test compares it with the
peak of a real process. Time is arithmetic about an assumed utilization.
"""
import weakref
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import Llama, flops_per_token
from support import fast
from support.memory import checkpoint_activations
from support.runs import due
from train import read_settings

GPUS = (24, 48, 80, 141)  # GB: RTX 4090, A6000, A100 or H100, H200
USABLE = 0.9              # the rest is for CUDA itself, its workspaces, and gaps between tensors
MICRO_BATCHES = [2**i for i in range(9)]  # 1, 2, 4 … 256: those that are tried
SHARDS = 8                # processes that share a model under --fsdp

RUN = read_settings(["--preset", "1.7b"])    # the paper's run: batches, evaluations, saves
TOKENS = RUN.max_steps * RUN.batch_tokens
PEAK = 989e12             # FLOPs per second of an H100 or H200, dense bf16, data sheet
UTILIZATION = 0.5         # of it, in training and evaluation
DISK = 0.44e9             # bytes per second that are hashed and written, as docs/running.md tells


def plan(config):
    """Lines of the plan for a network: which micro-batch fits, and the hours for 20B tokens."""
    with torch.device("meta"):  # shapes without memory
        llama = Llama(config)
    yield from memory_table(llama)
    parameters = sum(p.numel() for p in llama.parameters())
    yield from time_table(parameters, flops_per_token(config, config.max_seq_len))


def memory_table(llama):
    """Lines: for each way to train, the largest micro-batch that fits each GPU."""
    config = llama.config
    yield (f"largest micro-batch (a power of two) of {config.max_seq_len} tokens that fits, "
           f"computed: bf16 autocast, not\ncompiled, several micro-batches a step, {USABLE:.0%} of "
           f"the GPU usable")
    yield f"{'':<42}" + "".join(f"{size:>7} GB" for size in GPUS)
    for name, recompute in (("plain", False), ("--activation_checkpointing", True)):
        peaks = {}
        sharded = {}
        for n in MICRO_BATCHES:
            peaks[n] = peak_of_step(config, n, recompute)
            sharded[n] = peak_when_sharded(peaks[n], llama, SHARDS)
            if min(peaks[n], sharded[n]) > USABLE * max(GPUS) * 1e9:
                break
        yield row(name, peaks)
        together = f"{name}, " if recompute else ""
        yield row(f"{together}--fsdp on {SHARDS}", sharded)


def row(name, peaks):
    """A line of the table, from {micro-batch: peak in bytes}."""
    line = f"  {name:<40}"
    for size in GPUS:
        fitting = [n for n, peak in peaks.items() if peak <= USABLE * size * 1e9]
        largest = max(fitting, default="—")
        more = "+" if largest == MICRO_BATCHES[-1] else ""
        line += f"{largest}{more}".rjust(10)
    return line


def time_table(parameters, flops):
    """Lines: hours for TOKENS tokens on 1 and 8 GPUs."""
    evaluations, saves = how_often()
    yield (f"hours for {TOKENS / 1e9:.0f}B tokens, computed: {UTILIZATION:.0%} of "
           f"{PEAK / 1e12:.0f} TFLOP/s; {evaluations} evaluations of {RUN.eval_tokens:,} tokens;\n"
           f"{saves} saves of {12 * parameters / 1e9:.1f} GB at {DISK / 1e9:.1f} GB/s")
    yield f"{'':<10}{'training':>10}{'evaluation':>12}{'saving':>10}{'together':>10}"
    for gpus in (1, 8):
        training, evaluation, saving = hours(parameters, flops, gpus)
        together = training + evaluation + saving
        yield (f"  on {gpus:<5}{training:>10.1f}{evaluation:>12.1f}{saving:>10.1f}"
               f"{together:>10.1f}")


def how_often():
    """(evaluations, saves) of the whole run."""
    steps = range(RUN.max_steps + 1)
    evaluations = sum(due(step, RUN.eval_every, RUN.max_steps) for step in steps)
    saves = sum(due(step, RUN.save_every, RUN.max_steps) for step in steps)
    return evaluations, saves


def hours(parameters, flops, gpus):
    """(training, evaluation, saving) in hours, from FLOPs per token. One process saves, while the
    others wait."""
    evaluations, saves = how_often()
    per_second = gpus * UTILIZATION * PEAK / flops               # tokens, in training
    training = TOKENS / per_second
    evaluation = evaluations * RUN.eval_tokens / (3 * per_second)    # the forward is a third
    saving = saves * 12 * parameters / DISK                      # weights and two moments
    return training / 3600, evaluation / 3600, saving / 3600


# -------------------------------------------------------------------------------------------------
# The peak of a step

def peak_of_step(config, micro_batch, recompute=False):
    """The most bytes that a training step holds at once: weights, gradients, two moments, and in
    the forward and backward of a micro-batch the activations, bf16 copies of the weights and the
    buffers of the loss. Under bf16 autocast, not compiled, with more than one micro-batch a step
    (so that gradients are there before the first activation). recompute: with activation
    checkpointing.

    All layers are alike, so 2 and 3 of them tell the peak of any number."""
    two, three = [counted_peak(replace(config, n_layers=layers), micro_batch, recompute)
                  for layers in (2, 3)]
    return two + (three - two) * (config.n_layers - 2)


def peak_when_sharded(peak, llama, processes):
    """The same in each of so many processes with --fsdp, from the peak in one. Weights and moments
    are divided. Gradients are divided in the last micro-batch of a step only, when they are
    exchanged. Embedding, norm and output layer stay gathered; of the blocks, two at a time."""
    total = sum(p.numel() for p in llama.parameters())
    block = sum(p.numel() for p in llama.model.layers[0].parameters())
    gathered = total - (len(llama.model.layers) - 2) * block
    return peak - 16 * total + 12 * total / processes + 4 * total + 4 * gathered


def counted_peak(config, micro_batch, recompute):
    """The peak found by running the code of two micro-batches with tensors that have a size and no
    memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second
    with FakeTensorMode(), Peak() as counter:
        llama = fast.use(Llama(config), ("attention", "loss"))
        if recompute:
            checkpoint_activations(llama)
        moments = [torch.zeros_like(p) for p in (*llama.parameters(), *llama.parameters())]
        tokens = torch.zeros(micro_batch, config.max_seq_len, dtype=torch.long)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                _, loss = llama(tokens, tokens, reduction="sum")
            (loss / 2).backward()
        del moments
    return counter.peak


class Peak(TorchDispatchMode):
    """Within it, counts the bytes of all new tensors that are alive, each storage once."""

    def __init__(self):
        super().__init__()
        self.sizes = {}  # of storages alive
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key = storage._cdata  # its address
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key)

    def remove(self, key):
        self.now -= self.sizes.pop(key)
