"""support/fast.py: what computes the same, faster, does compute the same; and what does not is not
used. (Edits of model.py, in whole runs: test_edits.py.)"""
import contextlib
import copy
import functools
import io
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from model import PRESETS, Llama, ModelConfig
from support import fast
from support.runs import UserError
from test_model import (SMALL, attention_by_hand, batch, build, gap, gradients,  # noqa: F401
                        one_thread_and_one_seed, relative_gap, targets_with_gaps)

FP32 = torch.autocast("cpu", enabled=False)
BF16 = torch.autocast("cpu", dtype=torch.bfloat16)
FP16 = torch.autocast("cpu", dtype=torch.float16)


def chosen(llama=None, autocast=FP32, compiled=False, B=4, T=16):
    """(parts in use, remarks that are printed) after fast.use_what_agrees."""
    llama = llama or Llama(SMALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        parts = fast.use_what_agrees(llama, B, T, autocast, compiled)
    first, *remarks = printed.getvalue().splitlines()[compiled:]
    assert first == f"fast    {', '.join(parts) or 'nothing: all is computed as in model.py'}"
    return parts, [remark.removeprefix(8 * " ") for remark in remarks]


# -------------------------------------------------------------------------------------------------
# Attention

def output_and_gradients(attention, *inputs):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    y = attention(*inputs)
    y.square().sum().backward()
    return [y, *[tensor.grad for tensor in inputs]]


@pytest.mark.parametrize("short", [0, 512], ids=["fused", "folded"])
@pytest.mark.parametrize("T", [12, 2, 1], ids=["all new", "two behind a cache", "one behind it"])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_fast_attention_equals_the_formula(T, n_kv_heads, short, monkeypatch):
    """Catches: is_causal behind a cache, where it hides the past; query heads with another key
    head."""
    monkeypatch.setattr(fast, "SHORT", short)
    S = 12
    q = torch.randn(2, 4, T, 16)
    k = torch.randn(2, n_kv_heads, S, 16)
    v = torch.randn(2, n_kv_heads, S, 16)
    mask = model.causal_mask(S)[S - T:]
    formula = output_and_gradients(functools.partial(model.attention, mask=mask), q, k, v)
    for is_causal in (True, False):
        attend = functools.partial(fast.fast_attention, mask=mask, is_causal=is_causal)
        for ours, expected in zip(output_and_gradients(attend, q, k, v), formula):
            assert gap(ours, expected) < 1e-5
    assert gap(formula[0], attention_by_hand(q, k, v)) < 1e-5
    # control: no mask where all tokens are new, is_causal behind a cache
    wrong = F.scaled_dot_product_attention(q, k, v, is_causal=T < S, enable_gqa=True)
    assert gap(formula[0], wrong) > 1e-2


@pytest.mark.parametrize("T", [12, 2, 1])
@pytest.mark.parametrize("short", [0, 512], ids=["fused", "folded"])
def test_another_mask_is_obeyed(T, short, monkeypatch):
    """Catches: a kernel that takes every mask for the causal one."""
    monkeypatch.setattr(fast, "SHORT", short)
    q, k, v = (torch.randn(2, 4, n, 16) for n in (T, 12, 12))
    window = torch.full((12, 12), -torch.inf).tril(-3)
    mask = (model.causal_mask(12) + window)[12 - T:]
    expected = model.attention(q, k, v, mask)
    assert gap(fast.fast_attention(q, k, v, mask, is_causal=False), expected) < 1e-5
    if short == 0:  # control
        assert T == 2 or gap(fast.fast_attention(q, k, v, mask, is_causal=True), expected) > 1e-2


# -------------------------------------------------------------------------------------------------
# The loss in chunks. Its numbers are tested in test_model.py.

class Recorder(TorchDispatchMode):
    """Counts the operations, and keeps the size of the largest tensor that any of them returned."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.calls[operation.overloadpacket.__name__] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return result


ROWS = 480


@pytest.fixture(params=["by hand", "by autograd"])
def head(request, monkeypatch):
    """A network whose loss comes in 5 chunks of 96 rows, hidden states and targets of ROWS rows.

    The 49,152 logits of a chunk are then more than the 32,768 numbers of the weight's gradient."""
    monkeypatch.setattr(fast, "CHUNK", 96)
    if request.param == "by autograd":
        monkeypatch.setattr(fast, "has_known_loss", lambda llama: False)
    llama = fast.use(build(vocab_size=512), ["loss"])
    return llama, torch.randn(ROWS, 64, requires_grad=True), batch(1, ROWS)[0]


def test_loss_never_holds_all_logits(head):
    """Catches: logits of all rows, or their gradient, which fill the memory of a GPU."""
    llama, hidden, targets = head
    with Recorder() as recorder:
        llama.loss(hidden, targets).backward()
    with Recorder() as control:
        Llama.loss(llama, hidden, targets).backward()
    assert recorder.largest == 96 * 512
    assert control.largest == ROWS * 512


def test_chunks_fit_the_papers_model():
    """Catches: a chunk that is too large for a GPU."""
    vocabulary = PRESETS["1.7b"].padded_vocab_size
    assert fast.CHUNK * vocabulary * 4 < 0.5e9  # bytes in fp32
    assert 32 * 1024 * vocabulary * 4 > 6e9     # control: all logits of a micro-batch at once


def test_logits_are_computed_once(head):
    """Catches: logits computed again in the backward, a quarter of the head's time."""
    llama, hidden, targets = head
    with Recorder() as forward:
        loss = llama.loss(hidden, targets)
    with Recorder() as backward:
        loss.backward()
    assert forward.calls["mm"] == 5 * 3  # logits and two gradients
    assert backward.calls["mm"] == 0


def test_frozen_head_gets_no_gradient(head):
    """Catches: the largest gradient of all computed beside LoRA's adapters, which do not use it."""
    llama, hidden, targets = head
    llama.loss(hidden, targets).backward()
    expected = hidden.grad
    hidden.grad = None
    llama.requires_grad_(False)
    with Recorder() as recorder:
        llama.loss(hidden, targets).backward()
    assert recorder.calls["mm"] == 5 * 2  # logits and the gradient of hidden
    assert torch.equal(hidden.grad, expected)


def test_loss_makes_no_gradients_under_no_grad(head):
    """Catches: an evaluation that computes gradients: three times the work."""
    llama, hidden, targets = head
    expected = llama.loss(hidden, targets)
    with torch.no_grad(), Recorder() as recorder:
        loss = llama.loss(hidden, targets)
    assert recorder.calls["mm"] == 5  # the logits
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not loss.requires_grad
    assert expected.requires_grad  # control


def test_loss_trains_what_a_reader_adds_to_it(monkeypatch):
    """Catches: a parameter in `logits` whose gradient the chunks forget."""
    class Scaled(Llama):
        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(()))

        def logits(self, hidden):
            return self.scale * super().logits(hidden)

    monkeypatch.setattr(fast, "CHUNK", 7)
    llama = Scaled(SMALL)
    expected = gradients(llama, llama(batch(), batch(seed=2))[1])
    ours = fast.use(copy.deepcopy(llama), ["loss"])
    assert relative_gap(gradients(ours, ours(batch(), batch(seed=2))[1]), expected) < 1e-5
    assert expected["scale"] != 0  # control
    assert fast.names_used_by_loss(llama) == ["scale", "lm_head.weight"]


# -------------------------------------------------------------------------------------------------
# The text

def test_unedited_text_uses_every_part():
    """Catches: hashes that no text has, so that everything is slow and nobody notices."""
    found = {"attention": fast.hash_of(model.attention),
             "causal_mask": fast.hash_of(model.causal_mask),
             "logits": fast.hash_of(Llama.logits), "loss": fast.hash_of(Llama.loss)}
    assert found == fast.KNOWN
    llama = Llama(SMALL)
    assert fast.has_causal_mask(llama)
    assert fast.has_known_loss(llama)
    assert chosen(llama) == (["attention", "loss"], [])


def test_comments_and_layout_are_not_text():
    """Catches: a comment that makes a run slow; an edit that is taken for a comment."""
    plain = 'def f(x):\n    """Doc."""\n    return x + 1\n'
    same = 'def f(x):\n    """Other."""\n    # a comment\n\n    return (x +\n     1)  # one\n'
    assert fast.hash_of(plain) == fast.hash_of(same)
    assert fast.hash_of(plain) != fast.hash_of(plain.replace("1", "2"))  # control
    assert fast.text_of("def f(") == ""


MASKS = {
    "added": "mask = causal_mask(end, tokens.device)[past:] + window",
    "changed in place": "mask = causal_mask(end, tokens.device)[past:]\n    mask[:, :4] = 0",
    "of another function": "mask = other_mask(end, tokens.device)[past:]",
    "per layer": "mask = causal_mask(end, tokens.device)[past:]\n    "
                 "masks = [mask, mask + window]",
}


@pytest.mark.parametrize("edit", MASKS.values(), ids=MASKS)
def test_every_use_of_a_mask_is_seen(edit):
    """Catches: an edit of the mask behind which the kernels still take it for the causal one."""
    text = "def forward(self, tokens):\n    {}\n    for block in self.layers:\n        block(mask)"
    plain = "mask = causal_mask(end, tokens.device)[past:]"
    expected = fast.USES_OF_MASK["Decoder"]
    assert sorted(fast.uses_of_mask(text.format(plain))) == sorted(expected)  # control
    assert sorted(fast.uses_of_mask(text.format(edit))) != sorted(expected)


# -------------------------------------------------------------------------------------------------
# The comparison before a run

@pytest.mark.parametrize("autocast", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("sizes", [{}, {"n_kv_heads": 4}, {"tie_embeddings": True},
                                   {"vocab_size": 2000, "dim": 128}], ids=str)
def test_all_parts_agree(autocast, sizes):
    """Catches: a comparison that fails where nothing is wrong."""
    config = ModelConfig(**{**vars(SMALL), "padded_vocab_size": None, **sizes})
    for B, T in ((4, 16), (1, 32), (80, 16)):  # the last has two chunks
        assert chosen(Llama(config), autocast, B=B, T=T) == (["attention", "loss"], [])


def ignores_the_mask(q, k, v, mask, is_causal):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def returns_nan(q, k, v, mask, is_causal):
    return model.attention(q, k, v, mask) * torch.nan


def is_rounded(q, k, v, mask, is_causal):
    return model.attention(q, k, v, mask).to(torch.float8_e5m2).to(v.dtype)


IN_CHUNKS = fast.LossInChunks.forward


class WithoutLastChunk(fast.LossInChunks):
    @staticmethod
    def forward(ctx, gradients_of, hidden, targets, *weights):
        targets = targets.clone()
        targets[fast.CHUNK:] = fast.IGNORE
        return IN_CHUNKS(ctx, gradients_of, hidden, targets, *weights)


WRONG = {"mask": ("fast_attention", ignores_the_mask), "NaN": ("fast_attention", returns_nan),
         "rounded": ("fast_attention", is_rounded), "chunk": ("LossInChunks", WithoutLastChunk)}


@pytest.mark.parametrize("autocast", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name, wrong", WRONG.values(), ids=WRONG)
def test_wrong_part_is_found_and_replaced(name, wrong, autocast, monkeypatch):
    """Catches: a comparison that any kernel passes; a wrong part that is used all the same."""
    monkeypatch.setattr(fast, name, wrong)
    monkeypatch.setattr(fast, "CHUNK", 24)
    part, other = ("loss", "attention") if name == "LossInChunks" else ("attention", "loss")
    llama = build()
    text = copy.deepcopy(llama)
    parts, remarks = chosen(llama, autocast)
    assert parts == [other]
    assert len(remarks) == 1
    assert remarks[0].startswith(f"{part}: computed as written; the fast way differs: ")
    _, loss = llama(batch(), batch(seed=2))
    _, expected = text(batch(), batch(seed=2))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    wrong_one = fast.use(copy.deepcopy(text), [part])  # control
    assert wrong_one(batch(), batch(seed=2))[1].item() != pytest.approx(expected.item(), rel=1e-6)


def test_wrong_part_on_a_gpu_is_an_error(monkeypatch):
    """Catches: days of a training several times slower, after one line among many."""
    monkeypatch.setattr(fast, "fast_attention", returns_nan)
    layer = fast.Layer(Llama(SMALL), 4, 16, FP32, recompute=False)
    assert fast.choose(layer.network, layer, compiled=False)[0] == ["loss"]  # control: a CPU
    layer.device = torch.device("cuda")
    monkeypatch.setattr(fast.Layer, "disagreement", lambda layer, parts: "differs")
    with pytest.raises(UserError, match="--no-fast"):
        fast.choose(layer.network, layer, compiled=False)


def test_loss_that_is_no_sum_is_not_cut(monkeypatch):
    """Catches: a mean, in the loss or in a small term of it, that chunks turn into a sum of
    means."""
    class Mean(Llama):
        def loss(self, hidden, targets):
            logits = self.logits(hidden)
            regularizer = logits.logsumexp(-1).square().mean()
            return F.cross_entropy(logits, targets, reduction="sum") + 1e-4 * regularizer

    class Sum(Llama):
        def loss(self, hidden, targets):
            logits = self.logits(hidden)
            regularizer = logits.logsumexp(-1).square().sum()
            return F.cross_entropy(logits, targets, reduction="sum") + 1e-4 * regularizer

    for kind, parts in ((Mean, ["attention"]), (Sum, ["attention", "loss"])):
        found, remarks = chosen(kind(SMALL), BF16)
        assert found == parts
        assert len(remarks) == 1
        assert remarks[0].startswith("loss: model.py was edited here")


def test_comparison_draws_no_random_numbers():
    """Catches: a run whose initial weights, or dropout, depend on --no-fast."""
    llama = Llama(SMALL)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    chosen(llama)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(torch.rand(3), expected)  # control


def test_formula_of_one_layer_is_used():
    """Catches: a formula that somebody gave to a single layer, and that a kernel replaces."""
    def doubled(q, k, v, mask):
        return 2 * model.attention(q, k, v, mask)

    llama = build()
    expected, _ = llama(batch())
    llama.model.layers[1].self_attn.attend = doubled
    parts, remarks = chosen(llama)
    assert parts == ["loss"]
    assert remarks[0].startswith("attention: model.py was edited here")
    assert gap(llama(batch())[0], expected) > 1e-2


def test_loss_may_use_the_weights_of_all_layers(monkeypatch):
    """Catches: gradients of the second layer that are lost, because one layer was compared."""
    class Decaying(Llama):
        def loss(self, hidden, targets):
            squares = sum(p.square().sum() for p in self.model.layers.parameters())
            return super().loss(hidden, targets) + 0.1 * len(targets) * squares

    monkeypatch.setattr(fast, "CHUNK", 7)
    llama = Decaying(SMALL)
    expected = gradients(llama, llama(batch(), batch(seed=2))[1])
    assert chosen(llama)[0] == ["attention", "loss"]
    assert relative_gap(gradients(llama, llama(batch(), batch(seed=2))[1]), expected) < 1e-5


def test_formula_that_is_called_directly_is_told():
    """Catches: a list of parts with one that is not used."""
    class Direct(model.Attention):
        def forward(self, x, cos, sin, mask, cache=None):
            return self.o_proj(self.q_proj(x))

    llama = build()
    llama.model.layers[1].self_attn.__class__ = Direct
    assert chosen(llama)[0] == ["loss"]


def test_wrapped_formula_and_hooks_are_seen():
    """Catches: a change around a text that is itself unedited."""
    llama = build()
    llama.lm_head.register_forward_hook(lambda module, inputs, logits: logits / 2)
    parts, (remark,) = chosen(llama)
    assert parts == ["attention", "loss"]
    assert remark.startswith("loss: model.py was edited here, so autograd")

    @functools.wraps(model.attention)
    def doubled(*inputs):
        return 2 * model.attention(*inputs)

    llama = build()
    assert chosen(copy.deepcopy(llama)) == (["attention", "loss"], [])  # control
    for block in llama.model.layers:
        block.self_attn.attend = doubled
    assert chosen(llama)[0] == ["loss"]


def test_network_of_another_kind_runs_as_it_is_written():
    """Catches: a run that ends in a traceback because one layer alone makes no sense."""
    class NeedsTwo(Llama):
        def __init__(self, config):
            super().__init__(config)
            self.second = [self.model.layers[1]]

    parts, (remark,) = chosen(NeedsTwo(SMALL))
    assert parts == []
    assert "it does not know this network" in remark


def test_copy_of_a_network_has_a_loss_of_its_own(monkeypatch):
    """Catches: an average of weights, or a second network, whose loss is that of the first."""
    for is_known in (True, False):
        monkeypatch.setattr(fast, "has_known_loss", lambda llama: is_known)
        llama = fast.use(build(), ["loss"])
        other = copy.deepcopy(llama)
        expected = llama(batch(), batch(seed=2))[1].item()
        with torch.no_grad():
            other.lm_head.weight.mul_(0.5)
        assert llama(batch(), batch(seed=2))[1].item() == expected
        assert other(batch(), batch(seed=2))[1].item() < 0.95 * expected
        other(batch(), batch(seed=2))[1].backward()
        assert llama.lm_head.weight.grad is None
        assert other.lm_head.weight.grad is not None  # control


# -------------------------------------------------------------------------------------------------
# The compiler

@pytest.mark.slow
@pytest.mark.parametrize("by_autograd", [False, True])
@pytest.mark.parametrize("dtype, of_loss, of_gradients", [(torch.float32, 1e-5, 1e-4),
                                                          (torch.bfloat16, 2e-4, 3e-2)], ids=str)
def test_compiling_changes_nothing(dtype, of_loss, of_gradients, by_autograd, monkeypatch):
    """Catches: names with _orig_mod. in a checkpoint, weights compiled as constants, a fused loss
    that counts −100."""
    if by_autograd:
        monkeypatch.setattr(fast, "has_known_loss", lambda llama: False)
    llama = build(n_layers=1)
    tokens = batch()
    targets = targets_with_gaps()
    names = list(llama.state_dict())

    def loss_and_gradients():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            _, loss = llama(tokens, targets)
        return loss.item(), gradients(llama, loss)

    loss, expected = loss_and_gradients()
    fast.use(llama, fast.PARTS)
    compiled, ours = loss_and_gradients()
    assert compiled == pytest.approx(loss, rel=of_loss)
    assert relative_gap(ours, expected) < of_gradients
    assert list(llama.state_dict()) == names
    assert list(torch.compile(llama).state_dict()) != names  # control: the whole model compiled
    with torch.compiler.set_stance("force_eager"):
        assert loss_and_gradients()[0] == pytest.approx(loss, rel=of_loss)
    llama.model.layers[0].mlp.up_proj.weight.data.mul_(40)
    changed, _ = loss_and_gradients()
    assert changed != pytest.approx(loss, rel=of_loss)  # control: another weight


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_is_compiled_twice(monkeypatch, recompute):
    """Catches: blocks or a loss that are compiled for the comparison, and again for the run."""
    monkeypatch.setattr(fast, "can_compile", lambda device: True)  # it compiles a function
    torch._dynamo.reset()
    counters.clear()
    llama = Llama(SMALL)
    if recompute:
        fast.checkpoint_activations(llama)
    parts = fast.use_what_agrees(llama, 4, 16, BF16, compiled=True, recompute=recompute)
    assert parts == list(fast.PARTS)
    before = counters["stats"]["unique_graphs"]
    assert before == 2  # one for blocks, one for the loss
    tokens = torch.randint(100, (4, 17))
    for _ in range(2):
        with BF16:
            llama(tokens[:, :-1], tokens[:, 1:])[1].backward()
    assert counters["stats"]["unique_graphs"] == before
    with BF16:  # control: another shape
        llama(tokens[:2, :-1], tokens[:2, 1:])[1].backward()
    assert counters["stats"]["unique_graphs"] > before


@pytest.mark.slow
def test_block_that_is_compiled_to_something_else_is_found(monkeypatch):
    """Catches: a compiler that computes nonsense on some machine."""
    def wrong_compile(block):
        forward = block.forward
        block.forward = lambda *args: forward(*args) + 1e-2
    monkeypatch.setattr(model.Block, "compile", wrong_compile)
    for autocast in (FP32, BF16):
        parts, remarks = chosen(autocast=autocast, compiled=True)
        assert parts == ["attention", "loss"]
        assert remarks[0].startswith("blocks: computed as written; the fast way differs: ")


class Dropping(model.SwiGLU):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


def test_block_with_dropout_is_not_compiled(monkeypatch):
    """Catches: random numbers that the compiler draws otherwise, so that nothing can be compared;
    dropout that makes attention and loss look wrong."""
    monkeypatch.setattr(model, "SwiGLU", Dropping)
    assert chosen() == (["attention", "loss"], [])
    parts, remarks = chosen(compiled=True)
    assert parts == ["attention", "loss"]
    assert remarks == ["blocks: two forwards of one differ (dropout?), so they are not compiled"]
