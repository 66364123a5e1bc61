"""model.py — the network: a LLaMA with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

Read it from top to bottom: sizes, the parts, a block, the whole, the loss, generation. Modules carry the names that
Hugging Face gives them, so a state_dict of ours is a state_dict of theirs.

    python model.py 1.7b         # a model as a table: parameters, FLOPs, memory, what GQA saves; here the paper's
"""
import argparse
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelConfig:
    """Sizes of a LLaMA. Raises ValueError, in one sentence, where they do not fit each other."""
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 2
    n_kv_heads: int = 1           # each key/value head serves n_heads / n_kv_heads query heads
    intermediate_size: int = 384  # width inside the feed-forward part
    vocab_size: int = 4096        # the tokenizer's
    padded_vocab_size: int | None = None  # rows of embedding and head; None: the next multiple of 128, which is faster
    max_seq_len: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    tie_embeddings: bool = False  # use the embedding matrix as the output layer too

    def __post_init__(self):
        self.padded_vocab_size = self.padded_vocab_size or -(-self.vocab_size // 128) * 128
        if min(self.dim, self.n_layers, self.n_heads, self.n_kv_heads, self.intermediate_size, self.vocab_size, self.max_seq_len) < 1:
            raise ValueError(f"every size must be at least 1: {self}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not divisible by n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"dim / n_heads = {self.head_dim} is odd, but rotary positions turn pairs of numbers")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(f"padded_vocab_size {self.padded_vocab_size} is below vocab_size {self.vocab_size}")

    @property
    def head_dim(self):
        return self.dim // self.n_heads


PRESETS = {
    #                    dim   layers heads kv  intermediate vocabulary      window              parameters
    "tiny": ModelConfig(128,   4,     2,    1,  384,         4096,           max_seq_len=256),  #     1,836,160
    "124m": ModelConfig(768,   12,    12,   12, 3072,        50257,          max_seq_len=1024),  #  190,532,352
    "978m": ModelConfig(1280,  36,    20,   4,  5120,        50257,          max_seq_len=1024),  #  978,218,240
    "1.7b": ModelConfig(2048,  36,    32,   8,  5120,        50257,          max_seq_len=1024),  # 1,716,144,128
}


# ---------------------------------------------------------------------------------------------------------------------
# The parts. Throughout: B sequences of T tokens; dim = n_heads · head_dim.

class RMSNorm(nn.Module):
    """x / rms(x) · weight, with rms(x) = √(mean(x²) + eps) over the last dimension (Zhang & Sennrich 2019,
    arXiv 1910.07467, eq. 4). In fp32 whatever the dtype of x: a mean of squares overflows fp16 and blurs in bf16."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.type_as(x)


def rope_table(head_dim, max_seq_len, theta):
    """Cosines and sines of m · θ_i for every position m, with θ_i = theta^(−2i/head_dim) (Su et al. 2021, RoFormer,
    arXiv 2104.09864, eq. 15). Two tensors (max_seq_len, head_dim), fp32, the angles repeated for both halves."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)       # (head_dim / 2,)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequencies).repeat(1, 2)  # (T, head_dim)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Turn each pair of numbers in x (B, heads, T, head_dim) by its position's angle (RoFormer, eq. 34), so that q · k
    depends on how far apart two tokens are and not on where they stand. cos, sin: (T, head_dim)."""
    # Which numbers form a pair is a convention. For head_dim 6 and angles a, b, c:
    #   rotate-half (Hugging Face, here):  [a b c a b c]   pairs (0,3) (1,4) (2,5)
    #   interleaved (the paper, Meta):     [a a b b c c]   pairs (0,1) (2,3) (4,5)
    # The two are the same network with the rows of q_proj and k_proj in another order; mixing them up is silent noise.
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).type_as(x)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share one key/value head (Ainslie et al. 2023, GQA,
    arXiv 2305.13245). Fewer key/value heads: less memory per token when generating, nearly the same quality."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.dim, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x, cos, sin, append=None):  # append: keeps k and v for later, gives them back with all earlier ones
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)     # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        mask = None
        if append:
            k, v = append(k, v)  # (B, n_kv_heads, past + T, head_dim)
            # Query i stands at position past + i. SDPA's is_causal would count it from 0 and hide the whole past.
            mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T)
        # softmax(q kᵀ / √head_dim) v, the mask before the softmax (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).
        # enable_gqa serves 4 query heads from 2 key heads as [K1 K1 K2 K2]. Not [K1 K2 K1 K2]: that trains as well, but
        # loads no one else's weights.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, dim)


class SwiGLU(nn.Module):
    """Feed-forward part with a gate: down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.dim, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: normalise, attend, add; normalise, feed forward, add. The sum x is the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin, append=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, append)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x  # (B, T, dim)


class KVCache:
    """Keys and values of the tokens seen so far, so that each new token costs one forward of one token. Holds
    n_kv_heads, not n_heads, which is what GQA is for. Room for a whole window is set aside once, at the first append."""

    def __init__(self, config):
        self.n_layers, self.max_seq_len = config.n_layers, config.max_seq_len
        self.length = 0  # tokens held; the model moves it on after its last layer
        self.keys = self.values = None

    def append(self, layer, k, v):
        """Store k, v (B, n_kv_heads, T, head_dim) behind the past; return all so far (B, n_kv_heads, past + T, head_dim)."""
        B, n_kv_heads, T, head_dim = k.shape
        if self.keys is None:
            shape = (self.n_layers, B, n_kv_heads, self.max_seq_len, head_dim)
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        end = self.length + T
        self.keys[layer, :, :, self.length:end], self.values[layer, :, :, self.length:end] = k, v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


# ---------------------------------------------------------------------------------------------------------------------
# The loss. In plain words it is one line:
#     F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
# which holds all the logits, and again their gradient: 2 · 32 · 1024 · 50,304 fp32 numbers are 13 GB at the paper's
# micro-batch, more than the whole network. The gradient of the loss with respect to the logits, softmax − one-hot, is
# known as soon as they are; so we make logits a chunk of rows at a time, take from them what is needed and forget them.

class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over targets ≠ −100 of −log softmax(hidden · weightᵀ)[target]; hidden (N, dim), weight (V, dim), targets (N,).

    The gradients are made in the forward, as if the loss were used once and unscaled. What it is then multiplied by
    (1 / targets of the step, an fp16 loss scale) arrives in the backward and multiplies them there."""
    CHUNK = 2048  # rows; 2048 · 50,304 fp32 logits are 0.4 GB

    @staticmethod
    def forward(ctx, hidden, weight, targets, with_grad):  # with_grad: in here grad mode is always off, so it is passed
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_weight = torch.zeros_like(weight) if with_grad and ctx.needs_input_grad[1] else None  # None: frozen, beside adapters
        for start in range(0, len(hidden), ChunkedCrossEntropy.CHUNK):
            rows = slice(start, start + ChunkedCrossEntropy.CHUNK)
            h, counted = hidden[rows], (targets[rows] != -100)[:, None]         # (n, dim), (n, 1)
            target = targets[rows][:, None].masked_fill(~counted, 0)            # (n, 1)
            logits = F.linear(h, weight).float()                                # (n, V)
            log_z = logits.logsumexp(-1, keepdim=True)                          # (n, 1)
            loss += ((log_z - logits.gather(1, target)) * counted).sum()
            if with_grad:
                grad = logits.sub_(log_z).exp_()                                # softmax, (n, V)
                grad.scatter_add_(1, target, -torch.ones_like(log_z)).mul_(counted)  # softmax − one-hot
                grad = grad.type_as(h)  # under autocast these products, too, are made in its dtype
                grad_hidden[rows] = grad @ weight                               # (n, dim)
                if grad_weight is not None:
                    grad_weight += grad.T @ h                                   # (V, dim)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, None if grad_weight is None else grad_weight * grad_loss, None, None


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: tokens (B, T) → hidden states (B, T, dim)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        cos, sin = rope_table(config.head_dim, config.max_seq_len, config.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)  # made from the config, so not part of the state
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, tokens, cache=None):
        past, T = cache.length if cache else 0, tokens.shape[1]
        if past + T > self.config.max_seq_len:
            raise ValueError(f"{past + T} tokens are more than max_seq_len {self.config.max_seq_len}")
        cos, sin = self.rope_cos[past:past + T], self.rope_sin[past:past + T]
        x = self.embed_tokens(tokens)  # (B, T, dim)
        for layer, block in enumerate(self.layers):
            x = block(x, cos, sin, partial(cache.append, layer) if cache else None)
        if cache:
            cache.length += T
        return self.norm(x)


class Llama(nn.Module):
    """The whole network. Weights start as N(0, 0.02), norms as 1; there are no biases."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.dim, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, tokens, targets=None, *, cache=None, reduction="mean"):
        """tokens (B, T) → (logits (B, T, padded_vocab_size), None), or with targets (B, T) → (None, loss in nats).

        The loss is the mean or the sum over the targets that are not −100; 0 if there are none. With a KVCache the
        tokens follow those that it holds. Raises ValueError beyond max_seq_len tokens."""
        hidden = self.model(tokens, cache)
        if targets is None:
            return self.lm_head(hidden), None
        loss = ChunkedCrossEntropy.apply(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), torch.is_grad_enabled())
        if reduction == "mean":
            loss = loss / (targets != -100).sum().clamp(min=1)
        return None, loss

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eot=None, generator=None):
        """Continue tokens (B, T ≥ 1): yields the next ids (B,), one position at a time, at most max_new_tokens times.

        temperature 0 takes the likeliest id. Else ids are drawn from softmax(logits / temperature), of only the top_k
        likeliest if given, of only the likeliest that together reach probability top_p if given (Holtzman et al. 2020,
        nucleus sampling, arXiv 1904.09751, §3.1). A row that has drawn `eot` repeats it, and when all have, it ends.
        When the window is full its older half is forgotten and the rest read again. generator: a CPU torch.Generator."""
        cache, unread = KVCache(self.config), tokens[:, -self.config.max_seq_len:]
        text, ended = unread, torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            if cache.length + unread.shape[1] > self.config.max_seq_len:
                text = unread = text[:, -max(1, self.config.max_seq_len // 2):]
                cache.length = 0
            logits = self(unread, cache=cache)[0][:, -1, :self.config.vocab_size]  # never one of the padded ids
            unread = sample_ids(logits.float(), temperature, top_k, top_p, generator)[:, None]  # (B, 1)
            if eot is not None:
                unread[ended] = eot
                ended |= unread[:, 0] == eot
            text = torch.cat((text, unread), dim=1)
            yield unread[:, 0]
            if ended.all():
                return


def sample_ids(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One id per row of logits (B, V), drawn as `Llama.generate` says; (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, ids = (logits / temperature).sort(-1, descending=True)
    probs = logits.softmax(-1)
    if top_k is not None:
        probs[:, top_k:] = 0
    if top_p is not None:
        others = probs[:, 1:]  # the likeliest always stays; of the others, those before which less than top_p stands
        others[probs.cumsum(-1)[:, :-1] >= top_p] = 0
    # Drawn on the CPU, in fp32, so that a seed gives the same text on every device that gives the same logits.
    drawn = torch.multinomial(probs.cpu(), 1, generator=generator).to(ids.device)  # (B, 1)
    return ids.gather(-1, drawn)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic about the network

def flops_per_token(config, seq_len):
    """Floating-point operations to train on one token: 6 per weight of a matrix product (2 forward, 4 backward; the
    output layer counts, the embedding is a look-up) + 12 · n_layers · dim · T for attention (PaLM, arXiv 2204.02311,
    appendix B; the causal half that a kernel may skip is counted)."""
    attention = config.dim * config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    matmul = config.n_layers * (attention + 3 * config.dim * config.intermediate_size) + config.dim * config.padded_vocab_size
    return 6 * matmul + 12 * config.n_layers * config.dim * seq_len


def parameter_counts(config):
    """{part: number of parameters}; from a network on the meta device, which has shapes but no memory."""
    with torch.device("meta"):
        llama = Llama(config)
    counts = dict.fromkeys(("embed_tokens", "self_attn", "mlp", "norm", "lm_head"), 0)  # "norm" is in all norms' names
    for name, parameter in llama.named_parameters():  # a tied head is listed once, as the embedding
        counts[next(part for part in counts if part in name)] += parameter.numel()
    return counts


def kv_bytes_per_token(config, bytes_per_number=2):
    """Bytes that the KV cache holds for each token of a sequence (2: bf16)."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * bytes_per_number


def activation_bytes(config, micro_batch, seq_len):
    """(plain, checkpointed): bytes that the blocks keep for the backward under bf16 autocast, uncompiled.

    Counted, not estimated: the forward runs on fake tensors, which have shapes and storages but no memory, and every
    storage that autograd saves is added up. Checkpointed: the input of each block, and one block whole while it is
    being computed again."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor  # held, so that no storage's address is used twice
        return tensor

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        llama = Llama(replace(config, max_seq_len=seq_len, n_layers=1))
        tokens = torch.zeros(micro_batch, seq_len, dtype=torch.long)
        weights = {p.untyped_storage()._cdata for p in llama.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x = llama.model.embed_tokens(tokens)
            before = set(saved)
            llama.model.layers[0](x, llama.model.rope_cos, llama.model.rope_sin)
        block = sum(t.untyped_storage().nbytes() for s, t in saved.items() if s not in before | weights)
    stream = micro_batch * seq_len * config.dim * 4  # the residual stream is fp32
    return config.n_layers * block, config.n_layers * stream + block


def main(argv=None):
    parser = argparse.ArgumentParser(description="A preset as a table: parameters, FLOPs, memory.")
    parser.add_argument("preset", nargs="?", default="tiny", choices=PRESETS)
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences per forward, for the memory (default 8)")
    args = parser.parse_args(argv)
    config, T = PRESETS[args.preset], PRESETS[args.preset].max_seq_len
    counts = parameter_counts(config)
    total = sum(counts.values())
    print(f"{args.preset}: dim {config.dim}, {config.n_layers} layers, {config.n_heads} heads of {config.head_dim}, {config.n_kv_heads} key/value "
          f"heads, intermediate {config.intermediate_size}, vocabulary {config.vocab_size:,} padded to {config.padded_vocab_size:,}, window {T}")
    for part, count in {**counts, "total": total}.items():
        print(f"  {part:<14}{count:>16,}  {count / total:6.1%}")
    print(f"training FLOPs per token at {T} tokens: {flops_per_token(config, T):,}")
    kv, mha = kv_bytes_per_token(config), kv_bytes_per_token(replace(config, n_kv_heads=config.n_heads))
    print(f"KV cache in bf16: {kv:,} bytes per token; grouped queries save {1 - kv / mha:.0%} of {mha:,}")
    plain, checkpointed = activation_bytes(config, args.micro_batch, T)
    print(f"training memory, computed, micro-batch {args.micro_batch} x {T}, bf16 autocast, uncompiled: {16 * total / 1e9:.3f} GB for weights, "
          f"gradients and AdamW's moments in fp32;\n  activations {plain / 1e9:.3f} GB, with activation checkpointing {checkpointed / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
