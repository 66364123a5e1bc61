"""Our speed and memory beside those of transformers' LLaMA, in one run.

All implementations compute with the same weights, on the same tokens, in the same precision, with
the same AdamW. First their losses and gradients are compared: networks that differ are not timed.
Then they take turns, A B C D, A B C D …, so that whatever else the machine does slows all of them;
a training step in a new process each time, so that none has the memory or the settings of another.
The result is a table for a README.

    python -m bench                          # a training step: dim 256, 6 layers, 8 x 256 tokens
    python -m bench --vocab_size 50257       # the same network with GPT-2's vocabulary
    python -m bench --preset 124m --seq_len 512 --micro_batch 4
    python -m bench --mode decode            # greedy generation, 1 and 32 sequences at a time
    python -m bench --mode growth            # ours in growing sizes, with a figure
    python -m bench --only ours              # does not need transformers
    python -m bench plan 1.7b    # computed: which micro-batch fits which GPU, hours for 20B tokens
"""
import argparse
import copy
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from support import cpu  # before torch, which reads its settings once
import torch
from tqdm import tqdm

from bench.growth import TOKENS as GROWTH_TOKENS
from bench.growth import measure_growth
from bench.measure import in_fresh_process, matmul_rate, read_bandwidth, report, seconds_of
from bench.plan import peak_of_step, plan
from bench.theirs import in_transformers, their_loss, their_text
from model import PRESETS, Llama, ModelConfig, flops_per_token
from support import fast
from support.devices import can_compile, choose_device, choose_dtype, refuse_processes
from support.flags import Parser, count, number
from support.runs import UserError, script
from train import make_optimizer, read_settings

DEFAULT = ModelConfig(256, 6, 8, 4, 768, 4096, max_seq_len=256)  # 6,819,072 parameters
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "intermediate_size", "vocab_size")
WARM_UP = 3      # steps between the first one and those that are timed
PROMPT = 8       # tokens; to read them costs little beside generating NEW
NEW = 128

# How far the gradients of one matrix may be apart, |a − b| / |b|. Rounding makes 2e-6 in fp32 and
# 1e-2 in bf16 at the default sizes; another rope_theta makes 5e-2 in the embedding's.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}


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


def our_text(llama, prompt, n):
    """The n likeliest next ids of each row: prompt (B, T) → (B, n)."""
    return torch.stack(list(llama.generate(prompt, n, temperature=0)), dim=1)


# What is measured: {mode: {name: from our network to the function that is timed}}.
IMPLEMENTATIONS = {
    "train": {
        "ours": lambda llama: partial(our_loss, with_fast_parts(llama, ("attention", "loss"))),
        "ours-compiled": lambda llama: partial(our_loss, with_fast_parts(llama, fast.PARTS)),
        "transformers": lambda llama: partial(their_loss, in_transformers(llama)),
        "transformers-compiled":
            lambda llama: partial(their_loss, torch.compile(in_transformers(llama))),
    },
    "decode": {
        "ours": lambda llama: partial(our_text, llama),
        "transformers": lambda llama: partial(their_text, in_transformers(llama)),
        # On CUDA transformers compiles this one, by itself.
        "transformers-static":
            lambda llama: partial(their_text, in_transformers(llama), cache="static"),
    },
}


def check_losses(losses, llama, inputs, targets, autocast, tolerance):
    """Raise UserError unless all networks have the loss and the gradients of the first one."""
    expected = None
    for name, loss_of in tqdm(losses.items(), desc="checking", leave=False):
        with autocast:
            loss = loss_of(inputs, targets)
        # The gradients of the sum: in fp16 many of those of the mean would be 0.
        (loss * targets.numel()).backward()
        found = {"loss": loss.detach()}
        for part, parameter in llama.named_parameters():
            found[part] = parameter.grad
        llama.zero_grad(set_to_none=True)
        if expected is None:
            first = name
            expected = found
        for part in expected:
            if torch.equal(found[part], expected[part]):
                continue  # both may be 0
            gap = ((found[part] - expected[part]).norm() / expected[part].norm()).item()
            if not gap <= tolerance:  # a NaN too
                raise UserError(f"{first} and {name} are different networks: {part} is {gap:.1e} "
                                f"of its size apart, and rounding explains {tolerance:.0e} — "
                                f"install the versions in requirements-extras.txt")


def check_texts(decoders, prompt):
    """Raise UserError unless all networks continue the prompt in the same way."""
    texts = {}
    for name, decode in decoders.items():
        texts[name] = decode(prompt, 8).tolist()  # in a long text two ids could be equally likely
        first = next(iter(texts))
        if texts[name] != texts[first]:
            raise UserError(f"{first} and {name} are different networks: they generate {texts} — "
                            f"install the versions in requirements-extras.txt")


# -------------------------------------------------------------------------------------------------
# A training step

def bench_training(llama, names, args, argv, device, dtype):
    """Measure the training step; returns (table, what its columns mean)."""
    config = llama.config
    windows = random_ids(config, (args.micro_batch, config.max_seq_len + 1), device)
    inputs = windows[:, :-1].contiguous()   # (B, T)
    targets = windows[:, 1:].contiguous()   # (B, T)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    step = training_step(llama, inputs, targets, autocast, dtype)
    if args.alone:  # this is one of the fresh processes below
        loss_of = IMPLEMENTATIONS["train"][args.alone](llama)
        step(loss_of)
        first_step_at = time.time()
        repeat(WARM_UP, step, loss_of)
        seconds = seconds_of(partial(repeat, args.steps, step, loss_of), device)
        report(first_step_at, seconds / args.steps, device)
        return None

    losses = {name: IMPLEMENTATIONS["train"][name](llama) for name in names}
    fp32 = torch.autocast(device.type, enabled=False)
    eager = {name: losses[name] for name in names if "compiled" not in name}
    check_losses(eager, llama, inputs[:1], targets[:1], fp32, TOLERANCE[torch.float32])
    # Once more: all sequences, in the precision that is timed, compiled.
    check_losses(losses, llama, inputs, targets, autocast, TOLERANCE[dtype])
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
    return train_table(turns, inputs.numel(), flops, ceiling), [
        f"{args.micro_batch} x {config.max_seq_len} tokens a step; in each of {args.rounds} rounds "
        f"a fresh process for each, with {args.steps} timed steps after {1 + WARM_UP} others: "
        f"median (lowest–highest); × is the ratio within a round",
        f"utilisation = tokens/s · {flops / 1e9:.4g} GFLOP per token (model.flops_per_token) / "
        f"{ceiling / 1e9:,.0f} GFLOP/s, the fastest matrix product in this run",
        f"peak: {memory}; the highest of all rounds, and its ratio to transformers'",
        "first step: seconds since the start of the process, imports included; cold: with an "
        "empty compile cache, in the first round; warm: with what that left there, in the others"]


def training_step(llama, inputs, targets, autocast, dtype):
    """The step of train.py, as a function of the loss function to use."""
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


def train_table(turns, tokens, flops, ceiling):
    """Rows of text, the header first. turns: {name: what in_fresh_process returned, for each
    round}; tokens of a step; flops per token; ceiling in FLOP/s."""
    rates = {name: [tokens / turn["seconds"] for turn in turns[name]] for name in turns}
    peaks = {name: max(turn["peak_bytes"] for turn in turns[name]) for name in turns}
    baselines = [name for name in rates if name.startswith("transformers")]
    table = [["implementation", "tokens/s", *[f"× {name}" for name in baselines], "utilisation",
              "peak GB", "first step, cold", "warm"]]
    for name in rates:
        speedups = [spread(ratios(rates, name, other), "{:.2f}") for other in baselines]
        memory = f"{peaks[name] / 1e9:.2f}"
        if "transformers" in peaks:
            memory += f" ({peaks[name] / peaks['transformers']:.2f} ×)"
        cold, *warm = [turn["first_step"] for turn in turns[name]]
        table.append([name, spread(rates[name], "{:,.0f}"), *speedups,
                      f"{median(rates[name]) * flops / ceiling:.1%}", memory,
                      f"{cold:.1f} s", f"{median(warm):.1f} s" if warm else "—"])
    return table


# -------------------------------------------------------------------------------------------------
# Generation

def bench_decoding(llama, names, args, device, dtype):
    """Measure greedy generation; returns (table, what its columns mean)."""
    config = llama.config
    if config.max_seq_len < PROMPT + NEW:
        raise UserError(f"--seq_len {config.max_seq_len} has no room for a prompt of {PROMPT} "
                        f"tokens and {NEW} new ones — give at least {PROMPT + NEW}")
    decoders = {name: IMPLEMENTATIONS["decode"][name](llama) for name in names}
    check_texts(decoders, random_ids(config, (1, PROMPT), device))  # in fp32
    for parameter in llama.parameters():  # not llama.to(dtype): the angles of RoPE stay fp32
        parameter.data = parameter.data.to(dtype)
    seconds = {}
    for batch in (1, 32):
        prompt = random_ids(config, (batch, PROMPT), device)
        seconds[batch] = {name: [] for name in names}
        for decode in decoders.values():
            decode(prompt, NEW)  # warm-up
        for _ in tqdm(range(args.rounds), desc=f"batch {batch}", leave=False):
            for name in names:
                turn = partial(decoders[name], prompt, NEW)
                seconds[batch][name].append(seconds_of(turn, device))
    bandwidth = read_bandwidth(device)
    weights = sum(parameter.numel() for parameter in llama.parameters())
    if not config.tie_embeddings:
        weights -= llama.model.embed_tokens.weight.numel()  # one row of it is read
    weight_bytes = weights * dtype.itemsize
    return decode_table(seconds, weight_bytes, bandwidth), [
        f"greedy, {NEW} new tokens after a prompt of {PROMPT}, which counts in the time; "
        f"{args.rounds} rounds: median (lowest–highest); × is the ratio within a round",
        f"bound = batch · {bandwidth / 1e9:,.1f} GB/s, at which a sum reads memory here / "
        f"{weight_bytes / 1e9:.4g} GB of weights: all but the embedding, read once for each token "
        f"of a row. Keys and values are not counted. What fits a cache can be read faster"]


def decode_table(seconds, weight_bytes, bandwidth):
    """Rows of text, the header first. seconds: {batch: {name: to generate NEW tokens in each row,
    in each round}}; weight_bytes that a step reads; bandwidth in bytes/s."""
    table = [["batch", "implementation", "tokens/s", "× transformers", "bound", "reached"]]
    for batch, by_name in seconds.items():
        rates = {name: [batch * NEW / s for s in values] for name, values in by_name.items()}
        bound = batch * bandwidth / weight_bytes
        for name in rates:
            table.append([str(batch), name, spread(rates[name], "{:,.0f}"),
                          spread(ratios(rates, name, "transformers"), "{:.2f}"),
                          f"{bound:,.0f}", f"{median(rates[name]) / bound:.1%}"])
    return table


# -------------------------------------------------------------------------------------------------
# Growth: our step, not compiled, in networks and windows of other sizes

def measure_size(args, device, dtype, dim, seq_len):
    """A row of growth.jsonl: tokens/s and peak of a fresh process, and what is computed about
    them. DEFAULT's network with another width or window; in heads of 32 numbers."""
    config = ModelConfig(dim, DEFAULT.n_layers, dim // 32, dim // 64, 3 * dim, DEFAULT.vocab_size,
                         max_seq_len=seq_len)
    micro_batch = GROWTH_TOKENS // seq_len
    measured = measure_alone(args, config, micro_batch)
    # Python, the libraries, and what these need for any network.
    smallest = measure_alone(args, replace(DEFAULT, dim=64, n_layers=1, max_seq_len=16), 1)
    return {"dim": dim, "seq_len": seq_len, "tok_per_s": GROWTH_TOKENS / measured["seconds"],
            "peak_bytes": measured["peak_bytes"], "smallest_bytes": smallest["peak_bytes"],
            "computed_bytes": peak_of_step(Llama, config, micro_batch),
            "flops_per_token": flops_per_token(config, seq_len),
            "ceiling": matmul_rate(2048, 2048, 2048, dtype, device)}


def measure_alone(args, config, micro_batch):
    """What a fresh process reports about our step in a network of these sizes."""
    flags = ["--seq_len", config.max_seq_len, "--micro_batch", micro_batch, "--dtype", args.dtype]
    for name in ("device", "threads"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", getattr(args, name)]
    for name in SIZES:
        flags += [f"--{name}", getattr(config, name)]
    return in_fresh_process([sys.executable, "-m", "bench", *map(str, flags), "--alone", "ours"])


# -------------------------------------------------------------------------------------------------
# What the modes share

def random_ids(config, shape, device):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, shape, generator=generator).to(device)


def ratios(rates, name, baseline):
    """How many times as fast as the baseline, in each round; empty without the baseline."""
    return [rate / base for rate, base in zip(rates[name], rates.get(baseline, []))]


def spread(values, form):
    """The values of all rounds as text: median (lowest–highest)."""
    if not values:
        return ""
    return f"{form} ({form}–{form})".format(median(values), min(values), max(values))


def markdown(table):
    """A table of text as Markdown."""
    header, *rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def introduce(llama, device, dtype):
    """The machine and the network, in a line."""
    machine = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    config = llama.config
    parameters = sum(parameter.numel() for parameter in llama.parameters())
    return (f"{machine}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}; "
            f"{parameters:,} parameters: dim {config.dim}, {config.n_layers} layers, "
            f"{config.n_heads} heads on {config.n_kv_heads} key/value, intermediate "
            f"{config.intermediate_size}, vocabulary {config.vocab_size:,}")


# -------------------------------------------------------------------------------------------------
# The command line

UNUSED = {  # {mode: flags that it does not read}
    "train": ("out",),
    "decode": ("out", "micro_batch", "steps", "same_settings"),
    "growth": ("preset", *SIZES, "seq_len", "micro_batch", "rounds", "steps", "only", "compile",
               "same_settings"),
}


def read_arguments(argv):
    preset_parser = Parser(add_help=False)
    preset_parser.add_argument("--preset", choices=PRESETS, help="take the sizes of this preset")
    preset = preset_parser.parse_known_args(argv)[0].preset
    sizes = PRESETS.get(preset, DEFAULT)
    parser = Parser(description="Our speed and memory beside those of transformers' LLaMA. Or: "
                    "python -m bench plan PRESET, what a training will need, computed.",
                    parents=[preset_parser])
    add = parser.add_argument
    add("--mode", choices=(*IMPLEMENTATIONS, "growth"), default="train", help="a training step, "
        "greedy generation, or training steps of ours in growing sizes")
    add("--out", type=Path, default=Path("figures"), help="folder for what --mode growth finds")
    for name in SIZES:
        add(f"--{name}", type=count, default=getattr(sizes, name), help="of the network")
    add("--seq_len", type=count, default=sizes.max_seq_len, help="tokens per sequence")
    add("--micro_batch", type=count, default=8, help="sequences per training step")
    add("--rounds", type=count, default=5, help="turns of each implementation")
    add("--steps", type=count, default=10, help="training steps in a turn")
    known = sorted({*IMPLEMENTATIONS["train"], *IMPLEMENTATIONS["decode"]})
    add("--only", nargs="+", choices=known, metavar="NAME", help="of %(choices)s")
    add("--compile", action=argparse.BooleanOptionalAction, help="measure the compiled ones too; "
        "if not given, where torch.compile works")
    add("--same_settings", action="store_true", help="in training: transformers too with the "
        "settings of support/cpu.py")
    add("--device", help="cpu, cuda, cuda:1 …; without it cuda if there is one")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of matrix products; in training the weights are always fp32")
    add("--threads", type=number(int, 1, 1024), help="CPU threads")
    add("--alone", choices=IMPLEMENTATIONS["train"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in UNUSED[args.mode]:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} means nothing in --mode {args.mode} — leave it out")
    return args


def choose_names(args, device):
    """The implementations to measure. Raises UserError if there are none, or for one of another
    mode."""
    if args.alone:
        return [args.alone]
    known = list(IMPLEMENTATIONS[args.mode])
    for name in args.only or []:
        if name not in known:
            raise UserError(f"{name} is not measured in --mode {args.mode} — choose among "
                            f"{', '.join(known)}")
    names = [name for name in known if name in (args.only or known)]
    compiled = [name for name in names if "compiled" in name]
    if args.only and compiled and args.compile is False:
        raise UserError(f"--only names {', '.join(compiled)}, and --no-compile leaves that out — "
                        f"give one of them")
    if compiled and args.compile is None:
        args.compile = can_compile(device)  # it says why not
        if not args.compile:
            print(f"left out: {', '.join(compiled)}")
    if not args.compile:
        names = [name for name in names if name not in compiled]
    if not names:
        raise UserError("nothing is left to measure — give other names to --only, or --compile")
    return names


def make_network(args):
    """Ours, with random weights. Raises UserError for sizes that contradict each other."""
    sizes = {name: getattr(args, name) for name in SIZES}
    try:
        config = ModelConfig(**sizes, max_seq_len=args.seq_len)
    except ValueError as error:
        raise UserError(f"{error} — give sizes that fit") from None
    # All rows of the embedding are ids: ours would not generate the padded ones, theirs would.
    config = replace(config, vocab_size=config.padded_vocab_size)
    torch.manual_seed(0)
    return Llama(config)


@script  # a mistake that the user can fix ends in one line
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["plan"]:
        parser = Parser(prog="python -m bench plan",
                        description="What a training will need, computed.")
        parser.add_argument("preset", nargs="?", default="1.7b", choices=PRESETS)
        config = PRESETS[parser.parse_args(argv[1:]).preset]
        for line in plan(Llama, config, flops_per_token(config, config.max_seq_len)):
            print(line, flush=True)
        return
    args = read_arguments(argv)
    refuse_processes()
    device = choose_device(args.device)
    if device.type == "mps":
        raise UserError("only cpu and cuda are measured — give --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = choose_dtype(args.dtype, device)
    if args.mode == "growth":
        print(markdown(measure_growth(args.out, partial(measure_size, args, device, dtype))))
        print(f"\ndrawn: {args.out}/growth.png, from {args.out}/growth.jsonl")
        return
    names = choose_names(args, device)
    llama = make_network(args).to(device)
    if args.mode == "decode":
        result = bench_decoding(llama, names, args, device, dtype)
    else:
        result = bench_training(llama, names, args, argv, device, dtype)
    if result is not None:
        table, notes = result
        print(introduce(llama, device, dtype), markdown(table), sep="\n\n", end="\n\n")
        for note in notes:
            print(f"- {note}")


if __name__ == "__main__":
    sys.exit(main())
