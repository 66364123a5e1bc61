"""chunked_loss.py — the loss of model.py without ever holding all the logits.

The plain line

    F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")

holds every logit and then its gradient: 2 · 32 · 1024 · 50,304 fp32 numbers are 13 GB at the
paper's micro-batch, more than the whole network. But the gradient of the loss with respect to the
logits, softmax − one-hot, is known as soon as they are. So we compute the logits of a few rows at a
time, take the loss and both gradients from them, and free them.
"""
import functools

import torch
import torch.nn.functional as F

CHUNK = 1024  # rows; 1024 · 50,304 logits are 0.1 GB in bf16, and 0.2 GB as exponentials in fp32


def chunked_cross_entropy(hidden, weight, targets, ignore=-100, compiled=False):
    """Sum of −ln softmax(hidden · weightᵀ)[target], in nats, over the targets other than `ignore`.

    hidden (N, dim), weight (V, dim), targets (N,). compiled: use torch.compile for the part between
    the matrix products. Without grad mode only the loss is computed."""
    if torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(hidden, weight, targets, ignore, compiled)
    loss = torch.zeros((), device=hidden.device)
    for h, target in zip(hidden.split(CHUNK), targets.split(CHUNK)):
        logits = F.linear(h, weight).float()  # (n, V)
        loss += F.cross_entropy(logits, target, ignore_index=ignore, reduction="sum")
    return loss


def loss_and_gradient(logits, target):
    """The loss of each row of logits (n, V), −ln softmax(logits)[target], (n, 1) in fp32; and its
    gradient with respect to them, softmax − one-hot, (n, V) in their dtype. target (n, 1)."""
    x = logits.float()
    largest = x.amax(1, keepdim=True)  # subtracted, so that no exp overflows
    x_of_target = x.gather(1, target)
    e = x.sub_(largest).exp_()         # in place: this is the largest tensor of a training step
    total = e.sum(1, keepdim=True)
    logp = x_of_target - largest - total.log()
    grad = e.div_(total).to(logits.dtype)
    # p − 1 is computed in fp32. Where p is nearly 1, a p in bf16 would leave no digit of it.
    grad.scatter_(1, target, (logp.exp() - 1).to(grad.dtype))
    return -logp, grad


@functools.cache
def compiled_loss_and_gradient():
    """The same as one kernel."""
    return torch.compile(loss_and_gradient, dynamic=False)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are computed in the forward, as if the loss were used once and unscaled.

    What the loss is multiplied by afterwards (1 / targets of the step, the loss scale of fp16)
    arrives in the backward and multiplies them there."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore, compiled):
        part = compiled_loss_and_gradient() if compiled else loss_and_gradient
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            h = hidden[rows]                                          # (n, dim)
            counted = (targets[rows] != ignore)[:, None]              # (n, 1)
            target = targets[rows][:, None].masked_fill(~counted, 0)  # (n, 1)
            losses, grad = part(F.linear(h, weight), target)          # (n, 1), (n, V)
            loss += (losses * counted).sum()
            grad_hidden[rows] = (grad @ weight) * counted             # (n, dim)
            if ctx.needs_input_grad[1]:  # beside LoRA's adapters the weight is frozen
                product = grad.T @ (h * counted)                      # (V, dim)
                if grad_weight is None:
                    grad_weight = product.to(weight.dtype)
                else:
                    grad_weight += product
            del grad  # it is large: before the next logits
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden.mul_(grad_loss)  # in place: a second copy would be the largest of all gradients
        if grad_weight is not None:
            grad_weight.mul_(grad_loss)
        return grad_hidden, grad_weight, None, None, None
