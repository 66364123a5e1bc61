"""memory.py — the memory of a training step: found by counting, and made less by recomputing."""
import weakref
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as keep_only_inputs


# -------------------------------------------------------------------------------------------------
# Activation checkpointing

def checkpoint_activations(llama):
    """Let each block keep nothing but its input for the backward, which computes the rest again
    (Chen et al. 2016, arXiv 1604.06174): the same numbers, a third more arithmetic, and the memory
    of one block instead of all. (Such a "checkpoint" has nothing to do with those on the disk.)"""
    for block in llama.model.layers:
        block.forward = recomputed(block.forward)


def recomputed(forward):
    def call(*args):  # a function of ours: torch.compile would leave out a partial of theirs
        return keep_only_inputs(forward, *args, use_reentrant=False)
    return call


# -------------------------------------------------------------------------------------------------
# What a block keeps

def bytes_kept_by_a_block(llama, tokens):
    """Bytes that the first block of `llama` keeps for the backward of a micro-batch of so many
    tokens, in sequences as long as its window, under bf16 autocast. All blocks are alike.

    One part grows with the sequences, and another does not (autocast's bf16 copies of the
    weights). So forwards of one and of two sequences tell the size of any number."""
    one = bytes_kept(llama, 1)
    per_sequence = bytes_kept(llama, 2) - one
    return one + per_sequence * (tokens / llama.config.max_seq_len - 1)


def bytes_kept(llama, B):
    """Bytes kept for B sequences: their forward runs, and every storage that autograd saves counts
    once. Weights and tables are there anyway, so they do not count."""
    block = llama.model.layers[0]
    T = llama.config.max_seq_len
    x = torch.zeros(B, T, llama.config.dim, requires_grad=True)
    cos = llama.model.rope_cos[:T]
    sin = llama.model.rope_sin[:T]
    mask = llama.model.mask[:T, :T]
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(x, cos, sin, mask)
    for tensor in [*block.parameters(), cos, sin, mask]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


# -------------------------------------------------------------------------------------------------
# The peak of a step

def peak_of_step(Llama, config, micro_batch, recompute=False):
    """The most bytes that a training step holds at once: weights, gradients, two moments, and in
    the forward and backward of a micro-batch the activations, bf16 copies of the weights and the
    buffers of the loss. Under bf16 autocast, not compiled, with more than one micro-batch a step
    (so that gradients are there before the first activation). recompute: with activation
    checkpointing.

    All layers are alike, so 2 and 3 of them tell the peak of any number."""
    two, three = [counted_peak(Llama, replace(config, n_layers=layers), micro_batch, recompute)
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


def counted_peak(Llama, config, micro_batch, recompute):
    """The peak found by running the code of two micro-batches with tensors that have a size and no
    memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second
    with FakeTensorMode(), Peak() as counter:
        llama = Llama(config)
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
