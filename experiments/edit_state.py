"""edit_state.py — copy a stopped run with one part of its state changed, to see what it is for.

    python train.py --max_steps 300 --stop_at 150 --run runs/half
    python experiments/edit_state.py runs/half runs/without --zero exp_avg_sq
    python train.py --resume --run runs/without
    python train.py --resume --run runs/half
    python plot_dynamics.py runs/half runs/without

What a full state is, checkpoint.capture tells: weights, the optimizer's state of each parameter,
how far the run has come, its settings. It is a dict, so to change it is a line. The log of the new
run does not tell what was changed: let its name.
"""
import os
import shutil
from pathlib import Path

import common  # makes Python find the files at the root

import torch

import checkpoint
from support import durable
from support.flags import Parser, seed
from support.runs import AT_END, UserError, hold, is_tuned, quoted, script


def zero(state, part):
    """Set `part` of every parameter's optimizer state to 0: of AdamW exp_avg (the average of
    gradients), exp_avg_sq (that of their squares) or step (the number of updates in them)."""
    parts = sorted({name for each in state["optimizer"].values() for name in each})
    if part not in parts:
        raise UserError(f"--zero {part}: the optimizer keeps {', '.join(parts) or 'nothing yet'}")
    for each in state["optimizer"].values():
        if part in each:  # not of a parameter that had no gradient yet, or has another optimizer
            each[part].zero_()
    if part == "step":
        state["updates"] = 0  # a resume compares the two


def flip_bit(weights):
    """Change one bit of one weight that each token meets: the lowest that bf16 keeps. Rounding to
    bf16 takes away a change of those below it."""
    name = next(name for name in weights if ".layers." in name)
    weights[name].view(torch.int32).view(-1)[0] ^= 1 << 16


@script
def main(argv=None):
    parser = Parser(description="Copy a stopped run with a part of its state changed.")
    parser.add_argument("run", type=Path, help="run folder; it stays as it is")
    parser.add_argument("new", type=Path, metavar="NEW", help="run folder to write")
    parser.add_argument("--zero", action="append", metavar="PART", help="part of the optimizer's "
                        "state: exp_avg, exp_avg_sq or step; may be given several times")
    parser.add_argument("--seed", type=seed, help="another order of the data")
    parser.add_argument("--flip_bit", action="store_true", help="the lowest bit that bf16 keeps "
                        "of one weight")
    args = parser.parse_args(argv)
    folder = durable.find(args.run, full=True)
    if folder is None:
        raise UserError(f"{args.run} has no checkpoint — give the folder of a run that was stopped")
    held = hold(args.run)  # a run that is being trained is refused
    AT_END.append(lambda code: os.close(held))
    if args.new.exists():
        raise UserError(f"{args.new} exists already — give another folder")
    state = checkpoint.load(folder)
    config = state["config"]
    if state["step"] == config["max_steps"]:
        raise UserError(f"{args.run} is finished, so nothing would follow a change — stop one "
                        f"before its end: --stop_at")
    if args.seed is not None and is_tuned(args.run):
        raise UserError("--seed also says which rows of a tuning are held out — leave it out")
    changes = []
    for part in args.zero or []:
        changes.append(f"{part} = 0")
        zero(state, part)
    if args.seed is not None:
        changes.append(f"seed {args.seed} instead of {config['seed']}")
        config["seed"] = args.seed
    if args.flip_bit:
        changes.append("one bit of one weight")
        flip_bit(state["model"])

    half = args.new.with_name(f".tmp_{args.new.name}")  # what a kill leaves has not the new name
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(args.run, half, ignore=shutil.ignore_patterns(".*"))
    checkpoint.save(half, state, config["keep_last"], config["keep_every"])
    half.rename(args.new)
    name = "sft.py" if is_tuned(args.new) else "train.py"
    print(f"{args.new}: {args.run} at step {state['step']}, {', '.join(changes) or 'unchanged'}\n"
          f"Next: python {name} --resume --run {quoted(args.new)}")


if __name__ == "__main__":
    main()
