"""memory.py — activation checkpointing: less memory for a training step, by computing twice."""
from torch.utils.checkpoint import checkpoint as keep_only_inputs


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
