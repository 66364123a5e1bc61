"""flags.py — the command line: argparse, with one-line errors and numbers that know their range;
and the settings of a training, which are saved with its run."""
import argparse
from pathlib import Path

from support.runs import UserError, is_argument

PATHS = ("run", "data", "init_from", "benchmark", "instructions")  # flags that cannot be empty


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """--help shows the default of a flag, if there is one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, and a flag is never abbreviated."""

    def __init__(self, **options):
        options.setdefault("formatter_class", Formatter)
        super().__init__(allow_abbrev=False, **options)

    def set_saved(self, saved):
        """Take the settings of a saved run as defaults. Adds to `saved`, and returns, those that
        are newer than the run, with the default of their flag.

        Raises UserError for an unknown setting, or a value that its flag could not have given."""
        known = vars(self.parse_args([]))
        unknown = sorted(saved.keys() - known.keys(), key=str)
        if unknown:
            raise UserError(f"this run was made by another script or by another version of this "
                            f"code, with settings that are unknown here "
                            f"({', '.join(map(str, unknown[:5]))}) — continue it with that one, or "
                            f"start a new run from its weights: train.py --init_from")
        for action in self._actions:
            if action.dest in saved and not can_give(action, saved[action.dest]):
                raise UserError(f"the saved {action.dest} {saved[action.dest]!r} is not a value "
                                f"that the flag can have — restore the checkpoint")
        newer = {name: value for name, value in known.items()
                 if name not in saved and name not in ONCE}
        saved.update(newer)
        self.set_defaults(**saved)
        return newer

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        for name in PATHS:
            if getattr(parsed, name, None) == "":  # of a shell variable that is not set
                self.error(f"--{name} is empty")
        return parsed

    def error(self, message):
        raise UserError(f"{message} — see --help")


def can_give(action, value):
    """Whether a flag can have this value."""
    if value is None:
        return action.default is None
    if not is_argument(value):
        return False
    if action.nargs == 0:  # a switch
        return isinstance(value, bool)
    try:
        parsed = (action.type or str)(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        return False
    is_choice = action.choices is None or parsed in action.choices
    return is_choice and type(parsed) is type(value) and parsed == value


def number(kind, least, most):
    """A `type=` for argparse: int or float, in a range. NaN is in no range."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text} is out of range — it can be {least} to {most}")
        return value
    parse.__name__ = kind.__name__  # argparse names it when the text is not a number at all
    return parse


count = number(int, 1, 2**40)
count_or_0 = number(int, 0, 2**40)
positive = number(float, 1e-9, 1e12)
positive_or_0 = number(float, 0, 1e12)
below_1 = number(float, 0, 0.999999)
seed = number(int, 0, 2**32 - 1)


def text(argument):
    """A `type=` for argparse: command-line bytes that are not valid UTF-8 become "?"."""
    return argument.encode("utf-8", errors="replace").decode()


def add_value(add, name, default):
    """Add a flag for values like this one, with None as its own default."""
    if isinstance(default, bool):
        add(f"--{name}", action=argparse.BooleanOptionalAction)
    else:
        add(f"--{name}", type=count if isinstance(default, int) else type(default))


# -------------------------------------------------------------------------------------------------
# The settings that train.py and sft.py share

# What a resume may change, and logs: paths, speed, intervals; and max_steps, to train longer, which
# also moves the learning rate. Every other setting is part of the experiment.
MAY_CHANGE = ("run", "data", "instructions", "skip_bad", "max_steps", "rewarm_steps", "device",
              "dtype", "deterministic", "fast", "compile", "fsdp", "threads", "micro_batch",
              "activation_checkpointing", "log_update_rms", "eval_every", "sample_every",
              "save_every", "keep_every", "keep_last", "benchmark", "benchmark_items",
              "benchmark_from", "eval_tokens", "eval_items", "sample_prompt")

# Flags about one start of the script, which are not saved with the run.
ONCE = ("resume", "overwrite", "reset_optimizer", "stop_at")


def add_settings(parser):
    """Add the settings that train.py and sft.py share; returns the group of flags of which only one
    can tell the length of the run. (`add` adds a flag to the group above it.)"""
    yes_or_no = argparse.BooleanOptionalAction
    group = parser.add_argument_group("the run")
    add = group.add_argument
    add("--run", help="folder for the log and the checkpoints")
    add("--seed", type=seed, default=1337, help="of initial weights and data order")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--max_steps", type=count,
                        help="length of the run and of the learning-rate schedule")
    add("--stop_at", type=count_or_0, metavar="STEP", help="save and stop there, like Ctrl-C")
    either = group.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="continue the run; start it if it has not begun")
    either("--overwrite", action="store_true", help="delete the run in this folder and start over")
    add("--reset_optimizer", action="store_true", help="on --resume: forget the optimizer's state")
    add("--rewarm_steps", type=count_or_0, default=0,
        help="with --reset_optimizer: let the learning rate rise again over so many steps")

    add = parser.add_argument_group("the machine").add_argument
    add("--device", help="cpu, cuda, cuda:1 …; without it cuda if there is one")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of matrix products; weights are always fp32")
    add("--deterministic", action=yes_or_no, default=False, help="bitwise on CUDA too; slower")
    add("--fast", action=yes_or_no, default=True, help="use what support/fast.py computes "
        "faster, after comparing it with model.py; --no-fast implies --no-compile")
    add("--threads", type=number(int, 1, 1024), help="CPU threads")
    add("--micro_batch", type=count, default=8,
        help="sequences per forward of one process; changes memory and speed, nothing else")
    add("--activation_checkpointing", action=yes_or_no, default=False, help="compute the inside of "
        "the blocks a second time in the backward, instead of keeping it: less memory, slower")

    add = parser.add_argument_group("learning rate and optimizer").add_argument
    add("--lr", type=positive, default=6e-4, help="peak learning rate")
    add("--min_lr", type=positive_or_0, help="final learning rate; without it lr / 10")
    add("--warmup_steps", type=count_or_0, default=715, help="linear rise to the peak")
    add("--schedule", type=text, default="cosine", help="the decay: cosine, linear or wsd")
    add("--weight_decay", type=positive_or_0, default=0.1, help="of matrices, not of vectors")
    add("--beta1", type=below_1, default=0.9, help="AdamW's memory of the gradient")
    add("--beta2", type=below_1, default=0.95, help="AdamW's memory of its square")
    add("--grad_clip", type=positive_or_0, default=1.0,
        help="largest gradient norm; 0: no limit")
    add("--log_update_rms", action=yes_or_no, default=False,
        help="log how far a step moves the weights (root mean square); needs a copy of them")

    interval = "steps between (always at 0, 1, 2, 4, 8 … and at the end too; 0: only there)"
    add = parser.add_argument_group(interval).add_argument
    add("--eval_every", type=count_or_0, default=250, help="evaluations")
    add("--sample_every", type=count_or_0, default=1000, help="samples")
    add("--save_every", type=count_or_0, default=500, help="full checkpoints")
    add("--keep_every", type=count_or_0, default=5000, help="weights that are kept for ever")
    add("--keep_last", type=number(int, 2, 1000), default=2,
        help="how many full ones are kept")

    add = parser.add_argument_group("evaluation").add_argument
    add("--benchmark", help="questions in HellaSwag's format; without it the data's cloze.jsonl")
    add("--benchmark_items", type=count, help="use only so many of them, the first")
    return length


def check_together(args, state, world):
    """Raise UserError for settings that are wrong together, or wrong for the state to resume.
    world: the number of processes."""
    if state is not None:
        check_same(args, state["config"])
        for name in ("max_steps", "stop_at"):
            end = getattr(args, name)
            if end is not None and end < state["step"]:
                raise UserError(f"{args.run} is at step {state['step']} already — give a larger "
                                f"--{name}")
    elif args.reset_optimizer:
        raise UserError(f"--reset_optimizer is for --resume: {args.run} has no state to continue "
                        f"without its optimizer — leave it out")
    elif getattr(args, "init_from", None) and same_place(args.init_from, args.run):
        raise UserError(f"{args.run} is the run to start from — choose another --run")
    rewarmed = 0 if state is None else state["config"]["rewarm_steps"]
    if args.rewarm_steps != rewarmed and not args.reset_optimizer:
        raise UserError("--rewarm_steps is for --resume --reset_optimizer — give all three")
    if "batch_tokens" in args:  # sft.py counts its batches in rows
        check_batch(args, state, world)


def same_place(a, b):
    return Path(a).resolve() == Path(b).resolve()


def check_same(args, saved):
    """Raise UserError if the settings are those of another experiment than the saved ones."""
    differ = []
    for name, value in saved.items():
        given = getattr(args, name)
        if name not in MAY_CHANGE and given != value:
            differ.append(f"{name} (saved {value}, given {given})")
    if differ:
        raise UserError(f"not the run that was saved: {', '.join(differ)} — leave these flags out, "
                        f"or choose another --run")


def check_batch(args, state, world):
    """Raise UserError, naming batch sizes that fit, unless all processes have equal shares."""
    unit = args.micro_batch * args.seq_len * world
    if args.batch_tokens % unit != 0:
        below = args.batch_tokens // unit * unit
        near = [str(n) for n in (below, below + unit) if n > 0]
        raise UserError(f"--batch_tokens {args.batch_tokens} is not divisible by micro_batch "
                        f"{args.micro_batch} x seq_len {args.seq_len} x {world} processes = {unit} "
                        f"— use --batch_tokens {' or '.join(near)}, or another --micro_batch")
    if state is not None and state["tokens"] != state["step"] * args.batch_tokens:
        raise UserError(f"{args.run}: {state['tokens']} tokens after step {state['step']} are not "
                        f"--batch_tokens {args.batch_tokens} — use the code that wrote it")
