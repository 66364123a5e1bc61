"""model.py — the network: a LLaMA with RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Read it from top to bottom: sizes, the parts, a block, the whole with its loss; then what makes it
fast when it generates; at the end a table about it. At the first reading take every `cache` as
None: training has none. "The paper" is arXiv 2412.13335. Modules carry the names that Hugging Face
gives them, so our state_dict is also theirs.

This file defines the network. support/fast.py has faster ways to compute some parts of it. Before a
run it compares each with this file, and uses only those that give the same result. So if you change
a line here, it takes effect everywhere.

    python model.py 1.7b      # the paper's network as a table: parameters, FLOPs, cache
"""
import argparse
import math
import sys
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelConfig:
    """Sizes of a LLaMA. Every field has a default: a checkpoint that was saved before the field
    existed gets it. Raises ValueError, in one sentence, if a value has another type than the
    default, or if sizes contradict each other."""
    dim: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2            # one key/value head serves n_heads / n_kv_heads query heads
    intermediate_size: int = 768   # width inside the feed-forward part
    vocab_size: int = 4096         # number of ids of the tokenizer
    # Rows of the embedding. None: vocab_size rounded up to a multiple of 128, which is faster.
    padded_vocab_size: int | None = None
    max_seq_len: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    tie_embeddings: bool = False   # use the embedding matrix as the output layer too

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            kind = type(field.default)
            if kind is float and type(value) is int:
                setattr(self, field.name, float(value))
            elif field.default is not None and type(value) is not kind:
                raise ValueError(f"{field.name} {value!r:.40} is not of type {kind.__name__}, as "
                                 f"its default {field.default!r} is")
        if self.padded_vocab_size is None:
            self.padded_vocab_size = math.ceil(self.vocab_size / 128) * 128
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "intermediate_size",
                     "vocab_size", "max_seq_len", "norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        if self.dim % self.n_heads != 0:
            raise ValueError(f"dim {self.dim} is not divisible by n_heads {self.n_heads}")
        if self.head_dim % 2 != 0:
            raise ValueError(f"dim / n_heads = {self.head_dim} is odd, but rotary positions rotate "
                             f"pairs of numbers")
        if self.n_heads % self.n_kv_heads != 0:
            raise ValueError(f"n_heads {self.n_heads} is not divisible by "
                             f"n_kv_heads {self.n_kv_heads}")
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(f"padded_vocab_size {self.padded_vocab_size} is below "
                             f"vocab_size {self.vocab_size}")

    @property
    def head_dim(self):
        return self.dim // self.n_heads


PRESETS = {
    #                   dim layers heads kv intermediate vocabulary window           parameters
    "tiny": ModelConfig(128,   4,   4,   2,   384,    4096, max_seq_len=256),     #     1,836,160
    # The paper's code calls it 124m, after GPT-2. It is larger: SwiGLU has three matrices where
    # GPT-2 has two (28M more), and the output layer is a matrix of its own (39M more).
    "124m": ModelConfig(768,  12,  12,  12,  3072,  50_257, max_seq_len=1024),    #   190,532,352
    "978m": ModelConfig(1280, 36,  20,   4,  5120,  50_257, max_seq_len=1024),    #   978,218,240
    "1.7b": ModelConfig(2048, 36,  32,   8,  5120,  50_257, max_seq_len=1024),    # 1,716,144,128
}


# -------------------------------------------------------------------------------------------------
# The parts. Shapes are written (B, T, dim): B sequences of T tokens, each a vector of dim numbers.
# S is the number of keys: T, and with a cache those of the past as well.

class RMSNorm(nn.Module):
    """x / rms(x) · weight, with rms(x) = √(mean(x²) + eps) over the last dimension (Zhang &
    Sennrich 2019, arXiv 1910.07467, eq. 4). In fp32 for any dtype of x: a mean of squares overflows
    fp16 and is too coarse in bf16."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.type_as(x)  # cast first, then multiply: as Hugging Face does


def rope_table(head_dim, max_seq_len, theta):
    """cos and sin of the angles m · f_i, for positions m = 0, 1, … and frequencies
    f_i = theta^(−2i / head_dim), i = 0, 1, … (Su et al. 2021, RoFormer, arXiv 2104.09864, eq. 15).
    Two fp32 tensors (max_seq_len, head_dim): a row has the head_dim / 2 angles, and then the same
    again."""
    two_i = torch.arange(0, head_dim, 2, dtype=torch.float32)
    frequencies = theta ** (-two_i / head_dim)
    positions = torch.arange(max_seq_len, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)  # (max_seq_len, head_dim / 2)
    angles = angles.repeat(1, 2)                  # (max_seq_len, head_dim)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate each pair of numbers in x (B, heads, T, head_dim) by the angle of its position
    (RoFormer, eq. 34). With q turned by the angle of m, and k by that of n, they are turned against
    each other by the angle of n − m: so their score depends on the distance, not on where the two
    stand. cos, sin: (T, head_dim)."""
    # Which two numbers form a pair is a convention. For head_dim 6 and angles a, b, c:
    #   rotate-half (Hugging Face, here):  [a b c a b c]   pairs (0,3) (1,4) (2,5)
    #   interleaved (the paper, Meta):     [a a b b c c]   pairs (0,1) (2,3) (4,5)
    # Both are the same network with the rows of q_proj and k_proj in another order. Weights made
    # for the other convention load without an error message, and the output is noise.
    first, second = x.chunk(2, dim=-1)
    # A rotation of each pair: first · cos − second · sin, and second · cos + first · sin.
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).type_as(x)


def causal_mask(size, device=None):
    """What is added to the scores: (size, size). A query, one row, sees the keys up to its own
    position: they get 0. Those after it get −∞, and so the weight exp(−∞) = 0. For size 3:

        [0 −∞ −∞]
        [0  0 −∞]
        [0  0  0]"""
    return torch.full((size, size), -math.inf, device=device).triu(1)


def attention(q, k, v, mask):
    """softmax(q kᵀ / √head_dim + mask) v (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).
    q (B, n_heads, T, head_dim); k and v (B, n_kv_heads, S, head_dim); mask (T, S). Returns the
    shape of q."""
    # Each key/value head serves a group of neighbouring query heads: 4 query heads use 2 key heads
    # as [K1 K1 K2 K2]. In the order [K1 K2 K1 K2] training would work just as well, but published
    # weights have the first one.
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)         # (B, n_heads, S, head_dim)
    v = v.repeat_interleave(group, dim=1)         # (B, n_heads, S, head_dim)
    scores = q @ k.transpose(-2, -1)              # (B, n_heads, T, S)
    scores = scores / math.sqrt(q.shape[-1])
    scores = scores.float() + mask                # softmax is computed in fp32
    weights = scores.softmax(-1).type_as(v)       # (B, n_heads, T, S); rows sum to 1
    return weights @ v                            # (B, n_heads, T, head_dim)


class Attention(nn.Module):
    """Self-attention in which groups of query heads share a key/value head (Ainslie et al. 2023,
    GQA, arXiv 2305.13245): less memory for each token when generating, at nearly the same
    quality."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer  # its index: the cache stores keys and values per layer
        self.attend = attention  # support/fast.py may replace it by a faster function
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def split_heads(self, x):
        """(B, T, heads · head_dim) → (B, heads, T, head_dim)"""
        B, T, _ = x.shape
        return x.view(B, T, -1, self.head_dim).transpose(1, 2)  # -1: the number of heads

    def forward(self, x, cos, sin, mask, cache=None):
        q = self.split_heads(self.q_proj(x))  # (B, n_heads, T, head_dim)
        k = self.split_heads(self.k_proj(x))  # (B, n_kv_heads, T, head_dim)
        v = self.split_heads(self.v_proj(x))  # (B, n_kv_heads, T, head_dim)
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, n_kv_heads, S, head_dim)
        y = self.attend(q, k, v, mask)    # (B, n_heads, T, head_dim)
        y = y.transpose(1, 2).flatten(2)  # (B, T, n_heads · head_dim)
        return self.o_proj(y)             # (B, T, dim)


class SwiGLU(nn.Module):
    """Feed-forward part with a gate: down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv 2002.05202,
    eq. 6), with silu(z) = z · sigmoid(z). For each inner number the gate decides how much of up(x)
    passes."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.dim, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: normalize, attend, add; normalize, feed forward, add. (The names are Hugging
    Face's: both layernorms are RMSNorms, and the second stands before the feed-forward part.)"""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin, mask, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x  # (B, T, dim)


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: tokens (B, T) → hidden states (B, T, dim). It has a
    class of its own only to get Hugging Face's names: `model.…` for this, and `lm_head`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        cos, sin = rope_table(config.head_dim, config.max_seq_len, config.rope_theta)
        # They follow from the config, so they are not part of the state_dict.
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, tokens, cache=None):
        past = 0 if cache is None else cache.length
        end = past + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens are more than max_seq_len {self.config.max_seq_len}")
        cos = self.rope_cos[past:end]  # (T, head_dim)
        sin = self.rope_sin[past:end]
        mask = causal_mask(end, tokens.device)[past:]  # (T, S): the rows of the new tokens
        x = self.embed_tokens(tokens)  # (B, T, dim)
        for block in self.layers:
            x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length = end  # only now: all layers wrote to the same positions
        return self.norm(x)


IGNORE = -100  # a target that does not count: padding and questions in sft.py


class Llama(nn.Module):
    """The whole network. There are no biases. Weights start as normal random numbers with standard
    deviation 0.02, and norms as 1, as in the paper's code."""

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

    def logits(self, hidden):
        """The output layer: hidden (…, dim) → logits (…, padded_vocab_size), cast to fp32."""
        return self.lm_head(hidden).float()

    def loss(self, hidden, targets):
        """What training makes small: the sum of −ln p(target), in nats, over the targets that count
        (not IGNORE). hidden (N, dim), targets (N,)."""
        return F.cross_entropy(self.logits(hidden), targets, ignore_index=IGNORE, reduction="sum")

    def forward(self, tokens, targets=None, *, cache=None, reduction="mean"):
        """tokens (B, T) → (logits, None), with logits (B, T, padded_vocab_size).

        With targets (B, T) → (None, loss): the logits, of a large batch several GB, are not
        returned, so that support/fast.py need not hold them all at once. reduction: the "sum" over
        the targets that count, or their "mean"; if none counts, the loss is 0. With a KVCache the
        tokens follow those in it. Raises ValueError beyond max_seq_len tokens."""
        hidden = self.model(tokens, cache)  # (B, T, dim)
        if targets is None:
            return self.logits(hidden), None
        targets = targets.flatten()                         # (B · T,)
        loss = self.loss(hidden.flatten(0, 1), targets)
        if reduction == "mean":
            loss = loss / (targets != IGNORE).sum().clamp(min=1)  # min: no division by 0
        return None, loss

    @torch.no_grad()  # inside; the caller's code between two ids keeps its own mode
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eot=None,
                 generator=None):
        """Continue tokens (B, T ≥ 1). A Python generator: it yields the next ids (B,), one position
        at a time. How they are chosen: `sample_ids`, below.

        A row that has drawn `eot` repeats it; when all rows have, generation ends. When the window
        is full, the older half of the tokens is forgotten and the rest is read again. generator: a
        torch.Generator on the CPU, for the random numbers."""
        window = self.config.max_seq_len
        cache = KVCache(self.config)  # below
        tokens = tokens[:, -window:]
        unread = tokens  # what the cache does not hold yet
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            if tokens.shape[1] > window:  # one too many: keep the newer half, and read it again
                tokens = tokens[:, -max(1, window // 2):]
                unread = tokens
                cache.length = 0
            logits, _ = self(unread, cache=cache)
            logits = logits[:, -1, :self.config.vocab_size]  # the padded ids are never drawn
            next_ids = sample_ids(logits, temperature, top_k, top_p, generator)  # (B,)
            if eot is not None:
                next_ids[ended] = eot
                ended |= next_ids == eot
            unread = next_ids[:, None]  # (B, 1)
            tokens = torch.cat((tokens, unread), dim=1)
            yield next_ids
            if ended.all():
                return


# -------------------------------------------------------------------------------------------------
# What `generate` uses: a memory of the past, and the choice of the next id.

class KVCache:
    """Keys and values of the tokens read so far, so that a new token costs a forward of one token.
    It holds n_kv_heads, not n_heads: this is what GQA saves. Room for a whole window is allocated
    at the first append."""

    def __init__(self, config):
        self.config = config
        self.length = 0  # tokens held; Decoder increases it after the last layer
        self.keys = None
        self.values = None

    def append(self, layer, k, v):
        """Store k and v, both (B, n_kv_heads, T, head_dim), behind those of the past; return all
        so far, both (B, n_kv_heads, past + T, head_dim)."""
        B, n_kv_heads, T, head_dim = k.shape
        if self.keys is None:
            shape = (self.config.n_layers, B, n_kv_heads, self.config.max_seq_len, head_dim)
            self.keys = k.new_empty(shape)
            self.values = v.new_empty(shape)
        end = self.length + T
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def sample_ids(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one id for each row of logits (B, V); returns (B,).

    temperature 0 (or nearly) takes the likeliest id. Otherwise ids are drawn from
    softmax(logits / temperature): with top_k, among the k likeliest; with top_p, among the fewest
    of the likeliest whose probabilities sum to at least top_p (nucleus sampling, Holtzman et al.
    2020, arXiv 1904.09751, §3.1). With both, an id must be among both. Raises FloatingPointError if
    a logit is NaN or infinite."""
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the model's output is NaN or infinite")
    if temperature < 1e-6:  # logits divided by so little would be infinite
        return logits.argmax(-1)
    sorted_logits, ids = (logits / temperature).sort(-1, descending=True)
    # On the CPU from here on: a seed then gives the same text on every device with the same logits.
    probs = sorted_logits.softmax(-1).cpu()
    if top_k is not None:
        probs[:, top_k:] = 0
    if top_p is not None:
        # The total probability of all likelier ids. For the first it is 0, so the first stays.
        before = probs.cumsum(-1) - probs
        probs[before >= top_p] = 0
    # multinomial does not need probabilities that sum to 1.
    drawn = torch.multinomial(probs, 1, generator=generator).to(ids.device)  # (B, 1)
    return ids.gather(-1, drawn)[:, 0]


# -------------------------------------------------------------------------------------------------
# Arithmetic about the network

def flops_per_token(config, seq_len):
    """Floating-point operations to train on one token (PaLM, arXiv 2204.02311, appendix B).

    Each weight of a matrix product costs 2 in the forward (multiply, add) and 4 in the backward: 6.
    The embedding is a table lookup and costs none. Attention has two products more (q kᵀ, and
    weights times v), each of dim · seq_len multiplications a token, and each of these costs 6 too:
    12 · dim · seq_len a layer. Keys that the causal mask hides are counted."""
    q_and_o = 2 * config.dim * config.n_heads * config.head_dim
    k_and_v = 2 * config.dim * config.n_kv_heads * config.head_dim
    mlp = 3 * config.dim * config.intermediate_size
    head = config.dim * config.padded_vocab_size
    weights = config.n_layers * (q_and_o + k_and_v + mlp) + head
    return 6 * weights + 12 * config.n_layers * config.dim * seq_len


def parameter_counts(llama):
    """{part: number of parameters}; all norms together count as one part."""
    counts = {}
    for name, parameter in llama.named_parameters():  # a tied head appears once, as the embedding
        # model.layers.0.mlp.up_proj.weight → mlp, model.embed_tokens.weight → embed_tokens
        names = name.removesuffix(".weight").split(".")
        part = names[3] if "layers" in names else names[-1]
        if "norm" in part:
            part = "norms"
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def kv_bytes_per_token(config, bytes_per_number=2):
    """Bytes that the KV cache holds for each token of a sequence (2 bytes a number: bf16)."""
    keys_and_values = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return keys_and_values * bytes_per_number


def main(argv=None):
    parser = argparse.ArgumentParser(description="A preset as a table: parameters, FLOPs, cache.",
                                     usage=argparse.SUPPRESS)  # so that an error is one line
    parser.add_argument("preset", nargs="?", default="tiny", choices=PRESETS)
    preset = parser.parse_args(argv).preset
    config = PRESETS[preset]
    T = config.max_seq_len
    with torch.device("meta"):  # shapes without memory
        counts = parameter_counts(Llama(config))
    total = sum(counts.values())
    print(f"{preset}: dim {config.dim}, {config.n_layers} layers, {config.n_heads} heads of "
          f"{config.head_dim}, {config.n_kv_heads} key/value heads, intermediate "
          f"{config.intermediate_size}, vocabulary {config.vocab_size:,} padded to "
          f"{config.padded_vocab_size:,}, window {T}")
    for part, number in {**counts, "total": total}.items():
        print(f"  {part:<14}{number:>16,}  {number / total:6.1%}")
    print(f"training FLOPs per token at {T} tokens: {flops_per_token(config, T):,}")
    kv = kv_bytes_per_token(config)
    ungrouped = kv_bytes_per_token(replace(config, n_kv_heads=config.n_heads))
    print(f"KV cache in bf16: {kv:,} bytes per token; grouped queries save "
          f"{1 - kv / ungrouped:.0%} of {ungrouped:,}")


if __name__ == "__main__":
    sys.exit(main())
