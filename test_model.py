"""test_model.py — the network against references that share no code with it: formulas written out,
transformers' LLaMA, and counters of operations, bytes and FLOPs.

A test is named after what it guarantees; its docstring says which mistake it catches. A test that
two results are equal also makes the mistake (`# control`) and checks that the difference shows: a
comparison that cannot fail proves nothing.

    python test_model.py               # about 10 seconds
    python test_model.py -v -k rope    # any option of pytest; this lists and runs the tests of RoPE
"""
import math
import sys
from dataclasses import replace

try:
    import pytest
except ImportError:
    sys.exit("test_model.py: pytest is missing — pip install -r requirements-dev.txt")
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
from model import PRESETS, KVCache, Llama, ModelConfig, RMSNorm, SwiGLU, sample_ids
from support import fast

SMALL = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, intermediate_size=96,
                    vocab_size=100, max_seq_len=32)  # head_dim 16, vocabulary padded to 128
VARIANTS = {"gqa": {}, "mha": {"n_kv_heads": 4}, "tied": {"tie_embeddings": True}}


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(**changes):
    """A small network. Its weights are large enough that attention is not flat, its norms differ
    from 1."""
    torch.manual_seed(0)
    llama = Llama(replace(SMALL, padded_vocab_size=None, **changes))
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return llama


def batch(B=2, T=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL.vocab_size, (B, T), generator=generator)


def gap(a, b):
    """The largest difference of two numbers at the same place."""
    return (a.double() - b.double()).abs().max().item()


def gradients(llama, loss):
    llama.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in llama.named_parameters()}


def relative_gap(ours, theirs):
    """The largest |a − b| / |b| (2-norms) over the parameters."""
    assert ours.keys() == theirs.keys()
    gaps = [(ours[name] - theirs[name]).norm() / theirs[name].norm() for name in theirs]
    return max(gaps).item()


# -------------------------------------------------------------------------------------------------
# Sizes

@pytest.mark.parametrize("preset, size", [
    ("tiny", 5_245_184),
    ("124m", 190_532_352),
    ("978m", 978_218_240),
    ("1.7b", 1_716_144_128),
])
def test_presets_have_the_stated_sizes(preset, size, capsys):
    """Catches: a preset of another size, a bias, a tied head, a wrong total in the table."""
    config = PRESETS[preset]
    assert config.norm_eps == 1e-5
    assert config.rope_theta == 500_000.0
    with torch.device("meta"):
        llama = Llama(config)
        tied = Llama(replace(config, tie_embeddings=True))
    assert sum(parameter.numel() for parameter in llama.parameters()) == size
    model.main([preset])
    assert f"{size:,} " in capsys.readouterr().out
    head = config.padded_vocab_size * config.dim
    assert sum(parameter.numel() for parameter in tied.parameters()) == size - head  # control


@pytest.mark.parametrize("sizes, message", [
    ({"dim": 65}, "dim 65 is not divisible by n_heads 4"),
    ({"dim": 12}, "dim / n_heads = 3 is odd"),
    ({"n_kv_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3"),
    ({"n_kv_heads": 0}, "n_kv_heads 0 must be at least 1"),
    ({"n_layers": 0}, "n_layers 0 must be at least 1"),
    ({"padded_vocab_size": 64}, "padded_vocab_size 64 is below vocab_size 100"),
    ({"tie_embeddings": 1}, "tie_embeddings 1 is not of type bool, as its default False is"),
    ({"rope_theta": "1"}, "rope_theta '1' is not of type float"),
    ({"dim": True}, "dim True is not of type int"),
])
def test_impossible_sizes_are_refused(sizes, message):
    """Catches: sizes that fail only in the first forward, with a message about shapes."""
    replace(SMALL)  # control
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **sizes)


@pytest.mark.parametrize("vocab_size, padded", [(1, 128), (128, 128), (129, 256), (50_257, 50_304)])
def test_vocabulary_is_padded_to_128(vocab_size, padded):
    """Catches: rounding down, or a multiple of 128 that is padded again."""
    assert ModelConfig(vocab_size=vocab_size).padded_vocab_size == padded


def test_initial_weights_are_normal_with_std_002():
    """Catches: torch's own initialization, a layer left out, a first loss far from ln(vocab)."""
    llama = Llama(PRESETS["tiny"])
    for name, parameter in llama.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.mean().item() == pytest.approx(0, abs=5e-4), name
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02), name
    tokens = batch(T=64)
    _, loss = llama(tokens, batch(T=64, seed=2))
    assert loss.item() == pytest.approx(math.log(4096), abs=0.1)  # every next token equally likely
    assert nn.Linear(256, 256).weight.std().item() != pytest.approx(0.02, rel=0.02)  # control


# -------------------------------------------------------------------------------------------------
# Each part against a formula

def rotate_by_hand(x, theta=SMALL.rope_theta, interleaved=False):
    """Rotary positions by complex numbers in float64: pair i at position m is multiplied by
    exp(√−1 · m · theta^(−2i / head_dim))."""
    x = x.double()
    T, head_dim = x.shape[-2:]
    exponents = torch.arange(0, head_dim, 2).double() / head_dim
    angles = torch.outer(torch.arange(T).double(), theta ** -exponents)  # (T, head_dim / 2)
    turn = torch.polar(torch.ones_like(angles), angles)
    if interleaved:  # the mistake
        turned = torch.complex(x[..., 0::2], x[..., 1::2]) * turn
        return torch.view_as_real(turned).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("mistake", [{"interleaved": True}, {"theta": 10_000.0}], ids=str)
def test_rope_rotates_pairs_of_halves(mistake):
    """Catches: interleaved pairs, another theta, another sign, angles rounded on the way."""
    x = torch.randn(1, 2, 1024, 16)
    cos, sin = model.rope_table(16, 1024, SMALL.rope_theta)
    rotated = model.apply_rope(x, cos, sin)
    assert gap(rotated, rotate_by_hand(x)) < 1e-3
    assert gap(rotated, rotate_by_hand(x, **mistake)) > 5e-3  # control


def test_rope_rounds_once_in_bf16():
    """Catches: cos and sin in bf16, or a result of another dtype than x."""
    x = torch.randn(1, 2, 1024, 16).bfloat16()
    cos, sin = model.rope_table(16, 1024, SMALL.rope_theta)
    rotated = model.apply_rope(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    exact = rotate_by_hand(x)
    one_rounding = (exact.bfloat16() - exact).norm()
    assert (rotated - exact).norm() < 1.01 * one_rounding
    control = model.apply_rope(x, cos.bfloat16(), sin.bfloat16())
    assert (control - exact).norm() > 1.2 * one_rounding


def test_rope_is_relative():
    """Catches: angles that do not fit the pairs, so that q · k depends on the place in the text."""
    q = torch.randn(16)
    k = torch.randn(16)

    def products(cos, sin):
        """q · k for a query at positions 5, 6, … and a key 5 tokens before it."""
        q_rotated = model.apply_rope(q.expand(64, 16), cos, sin)
        k_rotated = model.apply_rope(k.expand(64, 16), cos, sin)
        return (q_rotated[5:] * k_rotated[:-5]).sum(-1)

    cos, sin = model.rope_table(16, 64, 10_000.0)
    relative = products(cos, sin)
    assert gap(relative, relative[0]) < 1e-4
    assert gap(relative[0], q @ k) > 1e-2  # control: another distance
    cos = cos[:, :8].repeat_interleave(2, dim=1)  # control: angles [a a b b] for pairs of halves
    sin = sin[:, :8].repeat_interleave(2, dim=1)
    mixed = products(cos, sin)
    assert gap(mixed, mixed[0]) > 1e-2


def neighbours(head, group):
    return head // group


def own_and_past(i, T, S):
    return S - T + i + 1


def attention_by_hand(q, k, v, key_head=neighbours, visible=own_and_past, divisor=math.sqrt):
    """softmax(q kᵀ / √head_dim) v in float64, one head and one query at a time.

    key_head, visible and divisor are arguments so that tests can make mistakes in them: the
    key/value head of a query head, the number of positions that query i sees, and what divides the
    scores."""
    q = q.double()
    k = k.double()
    v = v.double()
    n_heads, T, head_dim = q.shape[1:]
    S = k.shape[2]
    y = torch.zeros_like(q)
    for head in range(n_heads):
        shared = key_head(head, n_heads // k.shape[1])
        for i in range(T):
            seen = visible(i, T, S)
            keys = k[:, shared, :seen]    # (B, seen, head_dim)
            values = v[:, shared, :seen]  # (B, seen, head_dim)
            scores = torch.einsum("bd,bsd->bs", q[:, head, i], keys) / divisor(head_dim)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            y[:, head, i] = torch.einsum("bs,bsd->bd", weights, values)
    return y


ATTENTION_MISTAKES = {
    "[K1 K2 K1 K2]": {"key_head": lambda head, group: head % (4 // group)},
    "no mask": {"visible": lambda i, T, S: S},
    "one token ahead": {"visible": lambda i, T, S: min(S - T + i + 2, S)},
    "blind to itself": {"visible": lambda i, T, S: S - T + i},
    "counts from 0": {"visible": lambda i, T, S: i + 1},
    "no square root": {"divisor": lambda head_dim: head_dim},
    "no scale": {"divisor": lambda head_dim: 1},
}


@pytest.mark.parametrize("mistake", ATTENTION_MISTAKES.values(), ids=ATTENTION_MISTAKES)
def test_attention_is_the_formula(mistake):
    """Catches: another order of key/value heads, a wrong mask, a wrong scale."""
    q = torch.randn(2, 4, 5, 16)
    k = torch.randn(2, 2, 12, 16)
    v = torch.randn(2, 2, 12, 16)
    y = model.attention(q, k, v, model.causal_mask(12)[7:])
    assert gap(y, attention_by_hand(q, k, v)) < 1e-5
    assert gap(y, attention_by_hand(q, k, v, **mistake)) > 1e-2  # control


def attention_layer_by_hand(layer, x, interleaved=False, rotate_keys=True):
    """The whole layer in float64: projections, rotary positions, attention, projection."""
    def heads(projection):
        y = x.double() @ projection.weight.double().T
        return y.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)

    q = rotate_by_hand(heads(layer.q_proj), interleaved=interleaved)
    k = heads(layer.k_proj)
    if rotate_keys:
        k = rotate_by_hand(k, interleaved=interleaved)
    y = attention_by_hand(q, k, heads(layer.v_proj))
    return y.transpose(1, 2).flatten(2) @ layer.o_proj.weight.double().T


@pytest.mark.parametrize("mistake", [{"interleaved": True}, {"rotate_keys": False}], ids=str)
@torch.no_grad()
def test_attention_layer_rotates_queries_and_keys(mistake):
    """Catches: interleaved pairs, keys without positions, rotated values, heads cut otherwise."""
    decoder = build().model
    layer = decoder.layers[0].self_attn
    x = torch.randn(2, 12, 64)
    y = layer(x, decoder.rope_cos[:12], decoder.rope_sin[:12], model.causal_mask(12))
    assert gap(y, attention_layer_by_hand(layer, x)) < 1e-5
    assert gap(y, attention_layer_by_hand(layer, x, **mistake)) > 1e-2  # control


@torch.no_grad()
def test_gqa_equals_mha_with_repeated_heads():
    """Catches: key/value heads in the order [K1 K2 K1 K2], for which no pretrained weights fit."""
    grouped = build()
    tokens = batch()

    def logits_of_full_heads(repeat):
        """The logits of a network with a key/value head for each query head, by repeating them."""
        state = grouped.state_dict()
        for name in state:
            if "k_proj" in name or "v_proj" in name:
                state[name] = repeat(state[name].view(2, 16, 64)).reshape(64, 64)
        full = build(n_kv_heads=4)
        full.load_state_dict(state)
        return full(tokens)[0]

    logits, _ = grouped(tokens)
    same = logits_of_full_heads(lambda heads: heads.repeat_interleave(2, dim=0))  # [K1 K1 K2 K2]
    assert gap(logits, same) < 1e-5
    other = logits_of_full_heads(lambda heads: heads.repeat(2, 1, 1))  # control: [K1 K2 K1 K2]
    assert gap(logits, other) > 1e-2


@torch.no_grad()
def test_network_is_causal():
    """Catches: a token that sees the future."""
    llama = build()
    tokens = batch(B=1)
    other = tokens.clone()
    other[0, 10] = (other[0, 10] + 1) % 100
    changed = (llama(tokens)[0] - llama(other)[0]).abs().amax(-1)[0]  # (T,)
    assert changed[:10].max() < 1e-6
    assert changed[10:].min() > 1e-4  # control


@torch.no_grad()
def test_rmsnorm_is_the_formula():
    """Catches: eps outside the root, a mean subtracted as in LayerNorm, the weight left out."""
    norm = RMSNorm(4096, eps=1e-2)
    norm.weight.normal_()
    x = 0.1 * torch.randn(64, 4096) + 0.1
    weight = norm.weight.double()
    mean_of_squares = x.double().square().mean(-1, keepdim=True)
    assert gap(norm(x), weight * x / (mean_of_squares + 1e-2).sqrt()) < 1e-5
    # controls: eps outside the root; the mean subtracted
    assert gap(norm(x), weight * x / (mean_of_squares.sqrt() + 1e-2)) > 1e-2
    variance = x.double().var(-1, keepdim=True, correction=0)
    centred = x - x.double().mean(-1, keepdim=True)
    assert gap(norm(x), weight * centred / (variance + 1e-2).sqrt()) > 1e-2


@torch.no_grad()
def test_rmsnorm_computes_in_fp32():
    """Catches: a mean of squares in bf16 (too coarse) or in fp16 (infinite above 256)."""
    norm = RMSNorm(4096, eps=1e-5)
    x = (0.1 * torch.randn(64, 4096)).bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    one_rounding = (exact.bfloat16() - exact).norm()
    assert (norm(x) - exact).norm() < 1.01 * one_rounding
    control = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert (control - exact).norm() > 1.2 * one_rounding
    large = torch.full((1, 4096), 300.0).half()
    assert gap(norm(large), torch.ones(1, 4096)) < 1e-3
    assert large.square().isinf().all()  # control


@torch.no_grad()
def test_swiglu_gates_with_gate_proj():
    """Catches: gate and up exchanged, another activation."""
    mlp = SwiGLU(SMALL)
    for projection in mlp.children():
        projection.weight.normal_()
    x = torch.randn(2, 3, 64)

    def by_hand(gate_proj, up_proj):
        gate = x.double() @ gate_proj.weight.double().T
        up = x.double() @ up_proj.weight.double().T
        return (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.double().T

    expected = by_hand(mlp.gate_proj, mlp.up_proj)
    scale = expected.abs().max().item()
    assert gap(mlp(x), expected) < 1e-6 * scale
    assert gap(mlp(x), by_hand(mlp.up_proj, mlp.gate_proj)) > 1e-2 * scale  # control


# -------------------------------------------------------------------------------------------------
# The same weights in transformers

def in_transformers(ours, **mistake):
    """transformers' LlamaForCausalLM with the weights of ours; `mistake` changes its config."""
    transformers = pytest.importorskip("transformers")
    config = ours.config
    options = dict(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.padded_vocab_size,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        hidden_act="silu",
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    options.update(mistake)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    llama.load_state_dict(ours.state_dict(), strict=True)
    return llama.eval()


NETWORK_MISTAKES = {
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "eps": {"rms_norm_eps": 1e-3},
    "activation": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_equal_transformers(changes):
    """Catches: any difference to LLaMA, in the network or in the names of its weights."""
    ours = build(**changes)
    tokens = batch()
    targets = batch(seed=2)
    logits, _ = ours(tokens)
    _, loss = ours(tokens, targets)
    grads = gradients(ours, loss)

    def gaps(theirs):
        expected = theirs(tokens).logits
        loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
        return gap(logits, expected), relative_gap(grads, gradients(theirs, loss))

    of_logits, of_gradients = gaps(in_transformers(ours))
    assert of_logits < 1e-5
    assert of_gradients < 1e-4
    for mistake in NETWORK_MISTAKES.values():  # controls
        of_logits, of_gradients = gaps(in_transformers(ours, **mistake))
        assert of_logits > 1e-2
        assert of_gradients > 1e-2


def greedy(llama, tokens, n, temperature=0, **options):
    """n generated ids for each row, the likeliest ones by default: (B, n)."""
    ids = llama.generate(tokens, n, temperature=temperature, **options)
    return torch.stack(list(ids), dim=1)


def test_greedy_text_equals_transformers():
    """Catches: a generation that differs from the one that others get from our weights."""
    ours = build(vocab_size=128)  # nothing is padded, so both choose among the same ids
    tokens = batch(T=4)

    def expected(theirs, eot=None):
        text = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24,
                               do_sample=False, eos_token_id=eot, pad_token_id=eot or 0)
        return text[:, 4:]

    theirs = in_transformers(ours)
    ids = greedy(ours, tokens, 24)
    assert min(len(row.unique()) for row in ids) > 5  # the text is more than one repeated id
    assert torch.equal(ids, expected(theirs))
    eot = ids[0, 6].item()
    assert torch.equal(greedy(ours, tokens, 24, eot=eot), expected(theirs, eot))
    other = in_transformers(ours, **NETWORK_MISTAKES["theta"])
    assert not torch.equal(ids, expected(other))  # control


# -------------------------------------------------------------------------------------------------
# The loss: as it is written, and in chunks of rows, whose gradients are computed by hand or, if the
# text was edited, by autograd.

WAYS = {"as written": None, "by hand, 1": 1, "by hand, 7": 7, "by hand, 48": 48,
        "by hand, 2048": 2048, "by autograd, 7": 7, "by autograd, 48": 48}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """A function that lets a network compute its loss in one of the ways. Chunks are of so many
    rows. A batch has 48: 7 leaves a rest."""
    if request.param == "as written":
        return lambda llama: llama
    monkeypatch.setattr(fast, "CHUNK", WAYS[request.param])
    if "autograd" in request.param:
        monkeypatch.setattr(fast, "has_known_loss", lambda llama: False)
    return lambda llama: fast.use(llama, ["loss"])


def targets_with_gaps():
    """Targets for batch(), some of them −100: 2 count in the first row, 19 in the second."""
    targets = batch(seed=2)
    targets[0, 2:] = -100
    targets[1, ::5] = -100
    return targets


def loss_by_hand(llama, tokens, targets, reduction="mean"):
    """−log of the probability of each target in float64, one target at a time."""
    logp = llama(tokens)[0].double().log_softmax(-1).flatten(0, 1)  # (B · T, V)
    losses = []
    for row, target in enumerate(targets.flatten().tolist()):
        if target != -100:
            losses.append(-logp[row, target])
    total = torch.stack(losses).sum()
    return total / len(losses) if reduction == "mean" else total


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_is_cross_entropy(way, reduction, tied):
    """Catches: −100 counted as token 0, a chunk lost or counted twice, a gradient that misses the
    factor by which the loss was multiplied."""
    llama = way(build(tie_embeddings=tied))
    tokens = batch()
    targets = targets_with_gaps()
    _, loss = llama(tokens, targets, reduction=reduction)
    expected = loss_by_hand(llama, tokens, targets, reduction)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = gradients(llama, 3.7 * loss)
    assert relative_gap(ours, gradients(llama, 3.7 * expected)) < 1e-5

    unscaled = loss_by_hand(llama, tokens, targets, reduction)
    assert relative_gap(ours, gradients(llama, unscaled)) > 0.1  # control: without the 3.7
    as_token_0 = targets.masked_fill(targets == -100, 0)
    counted = loss_by_hand(llama, tokens, as_token_0, reduction)
    assert relative_gap(ours, gradients(llama, 3.7 * counted)) > 0.1  # control: −100 counted


def test_mean_loss_weighs_every_target_alike(way):
    """Catches: a mean of the rows' means, in which targets of short rows weigh more."""
    llama = way(build())
    tokens = batch()
    targets = targets_with_gaps()
    short = llama(tokens[:1], targets[:1])[1].item()  # of 2 targets
    long = llama(tokens[1:], targets[1:])[1].item()   # of 19
    mean = llama(tokens, targets)[1].item()
    assert mean == pytest.approx((2 * short + 19 * long) / 21, rel=1e-5)
    assert mean != pytest.approx((short + long) / 2, rel=1e-2)  # control


def test_loss_is_computed_in_fp32(way):
    """Catches: a softmax, or a sum of losses, in bf16: it has 3 digits."""
    llama = way(build().bfloat16())
    tokens = batch()
    targets = targets_with_gaps()
    expected = loss_by_hand(llama, tokens, targets).item()
    assert llama(tokens, targets)[1].item() == pytest.approx(expected, rel=1e-5)
    logits = llama(tokens)[0].bfloat16().flatten(0, 1)
    control = F.cross_entropy(logits, targets.flatten()).item()
    assert control != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_loss_without_targets_is_0(way, reduction):
    """Catches: 0 / 0 = NaN in a batch whose targets are all −100."""
    llama = way(build())
    tokens = batch()
    nothing = torch.full_like(tokens, -100)
    _, loss = llama(tokens, nothing, reduction=reduction)
    assert loss.item() == 0
    for grad in gradients(llama, loss).values():
        assert (grad == 0).all()
    logits, _ = llama(tokens)
    assert F.cross_entropy(logits.flatten(0, 1), nothing.flatten()).isnan()  # control


def test_loss_scale_reaches_fp16_gradients(way):
    """Catches: gradients that are made before the loss scale of fp16 multiplies them."""
    llama = way(build())
    tokens = batch()
    targets = targets_with_gaps()
    small = 2.0 ** -24  # a loss so small that its gradients vanish in fp16

    def half_precision_gradients(scale):
        with torch.autocast("cpu", torch.float16):
            _, loss = llama(tokens, targets)
        scaled = gradients(llama, loss * small * scale)
        return {name: grad / scale for name, grad in scaled.items()}

    exact = gradients(llama, loss_by_hand(llama, tokens, targets) * small)
    assert relative_gap(half_precision_gradients(2.0 ** 24), exact) < 0.02
    assert relative_gap(half_precision_gradients(1.0), exact) > 0.5  # control: without the scale


# -------------------------------------------------------------------------------------------------
# Cache and generation

@torch.no_grad()
def cached_logits(llama, tokens, sizes):
    """The logits (B, T, V) of tokens that are read in parts of these sizes, behind a cache."""
    cache = KVCache(llama.config)
    parts = [llama(part, cache=cache)[0] for part in tokens.split(sizes, dim=1)]
    assert cache.length == tokens.shape[1]
    return torch.cat(parts, dim=1)


SPLITS = {"empty cache": [24], "one by one": [1] * 24, "mixed": [5, 1, 3, 8, 7]}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_cached_logits_equal_uncached(sizes):
    """Catches: keys lost or overwritten, an empty cache that is treated as none."""
    llama = build()
    tokens = batch()
    logits, _ = llama(tokens)
    assert gap(cached_logits(llama, tokens, sizes), logits) < 1e-5
    other = tokens.clone()
    other[:, 0] = 0
    assert gap(cached_logits(llama, other, sizes), logits) > 1e-2  # control: another past


def test_positions_continue_behind_the_cache():
    """Catches: a mask or rotary positions that start at 0 again behind the cache."""
    llama = build()
    tokens = batch()
    logits, _ = llama(tokens)
    sizes = [8, 8, 8]
    assert gap(cached_logits(llama, tokens, sizes), logits) < 1e-5

    def starts_at_0(q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for block in llama.model.layers:
        block.self_attn.attend = starts_at_0  # control: the mask
    assert gap(cached_logits(llama, tokens, sizes), logits) > 1e-2
    llama = build()
    for table in (llama.model.rope_cos, llama.model.rope_sin):
        table[:24] = table[:8].repeat(3, 1)  # control: positions 0 … 7 three times
    assert gap(cached_logits(llama, tokens, sizes), logits) > 1e-2


def test_too_many_tokens_are_refused():
    """Catches: tokens beyond the window, read at positions that were never trained."""
    llama = build()
    assert llama(batch(T=32))[0].shape == (2, 32, 128)  # control
    with pytest.raises(ValueError, match="33 tokens are more than max_seq_len 32"):
        llama(batch(T=33))
    cache = KVCache(SMALL)
    with torch.no_grad():
        llama(batch(T=30), cache=cache)
        with pytest.raises(ValueError, match="33 tokens are more than max_seq_len 32"):
            llama(batch(T=3), cache=cache)


@pytest.mark.parametrize("prompt", [1, 5, 15, 16, 17, 40])
@torch.no_grad()
def test_generation_continues_past_the_window(prompt):
    """Catches: a cache that is not read again when the window is full, or one token too late."""
    llama = build(max_seq_len=16, vocab_size=128)
    tokens = batch(T=prompt)

    def expected(keep):
        """40 ids without any cache; a full window is cut down to the last `keep` tokens."""
        text = tokens[:, -16:]
        ids = []
        for _ in range(40):
            if text.shape[1] > 16:
                text = text[:, -keep:]
            logits, _ = llama(text)
            ids.append(logits[:, -1].argmax(-1))
            text = torch.cat((text, ids[-1][:, None]), dim=1)
        return torch.stack(ids, dim=1)

    ids = greedy(llama, tokens, 40)
    assert torch.equal(ids, expected(keep=8))
    assert not torch.equal(ids, expected(keep=16))  # control: a window that moves by one


def test_smallest_window_generates():
    """Catches: half of a window of 1 token, which would keep nothing, or everything."""
    assert greedy(build(max_seq_len=1), batch(T=3), 5).shape == (2, 5)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_padded_ids_are_never_drawn(temperature):
    """Catches: an id that the tokenizer does not have."""
    llama = build()
    tokens = batch()
    with torch.no_grad():
        llama.lm_head.weight[100:] = 50.0 * torch.randn(28, 64)
        assert (llama(tokens)[0].argmax(-1) >= 100).all()  # control: they would win
    assert greedy(llama, tokens, 40, temperature=temperature).max() < 100


def test_seed_and_settings_decide_the_text():
    """Catches: generate() that does not pass its settings or its generator on."""
    llama = build()
    tokens = batch()

    def sampled(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return greedy(llama, tokens, 20, temperature=1.0, generator=generator, **options)

    likeliest = greedy(llama, tokens, 20)
    assert torch.equal(sampled(1, top_k=1), likeliest)
    assert torch.equal(sampled(1, top_p=1e-6), likeliest)
    assert torch.equal(sampled(1), sampled(1))
    assert not torch.equal(sampled(1), sampled(2))   # control
    assert not torch.equal(sampled(1), likeliest)    # control
    first_ids = {sampled(seed)[0, 0].item() for seed in range(20)}
    assert len(first_ids) > 5


def ids_to_draw(probs, top_k=6, top_p=1.0):
    """The likeliest ids, one by one, until there are top_k of them or they reach top_p."""
    ids = []
    for i in probs.argsort(descending=True).tolist():
        if len(ids) < top_k and sum(probs[ids]) < top_p:
            ids.append(i)
    return ids


@pytest.mark.parametrize("temperature, cuts", [
    (1.0, {}),
    (0.5, {}),
    (2.0, {}),
    (1.0, {"top_k": 3}),
    (1.0, {"top_k": 99}),
    (1.0, {"top_p": 0.7}),
    (1.5, {"top_k": 4, "top_p": 0.6}),
])
def test_ids_are_drawn_with_their_probability(temperature, cuts):
    """Catches: temperature after the cut, top_k or top_p off by one, ids of the sorted order."""
    logits = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.8, -0.2])  # not sorted
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    ids = sample_ids(logits.expand(n, 6), temperature=temperature, generator=generator, **cuts)
    drawn = ids.bincount(minlength=6)

    probs = (logits.double() / temperature).softmax(-1)
    kept = ids_to_draw(probs, **cuts)
    assert set(ids.tolist()) == set(kept)

    def chi_square(probs):
        expected = n * probs[kept] / probs[kept].sum()
        return ((drawn[kept] - expected) ** 2 / expected).sum()

    assert chi_square(probs) < 25  # with 5 degrees of freedom, more comes once in 7,000 times
    other = (logits.double() / 3).softmax(-1)
    assert chi_square(other) > 100  # control: another temperature


def test_top_p_stops_where_it_is_reached():
    """Catches: one id too many where the probabilities add up to exactly top_p."""
    logits = torch.zeros(1000, 4)  # four ids of probability 1/4
    assert len(sample_ids(logits, top_p=0.5).unique()) == 2
    assert len(sample_ids(logits, top_p=0.51).unique()) == 3  # control


@pytest.mark.parametrize("rows", [[0], [0, 1, 2]], ids=["all end", "some end"])
def test_rows_end_at_eot(rows):
    """Catches: text after the end, a row that ends with another row, a generation without end."""
    llama = build()
    tokens = batch(B=3)[rows]
    free = greedy(llama, tokens, 20)
    eot = free[0, 6].item()
    lengths = []
    for row in free.tolist():
        row.append(eot)
        lengths.append(min(row.index(eot) + 1, 20))  # 20: the text of this row does not end
    assert (free[0, lengths[0]:] != eot).any()  # control: without an end the text goes on
    ids = greedy(llama, tokens, 20, eot=eot)
    assert ids.shape[1] == max(lengths)
    for row, length in enumerate(lengths):
        assert torch.equal(ids[row, :length], free[row, :length])
        assert (ids[row, length:] == eot).all()


def test_generation_streams_without_a_graph():
    """Catches: ids that arrive only at the end, a graph kept in memory, grad mode left off."""
    llama = build()
    calls = []
    llama.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for n, ids in enumerate(llama.generate(batch(), 5), start=1):
        assert ids.shape == (2,)
        assert calls == [False] * n
        assert torch.is_grad_enabled()
    assert n == 5


def test_logits_are_fp32_in_bf16():
    """Catches: logits in bf16, whose 3 digits are too few for sampling."""
    llama = build().bfloat16()
    logits, loss = llama(batch())
    assert logits.dtype == torch.float32
    assert loss is None
    assert llama.lm_head(torch.ones(64).bfloat16()).dtype == torch.bfloat16  # control


# -------------------------------------------------------------------------------------------------
# Arithmetic about the network

def test_flops_are_those_that_torch_counts():
    """Catches: FLOPs of the embedding or the norms, a factor of 3, an attention left out."""
    assert model.flops_per_token(PRESETS["1.7b"], 1024) == 10_583_801_856
    llama = build()
    tokens = batch(T=32)
    with FlopCounterMode(display=False) as counter:
        llama(tokens, tokens)[1].backward()
    counts = {str(operation): flops // tokens.numel()
              for operation, flops in counter.get_flop_counts()["Global"].items()}
    attention = counts["aten.bmm"]
    assert attention == 12 * SMALL.n_layers * SMALL.dim * 32
    assert counts["aten.mm"] == model.flops_per_token(SMALL, 0)
    assert counts["aten.mm"] + attention == model.flops_per_token(SMALL, 32)
    every_parameter = sum(parameter.numel() for parameter in llama.parameters())
    assert counts["aten.mm"] != 6 * every_parameter  # control


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_parameter_counts_add_up(tied):
    """Catches: a part counted twice, or one that the table leaves out."""
    counts = model.parameter_counts(build(tie_embeddings=tied))
    expected = {
        "embed_tokens": 128 * 64,
        "norms": (2 * 2 + 1) * 64,
        "self_attn": 2 * (2 * 64 * 64 + 2 * 64 * 32),
        "mlp": 2 * 3 * 64 * 96,
    }
    if not tied:
        expected["lm_head"] = 128 * 64
    assert counts == expected


class InBlock(Llama):
    def __init__(self, config):
        super().__init__(config)
        for block in self.model.layers:
            block.gain = nn.Parameter(torch.zeros(7))


class InDecoder(Llama):
    def __init__(self, config):
        super().__init__(config)
        self.model.gain = nn.Embedding(7, 4)


@pytest.mark.parametrize("changed", [InBlock, InDecoder])
def test_table_counts_new_parameters(changed, monkeypatch, capsys):
    """Catches: `python model.py` that fails, or forgets, what a reader adds to the network."""
    model.main([])
    assert "gain" not in capsys.readouterr().out  # control
    monkeypatch.setattr(model, "Llama", changed)
    model.main([])
    table = capsys.readouterr().out.split()
    assert table[table.index("gain") + 1] == "28"  # 4 layers of 7, or 7 rows of 4
    assert table[table.index("total") + 1] == "5,245,212"


@torch.no_grad()
def test_cache_holds_only_key_value_heads():
    """Catches: a cache of all query heads, which loses what grouped queries save."""
    cache = KVCache(SMALL)
    llama = build().bfloat16()
    llama(batch(B=3, T=5), cache=cache)
    assert cache.keys.shape == (2, 3, SMALL.n_kv_heads, 32, 16)
    assert cache.values.shape == cache.keys.shape
    per_token = model.kv_bytes_per_token(SMALL)
    assert cache.keys.nbytes + cache.values.nbytes == 3 * 32 * per_token
    assert model.kv_bytes_per_token(PRESETS["1.7b"]) == 2 * 36 * 8 * 64 * 2
    every_head = replace(SMALL, n_kv_heads=4)
    assert model.kv_bytes_per_token(every_head) == 2 * per_token  # control


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
