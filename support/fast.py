"""fast.py — the same numbers as model.py, in less time and memory.

model.py is the specification. Three parts of it may be computed otherwise:

    attention   by PyTorch's fused kernels, or, in short windows on a CPU, in fewer operations
    loss        of some rows at a time, so that the logits are never all in memory
    blocks      compiled, and the loss with them

Your edits of model.py win. Loss and blocks are computed from its text. `attention` has a twin here,
which knows the hash of the text that it stands for: if you edit that, yours runs. For machines
there is a second check: before a run each part computes one layer, and must agree with the text up
to rounding (`choose`). If it does not, a CPU computes as it is written, and says so; on a GPU,
where that may be several times slower, it is an error. `--no-fast` computes everything as it is
written.
"""
import ast
import contextlib
import copy
import functools
import hashlib
import inspect
import math
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from support.devices import any_process, can_compile, say
from support.memory import checkpoint_activations
from support.runs import UserError, first_line_of, is_out_of_memory

PARTS = ("attention", "loss", "blocks")


# -------------------------------------------------------------------------------------------------
# Attention

SHORT = 512  # keys; on a CPU the folded form is faster up to here, the fused kernel from 1,024 on


def fast_attention(q, k, v, mask, is_causal):
    """`attention` of model.py. is_causal: whether `mask` is the causal one, for then a kernel need
    not read it and may leave out the half that it hides."""
    T = q.shape[2]
    S = k.shape[2]
    if q.device.type == "cpu" and S <= SHORT:
        return folded_attention(q, k, v, mask)
    attend = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
    if is_causal and T == S:  # no past
        return attend(is_causal=True)
    if is_causal and T == 1:  # a single new token sees everything
        return attend()
    # With a past, is_causal=True would take the first query for position 0, and hide the past.
    return attend(attn_mask=mask.type_as(q))


def folded_attention(q, k, v, mask):
    """The formula with the query heads of a group stacked, so that they meet their keys in one
    product and no key is copied."""
    B, n_heads, T, head_dim = q.shape
    _, n_kv_heads, S, _ = k.shape
    group = n_heads // n_kv_heads
    q = q.reshape(B * n_kv_heads, group * T, head_dim)
    k = k.reshape(B * n_kv_heads, S, head_dim)
    v = v.reshape(B * n_kv_heads, S, head_dim)
    mask = mask.repeat(group, 1).type_as(q)                    # (group · T, S)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(head_dim))
    weights = scores.softmax(-1)                               # (…, group · T, S)
    y = weights @ v                                            # (…, group · T, head_dim)
    return y.view(B, n_heads, T, head_dim)


# -------------------------------------------------------------------------------------------------
# Loss. At the paper's micro-batch, 32 · 1024 rows, the logits and their gradient are 13 GB in fp32,
# more than the whole network. But the gradient of a row's loss is known as soon as its logits are.
# So some rows at a time have their forward and their backward, and their logits are freed.

CHUNK = 1024  # rows; 1024 · 50,304 logits are 0.1 GB in bf16, and 0.2 GB in fp32


class LossInChunks(torch.autograd.Function):
    """The sum of a loss over rows. Autograd differentiates the loss of each chunk in the forward,
    as if the sum were used once and unscaled. What it is multiplied by afterwards (1 / targets of
    the step, the loss scale of fp16) arrives in the backward and multiplies the gradients there."""

    @staticmethod
    def forward(ctx, loss_of, hidden, targets, *weights):
        total = torch.zeros((), device=hidden.device)
        grads = [torch.empty_like(hidden), *[None] * len(weights)]
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            h = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_of(h, targets[rows])
            grads[0][rows], *found = torch.autograd.grad(loss, (h, *weights), allow_unused=True)
            total += loss.detach()
            for i, grad in enumerate(found, 1):
                if grads[i] is None:
                    grads[i] = grad
                elif grad is not None:
                    grads[i] += grad
            found = grad = None  # they may be large: free before the next logits
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx, grad_loss):
        # In place: a second copy of the output layer's gradient would be the largest of all.
        grads = [grad if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors]
        return None, grads[0], None, *grads[1:]


def loss_in_chunks(network, loss_of, hidden, targets):
    """What loss_of(hidden, targets) is, without all logits in memory. It may use any parameter of
    the network."""
    if not torch.is_grad_enabled():
        return loss_of(hidden, targets)
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return LossInChunks.apply(loss_of, hidden, targets, *weights)


def is_sum_over_rows(network):
    """Whether Llama.loss of some rows is the sum of the losses of its parts. In fp64, so that the
    smallest term that is something else, a mean say, is seen."""
    network = copy.deepcopy(network).double()
    parameter = next(network.parameters())
    hidden = torch.randn(8, network.config.dim, dtype=torch.float64).to(parameter.device)
    targets = torch.arange(8, device=parameter.device)
    try:
        with torch.no_grad(), InDouble():
            whole = network.loss(hidden, targets).item()
            parts = network.loss(hidden[:3], targets[:3]) + network.loss(hidden[3:], targets[3:])
            return abs(whole - parts.item()) <= 1e-6 * abs(whole)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # say, it wants 64 rows
        return False


class NoInit(TorchFunctionMode):
    """`with NoInit():` new layers keep whatever is in their memory. For a network whose weights
    all come from a file: random numbers for 1.7 billion of them take 40 seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None  # all of its functions work in place
        return function(*args, **(kwargs or {}))


class InDouble(TorchFunctionMode):
    """Within it `.float()`, by which model.py asks for precision, gives fp64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*args, **(kwargs or {}))


# -------------------------------------------------------------------------------------------------
# The text. A twin may stand for one text; comments, docstrings and layout do not count.

def text_of(code):
    """The source of a function or a class, or a source itself, without comments, docstrings and
    layout; "" if it cannot be read, or is not all of it: a function that wraps another one."""
    if hasattr(code, "__wrapped__"):
        return ""
    try:
        source = code if isinstance(code, str) else inspect.getsource(code)
        tree = ast.parse(textwrap.dedent(source))
    except (OSError, TypeError, SyntaxError):
        return ""
    for node in ast.walk(tree):
        has_body = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if has_body and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.unparse(tree)


def hash_of(code):
    """12 hexadecimal digits that tell one text from another."""
    text = text_of(code).replace("'", '"')  # which of the two is written depends on Python
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hashes(*names):
    """{name: hash} of files beside `support`: a resume says which of them has changed."""
    root = Path(__file__).parent.parent
    return {name: hash_of((root / name).read_text(encoding="utf-8")) for name in names}


# The texts that fast_attention stands for. (After a change that it shares, the test that fails
# shows the new hash.)
KNOWN = {"attention": "d61d2846c435", "causal_mask": "a50242de4f46"}
# What happens to the mask from Decoder to `attention`: it is made, and handed on.
USES_OF_MASK = {"Decoder": ["mask = causal_mask(end, tokens.device)[past:]", "block"],
                "Block": ["self.self_attn"],
                "Attention": ["self.attend"]}


def uses_of_mask(function):
    """Each use of `mask` in the text of a function: whom it is handed to, or else the expression or
    the statement."""
    uses = []
    for node in ast.walk(ast.parse(text_of(function))):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Name) and child.id == "mask":
                uses.append(ast.unparse(node.func if isinstance(node, ast.Call) else node))
    return uses


def has_known_attention(network):
    """Whether all layers compute `attention` as fast_attention does."""
    layers = [module for module in network.modules() if hasattr(module, "attend")]
    are_called = all("self.attend(" in text_of(type(layer).forward) for layer in layers)
    return are_called and {hash_of(layer.attend) for layer in layers} == {KNOWN["attention"]}


def has_causal_mask(network):
    """Whether all layers are given the causal mask, and no other."""
    decoder = type(network.model).forward
    found = {("Decoder", decoder)}
    for block in network.model.layers:
        found |= {("Block", type(block).forward), ("Attention", type(block.self_attn).forward)}
    is_handed_on = all(uses_of_mask(function) == USES_OF_MASK[name] for name, function in found)
    made_by = decoder.__globals__.get("causal_mask")
    return is_handed_on and hash_of(made_by) == KNOWN["causal_mask"]


# -------------------------------------------------------------------------------------------------
# To choose among the parts, and to use them

def use(network, parts):
    """Let a Llama compute with these parts, in place; returns it."""
    if "attention" in parts:
        attend = partial(fast_attention, is_causal=has_causal_mask(network))
        for module in network.modules():
            if hasattr(module, "attend"):
                module.attend = attend
    if "blocks" in parts:
        for block in network.model.layers:
            block.compile()  # in place: the state_dict keeps its names
    if "loss" in parts:
        loss = network.loss
        if "blocks" in parts and inspect.ismethod(loss):
            # Not the method itself: a copy.deepcopy of the network then has a loss of its own.
            loss = partial(torch.compile(loss.__func__, dynamic=False), network)
        network.loss = partial(loss_in_chunks, network, loss)
    return network


def use_what_agrees(network, B, T, autocast, compiled=False, recompute=False):
    """Use each part that agrees with the text of `network`, in place.

    B, T: sequences of a micro-batch, and their tokens. autocast: the precision of the training.
    compiled: whether to try blocks. recompute: whether they use activation checkpointing. Prints
    and returns the parts in use, and prints why the others are not. Random numbers that others draw
    stay the same. All processes must call it, and use the same parts afterwards. Raises UserError
    on a GPU if a part does not agree: there the text may take several times as long."""
    device = next(network.parameters()).device
    if compiled:
        compiled = not any_process(not can_compile(device), device)
    if compiled:
        say("compiling, which takes a while; --no-compile leaves it out")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            layer = Layer(network, B, T, autocast, recompute)
            chosen, remarks = choose(network, layer, compiled)
        except Exception as error:  # of an edited network, which may not be one of this kind
            if isinstance(error, UserError) or is_out_of_memory(error):
                raise
            chosen = []
            remarks = [f"it does not know this network ({first_line_of(error)})"]
    agreed = [part for part in PARTS if not any_process(part not in chosen, device)]
    remarks += [f"{part}: another process does not use it" for part in chosen if part not in agreed]
    use(network, agreed)
    say(f"fast    {', '.join(agreed) or 'nothing: all is computed as in model.py'}")
    for remark in remarks:
        say(f"        {remark}")
    return agreed


def choose(network, layer, compiled):
    """(names of the parts that agree with the text of a network, remarks). layer: a Layer of it."""
    remarks = []
    wanted = list(PARTS)
    if not has_known_attention(network):
        wanted.remove("attention")
        remarks.append("attention: model.py was edited here, so it is computed as written")
    if not is_sum_over_rows(layer.network):
        wanted.remove("loss")
        remarks.append("loss: model.py was edited here, and it is not a sum over rows any more, so "
                       "it is computed as written, from all logits at once")
    is_random = layer.is_random()
    layer.network.train(not is_random)  # else no two ways could be compared
    if compiled and is_random:
        remarks.append("blocks: two forwards of one differ (dropout?), so they are not compiled")
    if is_random or not compiled:
        wanted.remove("blocks")
    chosen = []
    for part in wanted:
        why = layer.disagreement([*chosen, part])
        if why is None:
            chosen.append(part)
            if part == "attention" and not has_causal_mask(network):
                remarks.append("attention: model.py was edited where it makes the mask, so the "
                               "kernels read yours, which is slower")
        elif layer.device.type == "cuda":
            raise UserError(f"support/fast.py cannot be used here: {part}, the fast way {why} — "
                            f"give --no-fast to compute as it is written, which is slower; if it "
                            f"is about blocks, --no-compile is enough")
        else:
            remarks.append(f"{part}: computed as written; the fast way {why}")
    return chosen, remarks


class Layer:
    """One layer of a network, between its embedding and its loss, with a batch: small enough to be
    computed in several ways beside the network, and of the same shapes, so that what is compiled
    for it is compiled for the network."""

    def __init__(self, network, B, T, autocast, recompute):
        self.device = next(network.parameters()).device
        self.autocast = autocast
        with autocast:
            is_lower = torch.is_autocast_enabled(self.device.type)
            self.dtype = torch.get_autocast_dtype(self.device.type) if is_lower else torch.float32
        with self.device:
            self.network = type(network)(replace(network.config, n_layers=1))
        for name, value in vars(network).items():  # what was set after it was made
            if isinstance(value, bool | int | float | str):
                setattr(self.network, name, value)
        self.recompute = recompute
        # Weights that are larger than those of a new network, whose attention is flat, and so small
        # that an error in a block is not small beside what it computes.
        with torch.no_grad():
            for parameter in self.network.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0, 0.5 * parameter.shape[1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        windows = torch.randint(network.config.vocab_size, (B, T + 1), device=self.device)
        self.inputs = windows[:, :-1]
        self.targets = windows[:, 1:].flatten()
        # The loss of so many rows: a first chunk, and one as long as the last one of the batch.
        rows = B * T
        self.rows = rows if rows <= CHUNK else CHUNK + (rows - 1) % CHUNK + 1
        self.sequences = math.ceil(self.rows / T)  # in which these rows are

    def hidden(self, network, B):
        return network.model(self.inputs[:B]).flatten(0, 1)

    def is_random(self):
        """Whether two forwards differ."""
        with torch.no_grad(), self.autocast:
            first = self.hidden(self.network, self.sequences)
            return not torch.equal(first, self.hidden(self.network, self.sequences))

    def results(self, network, B, autocast):
        """{"loss": …, name of a parameter: its gradient}, from the first B sequences."""
        with autocast:
            hidden = self.hidden(network, B)[:self.rows]
            loss = network.loss(hidden, self.targets[:self.rows])
        loss.backward()
        found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        network.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), **found}

    @functools.cached_property
    def expected(self):
        """The results of the text, in the precision of the training and in a higher one."""
        plain = self.results(self.network, self.sequences, self.autocast)
        network = copy.deepcopy(self.network)
        higher = contextlib.nullcontext()
        if self.dtype == torch.float32:
            network = network.double()
            higher = InDouble()
        with higher:
            no_autocast = torch.autocast(self.device.type, enabled=False)
            return plain, self.results(network, self.sequences, no_autocast)

    def disagreement(self, parts):
        """None if the network computes the same with these parts, up to rounding; else why not.

        Rounding is what the text itself is apart from the same in higher precision. Four times as
        much is allowed, and about a unit of the last place more: the text may be exact by luck."""
        plain, exact = self.expected
        # What is compiled needs the shapes of the training; else a part of the batch is enough.
        B = len(self.inputs) if "blocks" in parts else self.sequences
        try:
            network = copy.deepcopy(self.network)
            if self.recompute:
                checkpoint_activations(network)
            found = self.results(use(network, parts), B, self.autocast)
        except Exception as error:  # of a compiler or a kernel: each has a class of its own
            if is_out_of_memory(error):
                raise
            return f"fails: {first_line_of(error)}"
        unit = max(1e-5, torch.finfo(self.dtype).eps)
        if found.keys() != exact.keys():
            return f"differs: it has other gradients, {', '.join(found.keys() ^ exact.keys())}"
        for name, value in exact.items():
            size = value.norm()
            rounding = (plain[name] - value).norm()
            gap = (found[name] - value).norm()
            if not gap <= 4 * rounding + unit * size:  # a NaN too
                return (f"differs: {name} is off by {gap / size:.1e}, and rounding explains "
                        f"{rounding / size:.1e}")
        return None
