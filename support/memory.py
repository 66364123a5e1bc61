"""memory.py — how much memory a block of the network keeps for its backward, found by counting."""
import torch


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
