"""How fast and how large the training step is.

    python -m bench                          # beside transformers': dim 256, 6 layers, 8 x 256
    python -m bench --vocab_size 50257       # the same network with GPT-2's vocabulary
    python -m bench --preset 124m --seq_len 512 --micro_batch 4
    python -m bench --only ours              # does not need transformers
    python -m bench growth                   # ours in growing sizes, with a figure
    python -m bench plan 1.7b    # computed: which micro-batch fits which GPU, hours for 20B tokens

The result is a table for a README.
"""
import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import support.cpu  # before torch, which reads its settings once

import torch

from bench import growth, plan
from bench.step import DEFAULT, IMPLEMENTATIONS, SIZES, compare, time_alone
from model import PRESETS, Llama, ModelConfig
from support.devices import can_compile, choose_device, choose_dtype, refuse_processes
from support.flags import Parser, count, number
from support.runs import UserError, script


def read_arguments(argv):
    preset_parser = Parser(add_help=False)
    preset_parser.add_argument("--preset", choices=PRESETS, help="take the sizes of this preset")
    preset = preset_parser.parse_known_args(argv)[0].preset
    sizes = PRESETS.get(preset, DEFAULT)
    parser = Parser(prog="python -m bench", description=__doc__, parents=[preset_parser],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name in SIZES:
        add(f"--{name}", type=count, default=getattr(sizes, name), help="of the network")
    add("--seq_len", type=count, default=sizes.max_seq_len, help="tokens per sequence")
    add("--micro_batch", type=count, default=8, help="sequences per training step")
    add("--rounds", type=count, default=5, help="turns of each implementation")
    add("--steps", type=count, default=10, help="training steps in a turn")
    add("--only", nargs="+", action="extend", choices=IMPLEMENTATIONS, metavar="NAME",
        help="of %(choices)s")
    add("--same_settings", action="store_true", help="transformers too with the settings of "
        "support/cpu.py")
    add("--alone", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    add_machine(parser)
    return parser.parse_args(argv)


def add_machine(parser):
    """Add the flags about the machine."""
    add = parser.add_argument
    add("--device", help="cpu, cuda, cuda:1 …; without it cuda if there is one")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of matrix products; the weights are always fp32")
    add("--threads", type=number(int, 1, 1024), help="CPU threads")


def use_machine(args):
    """(device, dtype), as these flags say. Raises UserError."""
    refuse_processes()
    device = choose_device(args.device)
    if device.type == "mps":
        raise UserError("only cpu and cuda are measured — give --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    return device, choose_dtype(args.dtype, device)


def choose_names(only, device):
    """The implementations to measure; only: the names of some, or None. Raises UserError if there
    are none."""
    names = [name for name in IMPLEMENTATIONS if name in (only or IMPLEMENTATIONS)]
    compiled = [name for name in names if "compiled" in name]
    if compiled and not can_compile(device):  # it prints why not
        print(f"left out: {', '.join(compiled)}")
        names = [name for name in names if name not in compiled]
    if not names:
        raise UserError("nothing is left to measure — give other names to --only")
    return names


def make_network(args):
    """Ours, with random weights. Raises UserError for sizes that contradict each other."""
    sizes = {name: getattr(args, name) for name in SIZES}
    try:
        config = ModelConfig(**sizes, max_seq_len=args.seq_len)
    except ValueError as error:
        raise UserError(f"{error} — give sizes that fit") from None
    # All rows of the embedding are ids, as in transformers' network.
    config = replace(config, vocab_size=config.padded_vocab_size)
    torch.manual_seed(0)
    return Llama(config)


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


def markdown(table):
    """A table of text as Markdown."""
    header, *rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def show_plan(argv):
    """`python -m bench plan PRESET`"""
    parser = Parser(prog="python -m bench plan", description="What a training will need, computed.")
    parser.add_argument("preset", nargs="?", default="1.7b", choices=PRESETS,
                        help="in windows as long as its network takes; without it 1.7b")
    for line in plan.plan(PRESETS[parser.parse_args(argv).preset]):
        print(line, flush=True)


def show_growth(argv):
    """`python -m bench growth`"""
    parser = Parser(prog="python -m bench growth",
                    description="Our training step in growing sizes, with a figure.")
    parser.add_argument("--out", type=Path, default=Path("figures"),
                        help="folder for growth.jsonl and growth.png")
    add_machine(parser)
    args = parser.parse_args(argv)
    measure = partial(growth.measure_size, args, *use_machine(args))
    print(markdown(growth.measure_growth(args.out, measure)))
    print(f"\ndrawn: {args.out}/growth.png, from {args.out}/growth.jsonl")


def show_comparison(argv):
    """`python -m bench`, beside transformers"""
    args = read_arguments(argv)
    device, dtype = use_machine(args)
    if args.alone:  # one of the fresh processes that `compare` starts
        time_alone(make_network(args).to(device), args, device, dtype)
        return
    names = choose_names(args.only, device)
    llama = make_network(args).to(device)
    table, notes = compare(llama, names, args, argv, device, dtype)
    print(introduce(llama, device, dtype), markdown(table), sep="\n\n", end="\n\n")
    for note in notes:
        print(f"- {note}")


@script  # a mistake that the user can fix ends in one line
def main(argv=None):
    match sys.argv[1:] if argv is None else argv:
        case ["plan", *flags]:
            show_plan(flags)
        case ["growth", *flags]:
            show_growth(flags)
        case flags:
            show_comparison(flags)


if __name__ == "__main__":
    sys.exit(main())
