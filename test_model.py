"""test_model.py — the network against references that share no code with it: formulas written out,
transformers' LLaMA, and counters of operations, bytes and FLOPs.

A test is named after what it guarantees; its docstring says which mistake it catches. A test that
two results are equal also makes the mistake (`# control`) and checks that the difference shows: a
comparison that cannot fail proves nothing.

    python test_model.py               # about 10 seconds
    python test_model.py -v -k rope    # any option of pytest; this lists and runs the tests of RoPE
"""
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
from model import PRESETS, KVCache, Llama, ModelConfig, RMSNorm, sample_ids
from support import fast

SMALL = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, intermediate_size=96,
                    vocab_size=100, max_seq_len=32)  # head_dim 16, vocabulary padded to 128


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
    gaps = [(ours[name] - theirs[name]).norm() / theirs[name].norm() for name in theirs]
    return max(gaps).item()


# -------------------------------------------------------------------------------------------------
# Sizes

SIZES = {"tiny": 1_836_160, "124m": 190_532_352, "978m": 978_218_240, "1.7b": 1_716_144_128}


@pytest.mark.parametrize("preset", SIZES)
def test_presets_have_the_stated_sizes(preset, monkeypatch, capsys):
    """Catches: a preset of another size, a bias, a tied head, a vocabulary that is not padded to a
    multiple of 128, or padded although it is one; a part that the table leaves out."""
    config = PRESETS[preset]
    model.main([preset])
    assert f"{SIZES[preset]:,} " in capsys.readouterr().out
    monkeypatch.setitem(PRESETS, preset, replace(config, tie_embeddings=True))  # control
    model.main([preset])
    head = config.padded_vocab_size * config.dim
    assert f"{SIZES[preset] - head:,} " in capsys.readouterr().out


@pytest.mark.parametrize("sizes, message", [
    ({"dim": 65}, "dim 65 is not divisible by n_heads 4"),
    ({"dim": 12}, "dim / n_heads = 3 is odd"),
    ({"n_kv_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3"),
    ({"n_kv_heads": 0}, "n_kv_heads 0 must be positive"),
    ({"rope_theta": 0}, "rope_theta 0.0 must be positive"),
    ({"padded_vocab_size": 64}, "padded_vocab_size 64 is below vocab_size 100"),
    ({"dim": True}, "dim True is not of type int"),
])
def test_impossible_sizes_are_refused(sizes, message):
    """Catches: sizes that fail only in the first forward, with a message about shapes."""
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **sizes)


def test_initial_weights_are_normal_with_std_002():
    """Catches: torch's own initialization, a layer left out."""
    llama = Llama(replace(PRESETS["tiny"], dim=256, intermediate_size=768))
    for name, parameter in llama.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.mean().item() == pytest.approx(0, abs=5e-4), name
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02), name
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


def test_rope_rotates_pairs_of_halves():
    """Catches: interleaved pairs, another theta, another sign, angles rounded on the way."""
    x = torch.randn(1, 2, 1024, 16)
    cos, sin = model.rope_table(16, 1024, SMALL.rope_theta)
    rotated = model.apply_rope(x, cos, sin)
    assert gap(rotated, rotate_by_hand(x)) < 1e-3
    assert gap(rotated, rotate_by_hand(x, interleaved=True)) > 5e-3  # controls
    assert gap(rotated, rotate_by_hand(x, theta=10_000.0)) > 5e-3


def rounding(found, exact):
    """How large the error of bf16 numbers is, beside that of the exact ones, rounded once."""
    return (found - exact).norm() / (exact.bfloat16() - exact).norm()


def test_rope_rounds_once_in_bf16():
    """Catches: cos and sin in bf16, or a result of another dtype than x."""
    x = torch.randn(1, 2, 1024, 16).bfloat16()
    cos, sin = model.rope_table(16, 1024, SMALL.rope_theta)
    rotated = model.apply_rope(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    exact = rotate_by_hand(x)
    assert rounding(rotated, exact) < 1.01
    assert rounding(model.apply_rope(x, cos.bfloat16(), sin.bfloat16()), exact) > 1.2  # control


def attention_by_hand(q, k, v, shared=(0, 0, 1, 1), ahead=0, power=0.5):
    """softmax(q kᵀ / √head_dim) v in float64, one head and one query at a time.

    The last three are arguments so that tests can make mistakes in them: the key/value head of each
    query head, how many tokens a query sees beyond itself, and the power of what divides the
    scores."""
    q = q.double()
    k = k.double()
    v = v.double()
    T, head_dim = q.shape[2:]
    y = torch.zeros_like(q)
    for head, key_head in enumerate(shared):
        for i in range(T):
            seen = k.shape[2] - T + i + 1 + ahead
            keys = k[:, key_head, :seen]    # (B, seen, head_dim)
            values = v[:, key_head, :seen]  # (B, seen, head_dim)
            scores = torch.einsum("bd,bsd->bs", q[:, head, i], keys) / head_dim ** power
            y[:, head, i] = torch.einsum("bs,bsd->bd", scores.softmax(-1), values)
    return y


def test_attention_is_the_formula():
    """Catches: another order of key/value heads, a wrong mask, a wrong scale."""
    q = torch.randn(2, 4, 5, 16)
    k = torch.randn(2, 2, 12, 16)
    v = torch.randn(2, 2, 12, 16)
    y = model.attention(q, k, v, model.causal_mask(12)[7:])
    assert gap(y, attention_by_hand(q, k, v)) < 1e-5
    # controls: the order [K1 K2 K1 K2], a token ahead, blind to itself, no square root
    for mistake in ({"shared": (0, 1, 0, 1)}, {"ahead": 1}, {"ahead": -1}, {"power": 1}):
        assert gap(y, attention_by_hand(q, k, v, **mistake)) > 1e-2


@torch.no_grad()
def test_rmsnorm_is_the_formula():
    """Catches: eps outside the root, the weight left out, a mean that is subtracted."""
    norm = RMSNorm(4096, eps=1e-2)
    norm.weight.normal_()
    x = 0.1 * torch.randn(64, 4096) + 0.1
    weight = norm.weight.double()
    mean_of_squares = x.double().square().mean(-1, keepdim=True)
    assert gap(norm(x), weight * x / (mean_of_squares + 1e-2).sqrt()) < 1e-5
    assert gap(norm(x), weight * x / (mean_of_squares.sqrt() + 1e-2)) > 1e-2  # control


@torch.no_grad()
def test_rmsnorm_rounds_once_in_bf16():
    """Catches: a mean of squares in bf16, which is too coarse (and in fp16 infinite above 256)."""
    x = (0.1 * torch.randn(64, 4096)).bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert rounding(RMSNorm(4096, eps=1e-5)(x), exact) < 1.01
    in_bf16 = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert rounding(in_bf16, exact) > 1.2  # control


@torch.no_grad()
def test_swiglu_is_the_formula():
    """Catches: gate and up exchanged, another activation."""
    mlp = build().model.layers[0].mlp
    x = torch.randn(2, 3, 64)
    gate = mlp.gate_proj(x)
    up = mlp.up_proj(x)
    assert gap(mlp(x), mlp.down_proj(gate * gate.sigmoid() * up)) < 1e-5
    assert gap(mlp(x), mlp.down_proj(up * up.sigmoid() * gate)) > 1e-2  # control


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
        tie_word_embeddings=config.tie_embeddings,
        eos_token_id=None,
    )
    options.update(mistake)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    llama.load_state_dict(ours.state_dict(), strict=True)
    return llama.eval()


OTHER_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4, "tie_embeddings": True}], ids=str)
def test_logits_and_gradients_equal_transformers(changes):
    """Catches: any difference to LLaMA, in the network or in the names of its weights: keys without
    positions, another order of heads, a token that sees the future, a norm at another place."""
    ours = build(**changes)
    tokens = batch()
    targets = batch(seed=2)
    logits, _ = ours(tokens)
    _, loss = ours(tokens, targets)
    grads = gradients(ours, loss)

    def gaps(**mistake):
        theirs = in_transformers(ours, **mistake)
        expected = theirs(tokens).logits
        loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
        return gap(logits, expected), relative_gap(grads, gradients(theirs, loss))

    assert max(gaps()) < 1e-4
    for mistake in (OTHER_THETA, {"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}):  # controls
        assert min(gaps(**mistake)) > 1e-2


def greedy(llama, tokens, n, temperature=0, **options):
    """n generated ids for each row, the likeliest ones by default: (B, n)."""
    ids = llama.generate(tokens, n, temperature=temperature, **options)
    return torch.stack(list(ids), dim=1)


def test_greedy_text_equals_transformers():
    """Catches: a generation that differs from the one that others get from our weights; text after
    its end, a row that ends with another row, a generation without end."""
    ours = build(vocab_size=128)  # nothing is padded, so both choose among the same ids
    tokens = batch(T=4)

    def expected(theirs, tokens, eot=None):
        text = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24,
                               do_sample=False, eos_token_id=eot, pad_token_id=eot or 0)
        return text[:, 4:]

    theirs = in_transformers(ours)
    ids = greedy(ours, tokens, 24)
    assert torch.equal(ids, expected(theirs, tokens))
    eot = ids[0, 6].item()
    assert eot not in ids[1]
    for some in (tokens, tokens[:1]):  # one of two rows ends; all do
        assert torch.equal(greedy(ours, some, 24, eot=eot), expected(theirs, some, eot))
    other = in_transformers(ours, **OTHER_THETA)
    assert not torch.equal(ids, expected(other, tokens))  # control


# -------------------------------------------------------------------------------------------------
# The loss: as it is written, and in chunks of rows. A batch has 48: of 7, the last is shorter.

@pytest.fixture(params=["as written", 7, 48])
def way(request, monkeypatch):
    """A function that lets a network compute its loss in one of the ways."""
    if request.param == "as written":
        return lambda llama: llama
    monkeypatch.setattr(fast, "CHUNK", request.param)
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


@pytest.mark.parametrize("reduction, tied", [("sum", True), ("mean", False)])
def test_loss_is_cross_entropy(way, reduction, tied):
    """Catches: −100 counted as token 0, a chunk lost or counted twice, a mean of the rows' means, a
    gradient that misses the factor by which the loss was multiplied."""
    llama = way(build(tie_embeddings=tied))
    tokens = batch()
    targets = targets_with_gaps()
    _, loss = llama(tokens, targets, reduction=reduction)
    expected = loss_by_hand(llama, tokens, targets, reduction)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = gradients(llama, 3.7 * loss)
    assert relative_gap(ours, gradients(llama, 3.7 * expected)) < 1e-5
    counted = loss_by_hand(llama, tokens, targets.masked_fill(targets == -100, 0), reduction)
    assert relative_gap(ours, gradients(llama, 3.7 * counted)) > 0.1  # control: −100 counted


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


def test_loss_without_targets_is_0(way):
    """Catches: 0 / 0 = NaN in a batch whose targets are all −100."""
    llama = way(build())
    tokens = batch()
    nothing = torch.full_like(tokens, -100)
    _, loss = llama(tokens, nothing)
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

    def gap_in_fp16(scale):
        with torch.autocast("cpu", torch.float16):
            _, loss = llama(tokens, targets)
        scaled = gradients(llama, loss * small * scale)
        exact = gradients(llama, loss_by_hand(llama, tokens, targets) * small * scale)
        return relative_gap(scaled, exact)

    assert gap_in_fp16(2.0 ** 24) < 0.02
    assert gap_in_fp16(1.0) > 0.5  # control: without the scale


# -------------------------------------------------------------------------------------------------
# Cache and generation

@torch.no_grad()
def test_cached_logits_equal_uncached():
    """Catches: keys lost or overwritten; a mask or positions that start at 0 again behind the
    cache."""
    llama = build()

    def cached_logits(tokens):
        """The logits (B, T, V) of tokens that are read in parts, behind a cache."""
        cache = KVCache(SMALL)
        parts = [llama(part, cache=cache)[0] for part in tokens.split([5, 1, 3, 8, 7], dim=1)]
        return torch.cat(parts, dim=1)

    tokens = batch()
    logits, _ = llama(tokens)
    assert gap(cached_logits(tokens), logits) < 1e-5
    tokens[:, 0] = 0
    assert gap(cached_logits(tokens)[:, 5:], logits[:, 5:]) > 1e-2  # control: another past


@torch.no_grad()
def test_too_many_tokens_are_refused():
    """Catches: tokens beyond the window, read at positions that were never trained."""
    llama = build()
    cache = KVCache(SMALL)
    llama(batch(T=30), cache=cache)
    llama(batch(T=2), cache=cache)  # control
    with pytest.raises(ValueError, match="33 tokens are more than max_seq_len 32"):
        llama(batch(T=1), cache=cache)


@pytest.mark.parametrize("prompt", [5, 16, 40])
@torch.no_grad()
def test_generation_continues_past_the_window(prompt):
    """Catches: a cache that is not read again when the window is full, or one token too late."""
    llama = build(max_seq_len=16, vocab_size=128)
    tokens = batch(T=prompt)

    def expected(keep):
        """40 ids without any cache; a full window is cut down to the last `keep` tokens."""
        read = tokens[:, -16:]
        text = tokens
        for _ in range(40):
            next_ids = llama(read)[0][:, -1:].argmax(-1)
            text = torch.cat((text, next_ids), dim=1)
            read = torch.cat((read, next_ids), dim=1)
            if read.shape[1] > 16:
                read = read[:, -keep:]
        return text[:, prompt:]

    ids = greedy(llama, tokens, 40)
    assert torch.equal(ids, expected(keep=8))
    assert not torch.equal(ids, expected(keep=16))  # control: a window that moves by one


def test_padded_ids_are_never_drawn():
    """Catches: an id that the tokenizer does not have."""
    llama = build()
    tokens = batch()
    with torch.no_grad():
        llama.lm_head.weight[100:] = 50.0 * torch.randn(28, 64)
        assert (llama(tokens)[0].argmax(-1) >= 100).all()  # control: they would win
    assert greedy(llama, tokens, 40).max() < 100


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
    assert not torch.equal(sampled(1), sampled(2))  # controls
    assert not torch.equal(sampled(1), likeliest)


@pytest.mark.parametrize("temperature, cuts, kept", [
    (0.5, {}, [0, 1, 2, 3, 4, 5]),
    (1.0, {"top_k": 3}, [1, 3, 4]),
    # In the order of probability 0.35, 0.25, 0.16, 0.11 … of the whole: two of them are 0.60, and
    # of the four likeliest alone 0.69. At temperature 1 they would be 0.71.
    (1.5, {"top_k": 4, "top_p": 0.65}, [1, 3, 4]),
])
def test_ids_are_drawn_with_their_probability(temperature, cuts, kept):
    """Catches: temperature after the cut, top_k or top_p off by one, ids of the sorted order."""
    logits = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.8, -0.2])  # not sorted
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    ids = sample_ids(logits.expand(n, 6), temperature=temperature, generator=generator, **cuts)
    drawn = ids.bincount(minlength=6)
    assert drawn.nonzero().flatten().tolist() == kept

    def chi_square(temperature):
        expected = n * (logits[kept].double() / temperature).softmax(-1)
        return ((drawn[kept] - expected) ** 2 / expected).sum()

    assert chi_square(temperature) < 25  # with 5 degrees of freedom, more comes once in 7,000 times
    assert chi_square(3) > 100  # control: another temperature


def test_tiny_temperature_takes_the_likeliest():
    """Catches: logits divided by so little that they are infinite."""
    logits = torch.tensor([[0.3, 2.0, -1.0]])
    for temperature in (0, 1e-45, 1e-40, 1e-6):
        assert sample_ids(logits, temperature).item() == 1
    drawn = [sample_ids(logits, 9.0).item() for _ in range(50)]
    assert set(drawn) != {1}  # control


def test_generation_streams_without_a_graph():
    """Catches: ids that arrive only at the end, a graph kept in memory, grad mode left off."""
    llama = build()
    modes = []
    llama.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    for n, _ in enumerate(llama.generate(batch(), 3), start=1):
        assert modes == [False] * n
        assert torch.is_grad_enabled()
    assert n == 3


# -------------------------------------------------------------------------------------------------
# Arithmetic about the network

def test_flops_are_those_that_torch_counts():
    """Catches: FLOPs of the embedding or the norms, a factor of 3, an attention left out."""
    llama = build()
    tokens = batch(T=32)
    with FlopCounterMode(display=False) as counter:
        llama(tokens, tokens)[1].backward()
    counts = {str(operation): flops // tokens.numel()
              for operation, flops in counter.get_flop_counts()["Global"].items()}
    assert counts["aten.mm"] == model.flops_per_token(SMALL, 0)
    assert counts["aten.mm"] + counts["aten.bmm"] == model.flops_per_token(SMALL, 32)
    every_parameter = sum(parameter.numel() for parameter in llama.parameters())
    assert counts["aten.mm"] != 6 * every_parameter  # control


class Edited(Llama):
    def __init__(self, config):
        super().__init__(config)
        for block in self.model.layers:
            block.gain = nn.Parameter(torch.zeros(7))


def test_table_counts_new_parameters(monkeypatch, capsys):
    """Catches: `python model.py` that fails, or forgets, what a reader adds to the network."""
    monkeypatch.setattr(model, "Llama", Edited)
    model.main([])
    table = capsys.readouterr().out.split()
    assert table[table.index("gain") + 1] == "28"  # 4 layers of 7
    assert table[table.index("total") + 1] == f"{SIZES['tiny'] + 28:,}"


@torch.no_grad()
def test_cache_holds_only_key_value_heads():
    """Catches: a cache of all query heads, which loses what grouped queries save."""
    cache = KVCache(SMALL)
    llama = build().bfloat16()
    llama(batch(B=3, T=5), cache=cache)
    per_token = model.kv_bytes_per_token(SMALL)
    assert cache.keys.nbytes + cache.values.nbytes == 3 * 32 * per_token
    assert per_token == 2 * 2 * 2 * 16 * 2  # of the 4 query heads it would be twice as much


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
