"""sharding.py — one model over several processes: each keeps a part of every weight (--fsdp).

Under DDP each process holds all weights, gradients and moments: 16 bytes a parameter. Sharded
(Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054; PyTorch FSDP, Zhao et al. 2023, arXiv 2304.11277)
each of N processes holds the N-th part of every matrix's rows, of their gradients and moments. A
block's weights are gathered from all processes right before it computes, and freed after it. So
what the processes exchange grows, and what they hold falls.

The optimizer works on the parts and need not know: every parameter is a DTensor, which has the
shape of the whole and the memory of a part.
"""
import inspect
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.runs import UserError
from support.trees import items_of


def shard(llama, machine):
    """Leave to this process its part of the weights, in place. Raises UserError where that is not
    possible."""
    if machine.world == 1:
        raise UserError("--fsdp shards the model over several processes, and this is the only one "
                        "— start it with torchrun, or use --no-fsdp")
    if machine.dtype == torch.float16:
        raise UserError("--fsdp does not work in fp16, whose loss scaler sees only a part of the "
                        "gradients — use --dtype bf16 or fp32, or --no-fsdp")
    from torch.distributed.device_mesh import init_device_mesh  # half a second, for this flag only
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(machine.device.type, (machine.world,))
    for block in llama.model.layers:
        fully_shard(block, mesh=mesh)  # what is gathered and freed together
    fully_shard(llama, mesh=mesh)      # the rest: embedding, last norm, output layer
    # The module whose forward runs first becomes the root of all. In an evaluation that would be a
    # block.
    with torch.no_grad():
        llama(torch.zeros(1, 1, dtype=torch.long, device=machine.device))
    llama.reshard()  # which comes after the backward in training


def replicate(model, machine, compiled):
    """What the loop calls in the place of the model: with several processes DDP around it, which
    takes the mean of their gradients; the model itself if it is the only process, or sharded.
    compiled: whether its blocks are."""
    if machine.world == 1 or is_sharded(next(model.parameters())):
        return model
    if compiled:
        torch._dynamo.config.optimize_ddp = False  # else it cuts the blocks at DDP's buckets
    known = inspect.signature(DistributedDataParallel).parameters
    # Before PyTorch 2.13 it had another name. Our buffers are constants, the same in each process.
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        model, device_ids=[machine.device] if machine.device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # else all gradients are in memory twice
        **{buffers: False})


def exchange_in_backward(network, now):
    """Whether the next backward exchanges the gradients, under DDP or FSDP. If not, they stay in
    each process, to be added to."""
    if isinstance(network, DistributedDataParallel):
        network.require_backward_grad_sync = now
    elif hasattr(network, "set_requires_gradient_sync"):  # FSDP
        network.set_requires_gradient_sync(now)


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


def gather(tree):
    """Nested dicts and lists with all of each sharded tensor, one by one in the memory of rank 0's
    CPU. The other processes must call it too, and get None. Other values are as they are."""
    if isinstance(tree, dict):
        return {name: gather(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [gather(value) for value in tree]
    if not is_sharded(tree):
        return tree
    tensor = whole(tree)
    return tensor.cpu() if dist.get_rank() == 0 else None


def scatter(tree, here):
    """The opposite of `gather`: copy the tensors of nested dicts into those that are `here`, each
    process its part. All have read the same file, so nothing is exchanged."""
    for name, value in items_of(tree):
        if isinstance(value, dict | list):
            scatter(value, here[name])
        elif isinstance(value, torch.Tensor):
            here[name].copy_(part_of(value, here[name]))
        else:
            here[name] = value


def part_of(tensor, like):
    """Our part of a whole tensor, if `like` is sharded; else the tensor as it is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements,
                             src_data_rank=None)
