"""test_model.py — the network against things that know nothing of it: transformers' LLaMA, formulas written out, counters.

A test is named after the mistake that it catches. Where it asserts that two things are equal, it also makes the mistake
(`control`) and asserts that the difference then shows: a comparison that cannot fail proves nothing.

    python -m pytest test_model.py                 # 15 seconds
    python -m pytest test_model.py -m "not slow"   # 10 seconds: without the compiler
"""
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from model import ChunkedCrossEntropy, KVCache, Llama, ModelConfig, PRESETS, RMSNorm, SwiGLU, sample_ids

SMALL = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, intermediate_size=96, vocab_size=100, max_seq_len=32)
SIZES = {"gqa": {}, "mha": {"n_kv_heads": 4}, "tied": {"tie_embeddings": True}}


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(seed=0, scale=6.0, **changes):
    """A small network with weights large enough that attention is not flat, and norms that are not all 1."""
    torch.manual_seed(seed)
    llama = Llama(replace(SMALL, padded_vocab_size=None, **changes))
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return llama


def batch(B=2, T=24, seed=1, high=SMALL.vocab_size):
    return torch.randint(high, (B, T), generator=torch.Generator().manual_seed(seed))


def gap(a, b):
    return (a.double() - b.double()).abs().max().item()


def gradients(llama, loss):
    llama.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in llama.named_parameters()}


def relative_gap(ours, theirs):
    """The largest |a − b| / |b| (2-norms) over the parameters."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in ours)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and arithmetic

@pytest.mark.parametrize("preset, expected", [("tiny", 1_836_160), ("124m", 190_532_352), ("978m", 978_218_240),
                                              ("1.7b", 1_716_144_128)])
def test_a_preset_of_another_size(preset, expected, capsys):
    def total(config):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Llama(config).parameters())
    config = PRESETS[preset]
    assert (config.norm_eps, config.rope_theta, config.tie_embeddings) == (1e-5, 500_000.0, False)
    assert total(config) == sum(model.parameter_counts(config).values()) == expected
    model.main([preset])
    assert f"{expected:,}" in capsys.readouterr().out
    control = replace(config, tie_embeddings=True)
    assert total(control) == sum(model.parameter_counts(control).values()) == expected - config.padded_vocab_size * config.dim


@pytest.mark.parametrize("sizes, message", [
    ({"dim": 65}, "dim 65 is not divisible by n_heads 4"), ({"n_kv_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3"),
    ({"dim": 12}, "dim / n_heads = 3 is odd"), ({"padded_vocab_size": 64}, "padded_vocab_size 64 is below vocab_size 100"),
    ({"n_layers": 0, "n_kv_heads": 0}, "every size must be at least 1.*n_layers=0")])
def test_sizes_that_do_not_fit_fail_late_or_without_a_reason(sizes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **sizes)
    assert [ModelConfig(vocab_size=n).padded_vocab_size for n in (1, 128, 129, 50257)] == [128, 128, 256, 50304]


def test_flops_that_torch_does_not_count_or_counts_otherwise():
    assert model.flops_per_token(PRESETS["1.7b"], 1024) == 10_583_801_856
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    llama, tokens = build(), batch(T=32)
    # Plain matrix products: a fused attention kernel is counted with what its backward computes again, or not at all.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        llama(tokens, tokens)[1].backward()
    counts = {str(op): flops // tokens.numel() for op, flops in counter.get_flop_counts()["Global"].items()}
    assert counts["aten.bmm"] == 12 * SMALL.n_layers * SMALL.dim * 32  # attention
    assert counts["aten.mm"] == model.flops_per_token(SMALL, 32) - counts["aten.bmm"] == model.flops_per_token(SMALL, 0)
    control = 6 * sum(parameter.numel() for parameter in llama.parameters())  # the embedding and the norms counted too
    assert counts["aten.mm"] != control


def test_a_cache_that_holds_every_query_head():
    cache, llama = KVCache(SMALL), build().bfloat16()
    with torch.no_grad():
        llama(batch(B=3, T=5), cache=cache)
    assert cache.length == 5 and cache.keys.shape == cache.values.shape == (2, 3, SMALL.n_kv_heads, 32, 16)
    assert cache.keys.nbytes + cache.values.nbytes == 3 * 32 * model.kv_bytes_per_token(SMALL)
    assert model.kv_bytes_per_token(replace(SMALL, n_kv_heads=4)) == 2 * model.kv_bytes_per_token(SMALL)
    assert model.kv_bytes_per_token(PRESETS["1.7b"]) == 73_728  # 2 · 36 layers · 8 heads · 64 · 2 bytes


def test_activation_memory_that_is_not_what_a_real_forward_keeps():
    def kept(config, dtype):
        """Bytes of the storages that a real forward of the blocks keeps, each storage once, weights not counted."""
        llama, tokens, saved = Llama(config), batch(B=4, T=32), {}
        def keep(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor
        x = llama.model.embed_tokens(tokens)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                for block in llama.model.layers:
                    x = block(x, llama.model.rope_cos, llama.model.rope_sin)
        weights = {parameter.untyped_storage().data_ptr() for parameter in llama.parameters()}
        return sum(storage.nbytes() for address, storage in saved.items() if address not in weights)
    config = replace(SMALL, n_layers=3)
    plain, checkpointed = model.activation_bytes(config, 4, 32)
    assert plain == pytest.approx(kept(config, torch.bfloat16), rel=0.02)
    assert checkpointed == pytest.approx(kept(replace(config, n_layers=1), torch.bfloat16) + 3 * 4 * 32 * 64 * 4, rel=0.02)
    control = kept(config, torch.float32)
    assert abs(plain / control - 1) > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Each part against a written-out twin

def turn(x, theta, pairs="halves"):
    """Rotary positions by complex numbers, in float64: pair i at position m is multiplied by exp(√−1 · m · theta^(−2i/D))."""
    B, heads, T, D = x.shape
    first, second = x.double().chunk(2, dim=-1) if pairs == "halves" else (x[..., ::2].double(), x[..., 1::2].double())
    angles = torch.outer(torch.arange(T).double(), theta ** (-torch.arange(0, D, 2).double() / D))
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), -1) if pairs == "halves" else torch.stack((z.real, z.imag), -1).flatten(-2)


def test_rope_with_interleaved_pairs_or_angles_that_are_not_exact():
    x = torch.randn(1, 2, 1024, 16)
    cos, sin = model.rope_table(16, 1024, 500_000.0)
    assert gap(model.apply_rope(x, cos, sin), turn(x, 500_000.0)) < 1e-3
    for control in (turn(x, 500_000.0, pairs="interleaved"), turn(x, 10_000.0)):
        assert gap(model.apply_rope(x, cos, sin), control) > 5e-3
    x = x.bfloat16()  # one rounding, at the end
    exact, control = turn(x, 500_000.0), model.apply_rope(x, cos.bfloat16(), sin.bfloat16())
    turned = model.apply_rope(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert (turned - exact).norm() < 1.01 * (exact.bfloat16() - exact).norm() < 0.8 * (control - exact).norm()


def test_rope_that_depends_on_where_tokens_stand():
    q, k, (cos, sin) = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16), model.rope_table(16, 64, 10_000.0)
    def product(m, n, cos=cos, sin=sin):
        return (model.apply_rope(q, cos[m], sin[m]) * model.apply_rope(k, cos[n], sin[n])).sum().item()
    assert all(abs(product(m, m - 5) - product(5, 0)) < 1e-4 for m in range(5, 64))
    assert abs(product(9, 5) - product(5, 0)) > 1e-2  # another distance
    mixed = [table[:, :8].repeat_interleave(2, dim=1) for table in (cos, sin)]  # control: angles [a a b b], pairs of halves
    assert max(abs(product(m, m - 5, *mixed) - product(5, 0, *mixed)) for m in range(5, 64)) > 1e-2


def attention_by_hand(attention, x, shared=lambda head, group: head // group, visible=lambda i, T: i + 1, pairs="halves",
                      scale=None):
    """softmax(q kᵀ / √head_dim) v in float64, one head and one query at a time. The arguments are for mistakes."""
    D, group = attention.head_dim, attention.n_heads // attention.n_kv_heads
    def heads(projection):
        return (x.double() @ projection.weight.double().T).unflatten(-1, (-1, D)).transpose(1, 2)  # (B, heads, T, D)
    q, k, v = heads(attention.q_proj), heads(attention.k_proj), heads(attention.v_proj)
    q, k, y = turn(q, SMALL.rope_theta, pairs), turn(k, SMALL.rope_theta, pairs), torch.zeros_like(q)
    for head in range(attention.n_heads):
        for i in range(x.shape[1]):
            keys, values = (t[:, shared(head, group), :visible(i, x.shape[1])] for t in (k, v))    # (B, n, D)
            weight = (torch.einsum("bd,bnd->bn", q[:, head, i], keys) / (scale or math.sqrt(D))).exp()
            y[:, head, i] = torch.einsum("bn,bnd->bd", weight, values) / weight.sum(-1, keepdim=True)
    return y.transpose(1, 2).flatten(2) @ attention.o_proj.weight.double().T


@pytest.mark.parametrize("mistake", [{"shared": lambda head, group: head % (4 // group)}, {"visible": lambda i, T: T},
                                     {"visible": lambda i, T: max(i, 1)}, {"pairs": "interleaved"}, {"scale": 16}],
                         ids=["[K1 K2 K1 K2]", "no mask", "blind to itself", "interleaved rope", "no square root"])
@torch.no_grad()
def test_attention_with(mistake):
    llama, x = build(), torch.randn(2, 12, 64)
    attention, table = llama.model.layers[0].self_attn, (llama.model.rope_cos[:12], llama.model.rope_sin[:12])
    assert gap(attention(x, *table), attention_by_hand(attention, x)) < 1e-5
    assert gap(attention(x, *table), attention_by_hand(attention, x, **mistake)) > 1e-2


@torch.no_grad()
def test_shared_heads_that_are_not_the_expanded_ones():
    few, tokens = build(), batch()
    def expanded(repeat):
        many, state = build(n_kv_heads=4), few.state_dict()
        for name in state:
            if "k_proj" in name or "v_proj" in name:
                state[name] = repeat(state[name].view(2, 16, 64)).reshape(64, 64)
        many.load_state_dict(state)
        return many(tokens)[0]
    assert gap(few(tokens)[0], expanded(lambda heads: heads.repeat_interleave(2, dim=0))) < 1e-5  # [K1 K1 K2 K2]
    assert gap(few(tokens)[0], expanded(lambda heads: heads.repeat(2, 1, 1))) > 1e-2              # control: [K1 K2 K1 K2]


@torch.no_grad()
def test_a_token_that_sees_the_future():
    llama, tokens = build(), batch(B=1)
    other = tokens.clone()
    other[0, 10] = (other[0, 10] + 1) % 100
    changed = (llama(tokens)[0] - llama(other)[0]).abs().amax(-1)[0]  # (T,)
    assert changed[:10].max() < 1e-6 and changed[10:].min() > 1e-4


@torch.no_grad()
def test_rmsnorm_in_low_precision_or_with_eps_elsewhere():
    norm, x = RMSNorm(4096, eps=1e-2), 0.1 * torch.randn(64, 4096)
    norm.weight.normal_()
    rms = x.double().pow(2).mean(-1, keepdim=True)
    assert gap(norm(x), x / (rms + 1e-2).sqrt() * norm.weight) < 1e-5
    assert gap(norm(x), x / (rms.sqrt() + 1e-2) * norm.weight) > 1e-2  # control: eps outside the root
    norm, x = RMSNorm(4096, eps=1e-5), x.bfloat16()
    exact = x.double() * x.double().pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()
    control = x * x.pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()  # all of it in bf16
    assert (norm(x) - exact).norm() < 1.01 * (exact.bfloat16() - exact).norm() < 0.8 * (control - exact).norm()
    assert gap(norm(torch.full((1, 4096), 300.0).half()), torch.ones(1, 4096)) < 1e-3  # 300² overflows fp16


@torch.no_grad()
def test_swiglu_with_gate_and_up_exchanged():
    mlp, x = SwiGLU(SMALL), torch.randn(2, 3, 64).double()
    gate, up, down = (p.weight.data.normal_().double() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    def formula(gate, up):
        g = x @ gate.T
        return (g / (1 + (-g).exp()) * (x @ up.T)) @ down.T
    scale = formula(gate, up).abs().max().item()
    assert gap(mlp(x.float()), formula(gate, up)) < 1e-6 * scale
    assert gap(mlp(x.float()), formula(up, gate)) > 1e-2 * scale


def test_initial_weights_of_another_size():
    torch.manual_seed(0)
    llama, tokens = Llama(PRESETS["tiny"]), batch(T=64)
    for name, parameter in llama.named_parameters():
        if parameter.dim() == 1:
            assert "norm" in name and (parameter == 1).all()
        else:
            assert abs(parameter.mean()) < 5e-4 and parameter.std().item() == pytest.approx(0.02, rel=0.02), name
    assert llama(tokens, tokens)[1].item() == pytest.approx(math.log(4096), abs=0.1)  # any next token equally likely
    assert torch.nn.Linear(256, 256).weight.std().item() != pytest.approx(0.02, rel=0.02)  # control: torch's own


# ---------------------------------------------------------------------------------------------------------------------
# The same weights in transformers

def theirs(ours, **changes):
    """transformers' LlamaForCausalLM with the weights of ours."""
    transformers = pytest.importorskip("transformers")
    c = ours.config
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**dict(
        hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        intermediate_size=c.intermediate_size, vocab_size=c.padded_vocab_size, max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, hidden_act="silu",
        tie_word_embeddings=c.tie_embeddings, attn_implementation="eager", bos_token_id=None, eos_token_id=None), **changes}))
    llama.load_state_dict(ours.state_dict(), strict=True)
    return llama.eval()


MISTAKES = {"theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}, "eps": {"rms_norm_eps": 1e-3},
            "activation": {"hidden_act": "gelu"}}


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_logits_or_gradients_that_transformers_would_not_give(changes):
    ours, tokens, targets = build(**changes), batch(), batch(seed=2)
    logits, grads = ours(tokens)[0], gradients(ours, ours(tokens, targets)[1])
    def gaps(**mistake):
        llama = theirs(ours, **mistake)
        expected = llama(tokens).logits
        loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
        return gap(logits, expected), relative_gap(grads, gradients(llama, loss))
    of_logits, of_gradients = gaps()
    assert of_logits < 1e-5 and of_gradients < 1e-4
    for mistake in MISTAKES.values():
        of_logits, of_gradients = gaps(**mistake)
        assert of_logits > 1e-2 and of_gradients > 1e-2


def greedy(llama, tokens, n, **options):
    return torch.stack(list(llama.generate(tokens, n, **{"temperature": 0, **options})), dim=1)  # (B, n)


def test_greedy_ids_that_transformers_would_not_give():
    ours, tokens = build(vocab_size=128), batch(T=4)  # 128: nothing is padded, so that both choose among the same ids
    def expected(llama, eot=None):
        return llama.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False,
                              eos_token_id=eot, pad_token_id=eot or 0)[:, 4:]
    ids = greedy(ours, tokens, 24)
    assert min(len(row.unique()) for row in ids) > 5  # it does not say one thing for ever
    assert torch.equal(ids, expected(theirs(ours)))
    assert not torch.equal(ids, expected(theirs(ours, **MISTAKES["theta"])))
    eot = ids[0, 6].item()
    assert torch.equal(greedy(ours, tokens, 24, eot=eot), expected(theirs(ours), eot))


# ---------------------------------------------------------------------------------------------------------------------
# Cache and generation

@torch.no_grad()
def cached_logits(llama, tokens, sizes):
    cache = KVCache(llama.config)
    return torch.cat([llama(part, cache=cache)[0] for part in tokens.split(sizes, dim=1)], dim=1)


def test_a_mask_or_positions_that_start_again_behind_the_cache(monkeypatch):
    llama, tokens = build(), batch()
    logits, attend, several = llama(tokens)[0], F.scaled_dot_product_attention, [8, 8, 8]
    for sizes in ([24], [1] * 24, [5, 1, 3, 8, 7], several):
        assert gap(cached_logits(llama, tokens, sizes), logits) < 1e-5
    with monkeypatch.context() as patch:  # control: the mask of is_causal, which counts queries from 0
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask, is_causal, enable_gqa: attend(
            q, k, v, is_causal=True, enable_gqa=True))
        assert gap(cached_logits(llama, tokens, several), logits) > 1e-2
    for table in (llama.model.rope_cos, llama.model.rope_sin):  # control: positions 0 … 7, 0 … 7, 0 … 7
        table[:24] = table[:8].repeat(3, 1)
    assert gap(cached_logits(llama, tokens, several), logits) > 1e-2


def test_more_tokens_than_the_window_are_read_silently():
    llama, cache = build(), KVCache(SMALL)
    assert llama(batch(T=32))[0].shape == (2, 32, 128)
    with pytest.raises(ValueError, match="33 tokens are more than max_seq_len 32"):
        llama(batch(T=33))
    with torch.no_grad(), pytest.raises(ValueError, match="33 tokens"):
        llama(batch(T=30), cache=cache)
        llama(batch(T=3), cache=cache)


@pytest.mark.parametrize("prompt", [1, 5, 15, 16, 17, 40])
@torch.no_grad()
def test_generation_that_breaks_at_the_end_of_the_window(prompt):
    llama, tokens = build(max_seq_len=16, vocab_size=128), batch(T=prompt)
    def expected(keep):
        text, ids = tokens[:, -16:], []
        for _ in range(40):
            text = text[:, -keep:] if text.shape[1] > 16 else text
            ids.append(llama(text)[0][:, -1].argmax(-1))  # everything read again each time
            text = torch.cat((text, ids[-1][:, None]), dim=1)
        return torch.stack(ids, dim=1)
    assert torch.equal(greedy(llama, tokens, 40), expected(keep=8))
    assert not torch.equal(greedy(llama, tokens, 40), expected(keep=16))  # control: a window that slides


def test_a_padded_id_is_drawn():
    llama, tokens = build(), batch()
    with torch.no_grad():
        llama.lm_head.weight[100:] = 50.0 * torch.randn(28, 64)
        assert (llama(tokens)[0].argmax(-1) >= 100).all()  # control: they would win
    for temperature in (0, 1.0):
        assert greedy(llama, tokens, 40, temperature=temperature).max() < 100


def test_sampling_that_ignores_its_settings_or_its_seed():
    llama, tokens = build(), batch()
    def sampled(seed, **options):
        return greedy(llama, tokens, 20, temperature=1.0, generator=torch.Generator().manual_seed(seed), **options)
    likeliest = greedy(llama, tokens, 20)
    assert torch.equal(sampled(1, top_k=1), likeliest) and torch.equal(sampled(1, top_p=1e-6), likeliest)
    assert torch.equal(sampled(1), sampled(1)) and not torch.equal(sampled(1), sampled(2))
    assert not torch.equal(sampled(1), likeliest) and len({sampled(seed)[0, 0].item() for seed in range(20)}) > 5


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 3}, {"top_k": 99}, {"top_p": 0.7},
                                     {"temperature": 1.5, "top_k": 4, "top_p": 0.6}], ids=str)
def test_ids_drawn_with_other_frequencies(options):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.8, -0.2])  # not sorted, so that ids must find their way back
    probs, kept = (logits.double() / options.get("temperature", 1.0)).softmax(-1), []
    for i in sorted(range(6), key=lambda i: -probs[i]):  # by hand: the likeliest, until there are top_k or they reach top_p
        if len(kept) < options.get("top_k", 6) and sum(probs[kept]) < options.get("top_p", 1.0):
            kept.append(i)
    n = 20_000
    drawn = sample_ids(logits.expand(n, 6), generator=torch.Generator().manual_seed(0), **options).bincount(minlength=6)
    assert set(drawn.nonzero().flatten().tolist()) == set(kept)
    def chi_square(probs):
        expected = n * probs[kept] / probs[kept].sum()
        return ((drawn[kept] - expected) ** 2 / expected).sum()
    assert chi_square(probs) < 25  # at most 5 degrees of freedom: 25 or more comes once in 7,000 times
    assert chi_square((logits / 3).double().softmax(-1)) > 100  # control


def test_text_that_goes_on_behind_its_end():
    llama, tokens = build(), batch(B=3)
    free = greedy(llama, tokens, 20)
    eot = free[0, 6].item()
    lengths = [(row.tolist() + [eot]).index(eot) + 1 for row in free]  # 21: it has no end
    assert len(set(lengths)) > 1 and (free[0, lengths[0]:] != eot).any()  # control: without an end it goes on
    for rows in ([0], [0, 1, 2]):  # all rows end; some do
        ids = greedy(llama, tokens[rows], 20, eot=eot)
        assert ids.shape[1] == min(20, max(lengths[row] for row in rows))
        for row, got in zip(rows, ids):
            n = min(lengths[row], 20)
            assert torch.equal(got[:n], free[row, :n]) and (got[n:] == eot).all()


def test_generation_that_waits_or_builds_a_graph_or_leaves_gradients_off():
    llama, calls = build(), []
    llama.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for n, ids in enumerate(llama.generate(batch(), 5), start=1):
        assert calls == [False] * n and ids.shape == (2,) and torch.is_grad_enabled()
    assert greedy(build(max_seq_len=1), batch(T=3), 5).shape == (2, 5)  # the smallest window


# ---------------------------------------------------------------------------------------------------------------------
# The loss

def plain_loss(llama, tokens, targets, reduction="mean"):
    """What the chunked loss is, in one line."""
    return F.cross_entropy(llama(tokens)[0].flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction=reduction)


def targets_of(tokens):
    """Targets of which some, in the first row most, are −100."""
    targets = batch(*tokens.shape, seed=2)
    targets[0, 2:], targets[1, ::5] = -100, -100
    return targets


@pytest.mark.parametrize("chunk", [1, 7, 48, 2048])  # 48 rows: 7 leaves a rest
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_that_is_not_cross_entropy(chunk, reduction, tied, monkeypatch):
    monkeypatch.setattr(ChunkedCrossEntropy, "CHUNK", chunk)
    llama, tokens = build(tie_embeddings=tied), batch()
    targets = targets_of(tokens)
    loss, plain = llama(tokens, targets, reduction=reduction)[1], plain_loss(llama, tokens, targets, reduction)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    ours, expected = gradients(llama, 3.7 * loss), gradients(llama, 3.7 * plain)  # what follows the loss is in its gradients
    assert relative_gap(ours, expected) < 1e-5
    counted = torch.where(targets == -100, 0, targets)  # control: −100 counted as token 0
    assert relative_gap(ours, gradients(llama, 3.7 * plain_loss(llama, tokens, counted, reduction))) > 0.1
    assert relative_gap(ours, gradients(llama, plain_loss(llama, tokens, targets, reduction))) > 0.1  # control: no 3.7


def test_a_mean_of_means():
    llama, tokens = build(), batch()
    targets = targets_of(tokens)  # 2 targets in one row, 19 in the other
    rows = [llama(tokens[i:i + 1], targets[i:i + 1])[1].item() for i in range(2)]
    mean = llama(tokens, targets)[1].item()
    assert mean == pytest.approx((2 * rows[0] + 19 * rows[1]) / 21, rel=1e-5)
    assert mean != pytest.approx(sum(rows) / 2, rel=1e-2)  # control


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_target_gives_nan(reduction):
    llama, tokens = build(), batch()
    loss = llama(tokens, torch.full_like(tokens, -100), reduction=reduction)[1]
    assert loss.item() == 0 and all((grad == 0).all() for grad in gradients(llama, loss).values())
    assert plain_loss(llama, tokens, torch.full_like(tokens, -100)).isnan()  # control: what torch's mean gives


class Recorder(TorchDispatchMode):
    """Counts operations and keeps the size of the largest tensor that any of them gave."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = Counter(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.calls[operation.overloadpacket.__name__] += 1
        self.largest = max([self.largest] + [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)])
        return result


def test_all_logits_are_held_or_made_twice_or_gradients_made_without_need(monkeypatch):
    assert ChunkedCrossEntropy.CHUNK * PRESETS["1.7b"].padded_vocab_size * 4 < 0.5e9  # bytes of fp32 logits
    monkeypatch.setattr(ChunkedCrossEntropy, "CHUNK", 10)
    hidden, weight, targets = torch.randn(48, 16, requires_grad=True), torch.randn(500, 16, requires_grad=True), batch(1, 48)[0]
    with Recorder() as forward:
        loss = ChunkedCrossEntropy.apply(hidden, weight, targets, True)
    with Recorder() as backward:
        loss.backward()
    adapted, fixed, wanted = hidden.detach().requires_grad_(), weight.detach(), hidden.grad.clone()
    with Recorder() as frozen:  # as beside adapters: no gradient of the weight, the same one of what comes before it
        ChunkedCrossEntropy.apply(adapted, fixed, targets, True).backward()
    with Recorder() as control:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    assert forward.calls["mm"] == 3 * 5 and backward.calls["mm"] == 0  # five chunks: logits and two gradients, each once
    assert frozen.calls["mm"] == 2 * 5 and frozen.calls["zeros_like"] == 0 < forward.calls["zeros_like"] and torch.equal(adapted.grad, wanted)
    assert forward.largest == backward.largest == 500 * 16 < 500 * 48 == control.largest  # the gradient of weight
    llama, tokens = build(), batch()
    with torch.no_grad(), Recorder() as without:
        value = llama(tokens, tokens)[1]
    with Recorder() as control:
        assert llama(tokens, tokens)[1] == value and not value.requires_grad
    assert control.calls["mm"] - without.calls["mm"] == 2 * 5
    assert control.calls["scatter_add_"] == 5 and without.calls["scatter_add_"] == without.calls["zeros_like"] == 0


def test_a_loss_scale_that_fp16_needs_is_lost():
    llama, tokens = build(), batch()
    targets, small = targets_of(tokens), 2.0 ** -24  # a loss so small that its gradients vanish in fp16
    def half(scale, loss=lambda *args: llama(*args)[1]):
        with torch.autocast("cpu", torch.float16):
            value = loss(tokens, targets) * small
        return {name: grad / scale for name, grad in gradients(llama, value * scale).items()}
    exact = gradients(llama, plain_loss(llama, tokens, targets) * small)
    assert relative_gap(half(2.0 ** 24), exact) < 0.02
    assert relative_gap(half(2.0 ** 24), half(2.0 ** 24, lambda *args: plain_loss(llama, *args))) < 0.02
    assert relative_gap(half(1.0), exact) > 0.5  # control: unscaled


@pytest.mark.slow
def test_compiled_blocks_with_other_names_or_another_loss():
    llama, tokens = build(n_layers=1), batch()
    names, before = list(llama.state_dict()), llama(tokens, tokens)[1]
    expected = gradients(llama, before)
    for block in llama.model.layers:
        block.compile()
    after = llama(tokens, tokens)[1]
    assert list(llama.state_dict()) == names != list(torch.compile(llama).state_dict())  # control: _orig_mod. before each
    assert after.item() == pytest.approx(before.item(), rel=1e-5)
    assert relative_gap(gradients(llama, after), expected) < 1e-4
    llama.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)  # control: the compiled block reads the weights of now
    assert llama(tokens, tokens)[1].item() != pytest.approx(before.item(), rel=1e-5)
