"""sharding.py — one model over several processes: each keeps a part of every weight (--fsdp).

Under DDP each process holds all weights, gradients and moments: 16 bytes a parameter. Sharded
(Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054; PyTorch FSDP, Zhao et al. 2023, arXiv 2304.11277)
each of N processes holds the N-th part of every matrix's rows, of their gradients and moments. A
block's weights are gathered from all processes right before it computes, and freed after it. So
what the processes exchange grows, and what they hold falls.

The optimizer works on the parts and need not know: every parameter is a DTensor, which has the
shape of the whole and the memory of a part.
"""
from contextlib import contextmanager

import torch
import torch.distributed as dist

from support.runs import UserError


def check(world, dtype):
    """Raise UserError where sharding is not possible. dtype: that of matrix products."""
    if world == 1:
        raise UserError("--fsdp shards the model over several processes, and this is the only one "
                        "— start it with torchrun, or use --no-fsdp")
    if dtype == torch.float16:
        raise UserError("--fsdp does not work in fp16, whose loss scaler sees only a part of the "
                        "gradients — use --dtype bf16 or fp32, or --no-fsdp")


def shard(llama):
    """Leave to this process its part of the weights, in place."""
    from torch.distributed.device_mesh import init_device_mesh  # half a second, for this flag only
    from torch.distributed.fsdp import fully_shard
    device = next(llama.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in llama.model.layers:
        fully_shard(block, mesh=mesh)  # what is gathered and freed together
    fully_shard(llama, mesh=mesh)      # the rest: embedding, last norm, output layer
    # The module whose forward runs first becomes the root of all. In an evaluation that would be a
    # block.
    with torch.no_grad():
        llama(torch.zeros(1, 1, dtype=torch.long, device=device))
    llama.reshard()  # which comes after the backward in training


def exchange_in_backward(network, now):
    """Whether the next backward exchanges the gradients, under DDP or FSDP. If not, they stay in
    each process, to be added to."""
    if hasattr(network, "set_requires_gradient_sync"):  # FSDP
        network.set_requires_gradient_sync(now)
    else:
        network.require_backward_grad_sync = now


@contextmanager
def gathered(model):
    """Within it each process has all weights of a sharded model, and needs no other to compute: a
    sample of 80 tokens would otherwise gather them 80 times. All processes must enter it. For a
    model that is not sharded it does nothing."""
    parts = [module for module in model.modules() if hasattr(module, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def is_sharded(tensor):
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """All of a sharded tensor, on every process, and all of them must call it; another tensor as
    it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def on_rank_0(tensor):
    """All of a sharded tensor, in the memory of rank 0's CPU; None on the others, which must call
    it too. Another tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    tensor = whole(tensor)
    return tensor.cpu() if dist.get_rank() == 0 else None


def part_of(tensor, parameter):
    """Our part of a whole tensor, if the parameter is sharded; else the tensor as it is. All
    processes have read the same file, so nothing is exchanged."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh,
                             parameter.placements, src_data_rank=None)
