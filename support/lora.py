"""lora.py — low-rank adaptation (Hu et al. 2021, LoRA, arXiv 2106.09685): train two thin matrices
beside each big one.

    W x  becomes  W x + (alpha / rank) · B (A x)     W (out, in) frozen, A (rank, in), B (out, rank)

(eq. 3). What is trained, and what AdamW keeps two moments of, is a few percent of the weights. B
starts as zeros, so nothing has changed before the first step. W + (alpha / rank) · B A is an
ordinary matrix again: merged, the network costs nothing more.

A LoRA run is one folder: the checkpoints hold the adapters, and base.pt the weights that they are
for; base.json has its size and SHA-256.
"""
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from support import durable, trees
from support.files import link_or_copy, write_json
from support.runs import UserError, parse_json


class LoRALinear(nn.Linear):
    """A linear layer with its weight frozen and a low-rank one beside it."""

    def __init__(self, linear, rank, alpha):
        # On the meta device no memory is used; the weight is replaced by the given one.
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        device = linear.weight.device
        A = torch.randn(rank, linear.in_features, device=device) / math.sqrt(linear.in_features)
        B = torch.zeros(linear.out_features, rank, device=device)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        # A buffer is saved with the adapters, so that they can be merged without the settings.
        self.register_buffer("lora_scale", torch.tensor(alpha / rank, device=device))

    def forward(self, x):
        low_rank = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight) + self.lora_scale * low_rank


def add_adapters(model, rank, alpha):
    """Freeze a Llama and adapt every linear layer of its blocks, in place."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, LoRALinear(child, rank, alpha))


def trained_weights(model):
    """{name: tensor} of all that the base does not have."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def is_lora(weights):
    """Whether weights {name: tensor} are adapters."""
    return any(str(name).endswith(".lora_A") for name in weights)


def merged(run, adapters):
    """The weights {"config", "model"} of a LoRA run: its base with its adapters added. Raises
    UserError."""
    base = durable.load_weights(base_file(run))
    merge(base["model"], adapters)
    return base


def merge(base, adapters):
    """Add scale · B A to the weights {name: tensor} of the base, in place. Raises UserError if
    they do not belong together."""
    with durable.one_line_error("the adapters"):
        for name, A in adapters.items():
            layer, _, part = name.rpartition(".")
            if part == "lora_A":
                low_rank = adapters[f"{layer}.lora_B"] @ A
                base[f"{layer}.weight"] += adapters[f"{layer}.lora_scale"] * low_rank


# -------------------------------------------------------------------------------------------------
# The base, kept in the run's folder

def keep_base(run, base, step, weights):
    """Put `weights`, those of `base` at `step`, into the folder of a LoRA run: as a link to its
    model.pt, or a copy. Where that file does not hold them (the base is itself a LoRA run, or it
    was trained over meanwhile) they are written."""
    file = run / "base.pt"
    folder = durable.folder_of(base, step)
    try:
        recorded = durable.read_meta(folder)["files"]["model.pt"]
        link_or_copy(folder / "model.pt", file)
        is_kept = not trees.differences(durable.load_weights(file)["model"], weights["model"])
    except (OSError, durable.Damaged):
        is_kept = False
    if not is_kept:
        file.unlink(missing_ok=True)  # never write through a link
        recorded = durable.write_file(file, weights)
    write_json(run / "base.json", {"base.pt": recorded})


def base_file(run):
    """The verified file with the weights that the adapters of `run` are for. Raises UserError."""
    run = Path(run)
    try:
        durable.verify(run, "base.pt", parse_json((run / "base.json").read_bytes()))
    except (durable.Damaged, OSError, ValueError) as why:
        raise UserError(f"{run}: base.pt, the weights that its adapters are for, cannot be used "
                        f"({why}) — restore it, or tune again in another --run") from None
    return run / "base.pt"
