"""step.py — our training step beside that of transformers' LLaMA: speed and memory.

All implementations compute with the same weights, on the same tokens, in the same precision, with
the same AdamW. First their losses and gradients are compared, before any of them is compiled:
networks that differ are not timed. Then they take turns, A B C D, A B C D …, so that whatever else
the machine does slows all of them; each turn in a new process, so that none has the memory or the
settings of another.
"""
import copy
import sys
import time
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np
import torch

from bench.measure import in_fresh_process, matmul_rate, report, seconds_of
from convert_hf import to_hf_config
from model import ModelConfig, flops_per_token
from support import fast
from support.progress import tqdm
from support.runs import UserError, first_line_of
from train import make_optimizer, read_settings

DEFAULT = ModelConfig(256, 6, 8, 4, 768, 4096, max_seq_len=256)  # 6,819,072 parameters
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "intermediate_size", "vocab_size")
WARM_UP = 3  # steps between the first one and those that are timed

# How far the gradients of one matrix may be apart in fp32, |a − b| / |b|. Rounding makes 2e-6 at
# the default sizes; another rope_theta makes 5e-2 in the embedding's.
TOLERANCE = 1e-3


# -------------------------------------------------------------------------------------------------
# The networks. All of them hold the same Parameter objects: one AdamW serves all, and weights,
# gradients and moments are in memory once.

def with_fast_parts(llama, parts):
    """A second network with the same parameters and these parts of support/fast.py."""
    memo = {id(parameter): parameter for parameter in llama.parameters()}  # these are not copied
    return fast.use(copy.deepcopy(llama, memo), parts)


def our_loss(llama, inputs, targets):
    """The mean loss, computed as in the loop of train.py; inputs and targets are (B, T)."""
    _, loss = llama(inputs, targets, reduction="sum")
    return loss / targets.numel()


def in_transformers(llama):
    """transformers' LlamaForCausalLM with the parameters of `llama`: our state_dict is theirs.
    Raises UserError if transformers is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError(f"{first_line_of(error)} — pip install -r requirements-extras.txt, or give "
                        f"--only ours") from None
    theirs = LlamaConfig.from_dict(to_hf_config(llama.config, "float32"))
    with llama.lm_head.weight.device:
        network = LlamaForCausalLM(theirs)
    network.load_state_dict(llama.state_dict(keep_vars=True), assign=True)
    return network


def their_loss(network, inputs, targets):
    """The mean loss from transformers' own loss function; inputs and targets are (B, T). (Given
    `labels` alone it would shift them by one token. In training a cache is of no use.)"""
    output = network(input_ids=inputs, labels=targets, shift_labels=targets,
                     num_items_in_batch=targets.numel(), use_cache=False)
    return output.loss


# What is measured: {name: from our network to the function that is timed}.
IMPLEMENTATIONS = {
    "ours": lambda llama: partial(our_loss, with_fast_parts(llama, ("attention", "loss"))),
    "ours-compiled": lambda llama: partial(our_loss, with_fast_parts(llama, fast.PARTS)),
    "transformers": lambda llama: partial(their_loss, in_transformers(llama)),
    "transformers-compiled":
        lambda llama: partial(their_loss, torch.compile(in_transformers(llama))),
}


def check_networks(names, llama, inputs, targets):
    """Raise UserError unless these implementations have the same loss and the same gradients in
    fp32."""
    expected = None
    for name in names:
        loss = IMPLEMENTATIONS[name](llama)(inputs, targets)
        loss.backward()
        found = {part: parameter.grad for part, parameter in llama.named_parameters()}
        found["loss"] = loss.detach()
        llama.zero_grad(set_to_none=True)
        expected = expected or found  # of the first one
        for part, value in found.items():
            gap = (value - expected[part]).norm().item()
            size = expected[part].norm().item()
            if not gap <= TOLERANCE * size:  # a NaN too
                raise UserError(f"ours and {name} are different networks: {part} is {gap:.1e} "
                                f"apart, of {size:.1e}, which is more than rounding — install the "
                                f"versions in requirements-extras.txt")


# -------------------------------------------------------------------------------------------------
# A training step

def random_batch(config, micro_batch, device):
    """Inputs and targets, (B, T) each."""
    shape = (micro_batch, config.max_seq_len + 1)
    windows = torch.randint(config.vocab_size, shape, device=device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def time_alone(llama, args, device, dtype):
    """Measure one implementation, args.alone, in this process, and print what was found for the
    process that started it."""
    inputs, targets = random_batch(llama.config, args.micro_batch, device)
    step = training_step(llama, inputs, targets, dtype)
    loss_of = IMPLEMENTATIONS[args.alone](llama)
    step(loss_of)
    first_step_at = time.time()
    repeat(WARM_UP, step, loss_of)
    seconds = seconds_of(partial(repeat, args.steps, step, loss_of), device)
    report(first_step_at, seconds / args.steps, device)


def compare(llama, names, args, argv, device, dtype):
    """Measure all in turns; returns (table, what its columns mean)."""
    config = llama.config
    inputs, targets = random_batch(config, args.micro_batch, device)
    originals = dict.fromkeys(name.removesuffix("-compiled") for name in names)
    check_networks(originals, llama, inputs[:1], targets[:1])
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the fresh processes need the memory

    turns = {name: [] for name in names}
    ceiling = 0
    with TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        for _ in tqdm(range(args.rounds), desc="rounds", leave=False):
            ceiling = max(ceiling, matmul_ceiling(config, inputs.numel(), dtype, device))
            for name in names:
                environment = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/{name}"}
                if name.startswith("transformers") and not args.same_settings:
                    environment["PLAIN_PYTORCH"] = "1"  # as scripts use it that are not ours
                command = [sys.executable, "-m", "bench", *argv, "--alone", name]
                turns[name].append(in_fresh_process(command, **environment))
    flops = flops_per_token(config, config.max_seq_len)
    memory = "resident memory, Python and libraries included"
    if device.type == "cuda":
        memory = "torch.cuda.max_memory_allocated"
    return table_of(turns, inputs.numel(), flops, ceiling), [
        f"{args.micro_batch} x {config.max_seq_len} tokens a step; in each of {args.rounds} rounds "
        f"a fresh process for each, with {args.steps} timed steps after {1 + WARM_UP} others: "
        f"median (lowest–highest); × is the ratio within a round",
        f"utilisation = tokens/s · {flops / 1e9:.4g} GFLOP per token (model.flops_per_token) / "
        f"{ceiling / 1e9:,.0f} GFLOP/s, the fastest matrix product in this run",
        f"peak: {memory}; the highest of all rounds, and its ratio to transformers'",
        "first step: seconds since the start of the process, imports included; cold: with an "
        "empty compile cache, in the first round; warm: with what that left there, in the others"]


def training_step(llama, inputs, targets, dtype):
    """The step of train.py, as a function of the loss function to use."""
    autocast = torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32)
    settings = read_settings(["--lr", "1e-4"])  # else as there
    optimizer = make_optimizer(llama, settings, inputs.device)
    scaler = torch.amp.GradScaler(inputs.device.type, enabled=dtype == torch.float16)

    def step(loss_of):
        with autocast:
            loss = loss_of(inputs, targets)
        scaler.scale(loss).backward()
        loss.item()  # train.py needs both numbers, so it waits for the GPU here
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(llama.parameters(), settings.grad_clip).item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return step


def repeat(times, step, loss_of):
    for _ in range(times):
        step(loss_of)


def matmul_ceiling(config, tokens, dtype, device):
    """FLOP/s of the fastest matrix product: one of the network's own, or a large square. That is
    left out if it would take more than 2 s: many CPUs cannot multiply fp16 themselves."""
    shapes = [(tokens, config.dim, config.intermediate_size),
              (tokens, config.dim, config.padded_vocab_size)]
    rate = max(matmul_rate(*shape, dtype, device) for shape in shapes)
    side = 8192 if device.type == "cuda" else 2048
    if 2 * side**3 / rate < 2:
        rate = max(rate, matmul_rate(side, side, side, dtype, device))
    return rate


def table_of(turns, tokens, flops, ceiling):
    """Rows of text, the header first. turns: {name: what in_fresh_process returned, for each
    round}; tokens of a step; flops per token; ceiling in FLOP/s."""
    rates = {name: tokens / np.array([turn["seconds"] for turn in turns[name]]) for name in turns}
    peaks = {name: max(turn["peak_bytes"] for turn in turns[name]) for name in turns}
    baselines = [name for name in rates if name.startswith("transformers")]
    table = [["implementation", "tokens/s", *[f"× {name}" for name in baselines], "utilisation",
              "peak GB", "first step, cold", "warm"]]
    for name in rates:
        speedups = [spread(rates[name] / rates[other], "{:.2f}") for other in baselines]
        memory = f"{peaks[name] / 1e9:.2f}"
        if "transformers" in peaks:
            memory += f" ({peaks[name] / peaks['transformers']:.2f} ×)"
        cold, *warm = [turn["first_step"] for turn in turns[name]]
        table.append([name, spread(rates[name], "{:,.0f}"), *speedups,
                      f"{np.median(rates[name]) * flops / ceiling:.1%}", memory,
                      f"{cold:.1f} s", f"{np.median(warm):.1f} s" if warm else "—"])
    return table


def spread(values, form):
    """The values of all rounds, an array, as text: median (lowest–highest)."""
    return f"{form} ({form}–{form})".format(np.median(values), values.min(), values.max())
