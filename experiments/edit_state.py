"""edit_state.py — change one part of a stopped run's full state, to see what that part was for.

    python train.py --max_steps 300 --stop_at 150 --run runs/half
    cp -r runs/half runs/without
    python experiments/edit_state.py runs/without --zero exp_avg_sq
    python train.py --resume --run runs/without
    python train.py --resume --run runs/half
    python plot_dynamics.py runs/half runs/without

What a full state is, checkpoint.capture tells: weights, the optimizer's state of each parameter,
how far the run has come, its settings. It is a dict, so to change it is a line.
"""
import os
from pathlib import Path

import common  # makes Python find the files at the root

import torch

import checkpoint
from support import durable
from support.flags import Parser, count_or_0
from support.runs import AT_END, UserError, hold, script


def zero(state, part):
    """Set `part` of every parameter's optimizer state to 0: of AdamW exp_avg (the average of
    gradients), exp_avg_sq (that of their squares) or step (the number of updates in them)."""
    parts = sorted({name for each in state["optimizer"].values() for name in each})
    if part not in parts:
        raise UserError(f"--zero {part}: the optimizer keeps {', '.join(parts) or 'nothing yet'}")
    for each in state["optimizer"].values():
        each[part].zero_()
    if part == "step":
        state["updates"] = 0  # a resume compares the two


def flip_last_bit(weights):
    """Change the last bit of the first weight: as little as an fp32 number can change."""
    name = next(iter(weights))
    weights[name].view(torch.int32).view(-1)[0] ^= 1


@script
def main(argv=None):
    parser = Parser(description="Change a part of a stopped run's newest full state.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--zero", nargs="+", default=[], metavar="PART",
                        help="parts of the optimizer's state: exp_avg, exp_avg_sq, step")
    parser.add_argument("--seed", type=count_or_0, help="of the order of the data, another one")
    parser.add_argument("--flip_bit", action="store_true", help="the last one of one weight")
    args = parser.parse_args(argv)
    if not durable.checkpoints(args.run):
        raise UserError(f"{args.run} has no checkpoint — give the folder of a run that was stopped")
    held = hold(args.run)  # until the script ends, no training can use it
    AT_END.append(lambda code: os.close(held))

    folder = durable.newest(args.run)
    state = checkpoint.load(folder)
    for part in args.zero:
        zero(state, part)
    if args.seed is not None:
        state["config"]["seed"] = args.seed
    if args.flip_bit:
        flip_last_bit(state["model"])
    checkpoint.save(args.run, state, state["config"]["keep_last"], state["config"]["keep_every"])
    print(f"{folder} is changed. Next: python train.py --resume --run {args.run}")


if __name__ == "__main__":
    main()
