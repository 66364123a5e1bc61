"""settings.py — from the command line to one dict of settings: the flags, their ranges, and what a resume may not change."""
import argparse

from errors import UserError

ONCE = ("resume", "overwrite", "reset_optimizer", "stop_at")  # flags about this command, not about the run
LEAST = dict.fromkeys(("max_steps", "batch_tokens", "micro_batch", "seq_len", "eval_tokens", "benchmark_items", "threads", "lora", "batch_size",
                       "max_length", "eval_items"), 1) | {"keep_last": 2, "epochs": 0.001, "lora_alpha": 0.001}  # others: 0
MOST = dict(beta1=0.9999, beta2=0.999999, threads=1024, seed=2**32 - 1, held_out=0.9)  # others: 2^40


def flags_of(settings, description, by_preset={}):
    """argparse's parser for a table of settings, {name: (default, type or choices, meaning)}, and for the flags in ONCE.
    A flag that is not given leaves no trace, so that on a resume the saved setting rules."""
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)
    for name, (default, kind, meaning) in settings.items():
        how = ({"action": argparse.BooleanOptionalAction} if kind is bool else
               {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": kind.__name__.upper()})
        defaults = [] if default is None else [str(default)]
        defaults += [f"{row[name]} for {preset}" for preset, row in by_preset.items() if name in row]
        parser.add_argument(f"--{name}", help=meaning + (f" (default {', '.join(defaults)})" if defaults else ""), **how)
    parser.add_argument("--stop_at", type=int, metavar="STEP", help="stop and save there, as Ctrl-C would")
    parser.add_argument("--resume", action="store_true", help="continue the run in --run; start it if there is nothing to continue")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in --run and start over")
    parser.add_argument("--reset_optimizer", action="store_true", help="on resume, forget the optimizer's state, to see what it was for")
    return parser


def check(given):
    """The flags that are settings, {name: value}. Raises UserError for values that make no sense, alone or together."""
    if given.get("overwrite") and given.get("resume") or given.get("reset_optimizer") and not given.get("resume"):
        raise UserError("--resume goes on, --overwrite starts over, --reset_optimizer needs --resume — choose")
    for name, value in given.items():
        least, most = LEAST.get(name, 0), MOST.get(name, 2**40)
        if isinstance(value, (int, float)) and not least <= value <= most:  # says no to NaN as well
            raise UserError(f"--{name} {value} is out of range — it can be {least} to {most}")
    return {name: value for name, value in given.items() if name not in ONCE}


def whole_text(text):
    """What is no UTF-8 on the command line arrives as lone surrogates, which no text holds: they become "?"."""
    return text.encode("utf-8", errors="replace").decode()


def continued(saved, flags, experiment):
    """The settings of a run that goes on: the saved ones, and the flags where they are harmless. Raises UserError naming each
    flag that would make of it another experiment."""
    if not set(experiment) <= saved.keys():
        raise UserError("this run was started by another script — continue it with the one that started it, or choose another --run")
    differ = [f"{name} (saved {saved[name]}, given {flags[name]})" for name in experiment if flags.get(name, saved[name]) != saved[name]]
    if differ:
        raise UserError(f"not the run that was saved: {', '.join(differ)} — leave these flags out, or choose another --run")
    return {**saved, **flags}
