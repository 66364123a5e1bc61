"""chunked_loss.py — the loss of model.py without ever holding all the logits.

The plain line

    F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")

holds every logit and then its gradient: 2 · 32 · 1024 · 50,304 fp32 numbers are 13 GB at the
paper's micro-batch, more than the whole network. But the gradient of the loss with respect to the
logits, softmax − one-hot, is known as soon as they are. So we compute the logits of a few rows at a
time, take the loss and both gradients from them, and free them.
"""
import torch
import torch.nn.functional as F

CHUNK = 2048  # rows; 2048 · 50,304 fp32 logits are 0.4 GB


def chunked_cross_entropy(hidden, weight, targets, ignore=-100):
    """Sum of −log softmax(hidden · weightᵀ)[target], in nats, over the targets other than `ignore`.

    hidden (N, dim), weight (V, dim), targets (N,). Without grad mode only the loss is computed."""
    return ChunkedCrossEntropy.apply(hidden, weight, targets, ignore, torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are computed in the forward, as if the loss were used once and unscaled.

    What the loss is multiplied by afterwards (1 / targets of the step, the loss scale of fp16)
    arrives in the backward and multiplies them there."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore, with_grad):
        # Inside this method grad mode is always off, so `with_grad` tells what it was outside.
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = None
        grad_weight = None
        if with_grad:
            grad_hidden = torch.empty_like(hidden)
        if with_grad and ctx.needs_input_grad[1]:  # beside LoRA's adapters the weight is frozen
            grad_weight = torch.zeros_like(weight)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            h = hidden[rows]                                         # (n, dim)
            counted = (targets[rows] != ignore)[:, None]             # (n, 1)
            target = targets[rows][:, None].masked_fill(~counted, 0)  # (n, 1)
            logits = F.linear(h, weight)                             # (n, V)
            logp = logits.log_softmax(-1, dtype=torch.float32)       # (n, V)
            loss -= (logp.gather(1, target) * counted).sum()
            if with_grad:
                grad = logp.exp_()                                   # softmax, in the same memory
                minus_one = torch.full_like(target, -1, dtype=grad.dtype)
                grad.scatter_add_(1, target, minus_one)              # softmax − one-hot
                grad = grad.to(logits.dtype)  # under autocast these products are in its dtype too
                grad_hidden[rows] = (grad @ weight) * counted        # (n, dim)
                if grad_weight is not None:
                    grad_weight += grad.T @ (h * counted)            # (V, dim)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = grad_weight * grad_loss
        return grad_hidden * grad_loss, grad_weight, None, None, None
