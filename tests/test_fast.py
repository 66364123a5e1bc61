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
from model import Llama
from support import fast
from support.runs import UserError
from test_model import (  # noqa: F401
    SMALL,
    batch,
    build,
    gap,
    gradients,
    one_thread_and_one_seed,
    relative_gap,
    targets_with_gaps,
)

FP32 = torch.autocast("cpu", enabled=False)
BF16 = torch.autocast("cpu", dtype=torch.bfloat16)
FP16 = torch.autocast("cpu", dtype=torch.float16)


def chosen(llama=None, autocast=FP32, compiled=False, B=4):
    """(parts in use, remarks that are printed) after fast.use_what_agrees."""
    llama = llama or Llama(SMALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        parts = fast.use_what_agrees(llama, B, 16, autocast, compiled)
    first, *remarks = printed.getvalue().splitlines()[compiled:]
    assert first == f"fast    {', '.join(parts) or 'nothing: all is computed as in model.py'}"
    return parts, [remark.removeprefix(8 * " ") for remark in remarks]


# -------------------------------------------------------------------------------------------------
# Attention

@pytest.mark.parametrize("short", [0, 512], ids=["fused", "folded"])
@pytest.mark.parametrize("T", [12, 2, 1], ids=["all new", "two behind a cache", "one behind it"])
def test_fast_attention_equals_the_formula(T, short, monkeypatch):
    """Catches: is_causal behind a cache, where it hides the past; query heads with another key
    head; a kernel that takes every mask for the causal one."""
    monkeypatch.setattr(fast, "SHORT", short)
    q = torch.randn(2, 4, T, 16)
    k = torch.randn(2, 2, 12, 16)
    v = torch.randn(2, 2, 12, 16)
    causal = model.causal_mask(12)
    window = causal + torch.full((12, 12), -torch.inf).tril(-3)
    for mask, is_causal in ((causal, True), (window, False)):
        mask = mask[12 - T:]
        expected = model.attention(q, k, v, mask)
        assert gap(fast.fast_attention(q, k, v, mask, is_causal), expected) < 1e-5
        # control: no mask where all tokens are new, is_causal behind a cache
        wrong = F.scaled_dot_product_attention(q, k, v, is_causal=T < 12, enable_gqa=True)
        assert gap(expected, wrong) > 1e-2


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


@pytest.fixture
def head(monkeypatch):
    """A network whose loss comes in 5 chunks of 96 rows, hidden states and targets of ROWS rows.

    The 49,152 logits of a chunk are then more than the 32,768 numbers of the weight's gradient."""
    monkeypatch.setattr(fast, "CHUNK", 96)
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


def test_loss_computes_no_more_than_it_needs(head):
    """Catches: logits computed again in the backward; gradients in an evaluation, or of the output
    layer beside LoRA's adapters, which do not use it; another loss or gradient without them."""
    llama, hidden, targets = head
    with Recorder() as training:
        loss = llama.loss(hidden, targets)
        loss.backward()
    expected = hidden.grad.clone()
    hidden.grad.zero_()
    llama.requires_grad_(False)
    with Recorder() as frozen:
        llama.loss(hidden, targets).backward()
    with torch.no_grad(), Recorder() as evaluation:
        assert llama.loss(hidden, targets).item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.equal(hidden.grad, expected)
    assert training.calls["mm"] == 5 * 3  # logits, gradient of hidden, gradient of the weight
    assert frozen.calls["mm"] == 5 * 2
    assert evaluation.calls["mm"] == 1


def test_loss_trains_what_a_reader_adds_to_it(monkeypatch):
    """Catches: gradients that the chunks forget, of what is not the output layer, or of a layer
    that was not compared."""
    class Decaying(Llama):
        def loss(self, hidden, targets):
            squares = sum(p.square().sum() for p in self.model.layers.parameters())
            return super().loss(hidden, targets) + 0.1 * len(targets) * squares

    monkeypatch.setattr(fast, "CHUNK", 7)
    llama = Decaying(SMALL)
    expected = gradients(llama, llama(batch(), batch(seed=2))[1])
    assert chosen(llama)[0] == ["attention", "loss"]
    assert relative_gap(gradients(llama, llama(batch(), batch(seed=2))[1]), expected) < 1e-5
    plain = Llama(SMALL)
    plain.load_state_dict(llama.state_dict())
    found = gradients(plain, plain(batch(), batch(seed=2))[1])
    assert relative_gap(found, expected) > 1e-2  # control


# -------------------------------------------------------------------------------------------------
# The text

def test_unedited_text_uses_every_part():
    """Catches: hashes that no text has, so that everything is slow and nobody notices."""
    for name in ("attention", "causal_mask"):
        assert fast.hash_of(getattr(model, name)) == fast.KNOWN[name]


def test_kernels_read_an_edited_mask(monkeypatch):
    """Catches: a kernel that takes a mask for the causal one without looking. (In short windows on
    a CPU no kernel is used that could.)"""
    def window_of_four(size, device=None):
        return torch.full((size, size), -torch.inf).tril(-4) + causal(size, device)

    causal = model.causal_mask
    monkeypatch.setattr(fast, "SHORT", 0)
    for mask in (causal, window_of_four):
        monkeypatch.setattr(model, "causal_mask", mask)
        plain = build()
        expected = plain(batch())[0]
        assert gap(fast.use(plain, ["attention"])(batch())[0], expected) < 1e-5
    is_blind = functools.partial(fast.fast_attention, is_causal=True)  # control
    for block in plain.model.layers:
        block.self_attn.attend = is_blind
    assert gap(plain(batch())[0], expected) > 1e-3


def test_comments_and_layout_are_not_text():
    """Catches: a comment that makes a run slow; an edit that is taken for a comment."""
    plain = 'def f(x):\n    """Doc."""\n    return x + 1\n'
    same = 'def f(x):\n    """Other."""\n    # a comment\n\n    return (x +\n     1)  # one\n'
    assert fast.hash_of(plain) == fast.hash_of(same)
    assert fast.hash_of(plain) != fast.hash_of(plain.replace("1", "2"))  # control


def test_every_use_of_a_mask_is_seen():
    """Catches: an edit of the mask behind which the kernels still take it for the causal one."""
    text = "def forward(self, tokens):\n    {}\n    for block in self.layers:\n        block(mask)"
    plain = "mask = causal_mask(end, tokens.device)[past:]"
    expected = sorted(fast.USES_OF_MASK["Decoder"])
    assert sorted(fast.uses_of_mask(text.format(plain))) == expected  # control
    for edit in (f"{plain} + window", f"{plain}\n    mask[:, :4] = 0",
                 plain.replace("causal", "other"), f"{plain}\n    masks = [mask, mask + window]"):
        assert sorted(fast.uses_of_mask(text.format(edit))) != expected


# -------------------------------------------------------------------------------------------------
# The comparison before a run

@pytest.mark.parametrize("autocast", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_all_parts_agree(autocast):
    """Catches: a comparison that fails where nothing is wrong."""
    for B in (4, 80):  # the second has two chunks
        for llama in (build(), build(n_kv_heads=4, tie_embeddings=True, vocab_size=500)):
            assert chosen(llama, autocast, B=B) == (["attention", "loss"], [])


def returns_nan(q, k, v, mask, is_causal):
    return model.attention(q, k, v, mask) * torch.nan


def is_rounded(q, k, v, mask, is_causal):
    return model.attention(q, k, v, mask).to(torch.float8_e5m2).to(v.dtype)


use = fast.use


def use_one_chunk(network, parts, *others):
    """A mistake: the loss of the first 24 rows in the place of all."""
    use(network, parts, *others)
    if "loss" in parts:
        loss = network.loss
        network.loss = lambda hidden, targets: loss(hidden[:24], targets[:24])
    return network


WRONG = {"NaN": ("attention", "fast_attention", returns_nan),
         "rounded": ("attention", "fast_attention", is_rounded),
         "chunk": ("loss", "use", use_one_chunk)}


@pytest.mark.parametrize("autocast", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("part, name, wrong", WRONG.values(), ids=WRONG)
def test_wrong_part_is_found_and_replaced(part, name, wrong, autocast, monkeypatch):
    """Catches: a comparison that any kernel passes; a wrong part that is used all the same."""
    monkeypatch.setattr(fast, name, wrong)
    monkeypatch.setattr(fast, "CHUNK", 24)
    llama = build()
    text = copy.deepcopy(llama)
    parts, (remark,) = chosen(llama, autocast)
    assert sorted([*parts, part]) == ["attention", "loss"]
    assert remark.startswith(f"{part}: computed as written; the fast way differs: ")
    expected = text(batch(), batch(seed=2))[1].item()
    assert llama(batch(), batch(seed=2))[1].item() == pytest.approx(expected, rel=1e-6)
    fast.use(text, [part])  # control
    assert text(batch(), batch(seed=2))[1].item() != pytest.approx(expected, rel=1e-6)


def test_wrong_part_on_a_gpu_is_an_error(monkeypatch):
    """Catches: days of a training several times slower, after one line among many."""
    monkeypatch.setattr(fast.Layer, "disagreement", lambda layer, parts: "differs")
    layer = fast.Layer(Llama(SMALL), 4, 16, FP32, recompute=False)
    assert fast.choose(layer.network, layer, compiled=False)[0] == []  # control: a CPU
    layer.device = torch.device("cuda")
    with pytest.raises(UserError, match="--no-fast"):
        fast.choose(layer.network, layer, compiled=False)


@pytest.mark.parametrize("reduce, parts", [(torch.mean, ["attention"]),
                                           (torch.sum, ["attention", "loss"])])
def test_loss_that_is_no_sum_is_not_cut(reduce, parts):
    """Catches: a mean in a small term of the loss, which chunks turn into a sum of means."""
    class Regularized(Llama):
        def loss(self, hidden, targets):
            squares = self.logits(hidden).logsumexp(-1).square()
            return super().loss(hidden, targets) + 1e-4 * reduce(squares)

    found, remarks = chosen(Regularized(SMALL), BF16)
    assert found == parts
    assert "loss" in parts or remarks[0].startswith("loss: model.py was edited here")


def test_comparison_draws_no_random_numbers():
    """Catches: a run whose initial weights, or dropout, depend on --no-fast."""
    llama = Llama(SMALL)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    chosen(llama)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(torch.rand(3), expected)  # control


def doubled(q, k, v, mask):
    return 2 * model.attention(q, k, v, mask)


@functools.wraps(model.attention)
def wrapping(*inputs):
    return 2 * model.attention(*inputs)


class Direct(model.Attention):
    def forward(self, x, cos, sin, mask, cache=None):
        return self.o_proj(self.q_proj(x))


@pytest.mark.parametrize("name, edit", [("attend", doubled), ("attend", wrapping),
                                        ("__class__", Direct)])
def test_formula_of_one_layer_is_used(name, edit):
    """Catches: a formula that somebody gave to a single layer, or put around the unedited one, and
    that a kernel replaces; one that is called directly and told as fast."""
    llama = build()
    expected, _ = llama(batch())
    setattr(llama.model.layers[1].self_attn, name, edit)
    parts, (remark,) = chosen(llama)
    assert parts == ["loss"]
    assert remark.startswith("attention: model.py was edited here")
    assert gap(llama(batch())[0], expected) > 1e-2


def test_network_of_another_kind_runs_as_it_is_written():
    """Catches: a run that ends in a traceback because one layer alone makes no sense."""
    class NeedsTwo(Llama):
        def __init__(self, config):
            super().__init__(config)
            self.second = [self.model.layers[1]]

    parts, (remark,) = chosen(NeedsTwo(SMALL))
    assert parts == []
    assert "it does not know this network" in remark


def test_copy_of_a_network_has_a_loss_of_its_own():
    """Catches: an average of weights, or a second network, whose loss is that of the first."""
    llama = fast.use(build(), ["loss"])
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    expected = llama(batch(), batch(seed=2))[1].item()
    loss = other(batch(), batch(seed=2))[1]
    assert loss.item() < 0.95 * expected
    loss.backward()
    assert llama.lm_head.weight.grad is None
    assert other.lm_head.weight.grad is not None  # control


# -------------------------------------------------------------------------------------------------
# The compiler

@pytest.mark.slow
def test_compiling_changes_nothing():
    """Catches: names with _orig_mod. in a checkpoint, weights compiled as constants, a fused loss
    that counts −100."""
    llama = build(n_layers=1)
    tokens = batch()
    targets = targets_with_gaps()
    names = list(llama.state_dict())
    _, loss = llama(tokens, targets)
    expected = gradients(llama, loss)
    fast.use(llama, fast.PARTS)
    _, compiled = llama(tokens, targets)
    assert compiled.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative_gap(gradients(llama, compiled), expected) < 1e-4
    assert list(llama.state_dict()) == names
    llama.model.layers[0].mlp.up_proj.weight.data.mul_(40)
    _, changed = llama(tokens, targets)
    assert changed.item() != pytest.approx(loss.item(), rel=1e-5)  # control: another weight


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
    assert before >= 2  # for blocks and for the loss
    tokens = torch.randint(100, (4, 17))
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
    parts, remarks = chosen(autocast=BF16, compiled=True)
    assert parts == ["attention", "loss"]
    assert remarks[0].startswith("blocks: computed as written; the fast way differs: ")


class Dropping(model.SwiGLU):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


def test_block_with_dropout_is_not_compiled(monkeypatch):
    """Catches: random numbers that the compiler draws otherwise, so that nothing can be compared;
    dropout that makes attention and loss look wrong."""
    monkeypatch.setattr(model, "SwiGLU", Dropping)
    monkeypatch.setattr(fast, "can_compile", lambda device: True)  # it compiles a function
    assert chosen() == (["attention", "loss"], [])
    parts, remarks = chosen(compiled=True)
    assert parts == ["attention", "loss"]
    assert remarks == ["blocks: two forwards of one differ (dropout?), so they are not compiled"]
