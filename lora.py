"""lora.py — low-rank adaptation (Hu et al. 2021, LoRA, arXiv 2106.09685): train two thin matrices beside each big one.

    W x  becomes  W x + (alpha / rank) · B (A x)        (eq. 3)  W (out, in) frozen, A (rank, in), B (out, rank)

What is trained, and what AdamW keeps two moments of, is a few percent of the weights. B starts as zeros, so that nothing
has changed before the first step; merged, W + (alpha / rank) · B A, the network is an ordinary one again.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Linear):
    """A linear layer, its weight frozen, with a low-rank one beside it; the weight keeps its name and its memory."""

    def __init__(self, linear, rank, scale):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.scale = linear.weight, scale
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.randn(rank, linear.in_features, device=device) / math.sqrt(linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x):
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_adapters(model, rank, alpha):
    """Freeze a Llama and adapt every linear layer of its blocks, in place. A and B are all that asks for a gradient."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                setattr(part, name, LoRALinear(linear, rank, alpha / rank))


def merge(base, adapters, scale):
    """base {name: tensor} with W + scale · B A for each pair of adapters, in place."""
    for name, A in adapters.items():
        if name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            base[f"{layer}.weight"] += scale * adapters[f"{layer}.lora_B"] @ A
