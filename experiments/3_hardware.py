"""3. Does a run stay the same when it moves to other hardware?

A run stopped at step 150 of 300 goes on with other processes, micro-batches, precision, kernels,
threads. Expected: the same tokens, so losses that differ by rounding only. Refuted if a move shifts
the validation loss at the end by more than a fifth of the spread between seeds.
"""
import sys

import common
import numpy as np

from support.flags import Parser
from support.runs import script

EXPERIMENT = "3_hardware"
MOVES = [("stayed", "stopped and resumed"), ("micro_batch_2", "micro-batch 8 → 2"),
         ("threads_2", "1 → 2 threads"), ("processes_2", "1 → 2 processes"),
         ("compiled", "eager → compiled"), ("fp32", "bf16 → fp32")]
GPU_MOVES = [("gpu", "CPU → GPU"), ("gpu_and_back", "CPU → GPU → CPU"),
             ("gpu_from_the_start", "all on the GPU")]


def noise(experiment, names):
    """Standard deviation of the last validation loss over seeds."""
    return common.spread([common.last(common.log_of(experiment, name), "eval", "val_loss")
                          for name in names])


def compare(experiment, names, sigma, panel, numbers):
    """Draw how far the losses of moved runs are from those of the one that never moved."""
    base = common.log_of(experiment, "never_moved")
    losses = dict(zip(*common.points(base, "train", "loss")))
    for (name, label), colour in zip(names, common.COLOURS):
        run = common.log_of(experiment, name)
        steps, moved = common.points(run, "train", "loss")
        gap = np.abs(moved - np.array([losses[step] for step in steps]))
        gap = np.maximum(gap, 1e-8)  # 0 has no place on a logarithmic axis
        panel.plot(steps, gap, lw=1, color=colour, label=label)
        shift = common.last(run, "eval", "val_loss") - common.last(base, "eval", "val_loss")
        numbers[f"{label}: val loss at the end, shift"] = f"{shift:+.5f}"
        numbers[f"{label}: in standard deviations of seeds"] = f"{shift / sigma:+.2f}"
        numbers[f"{label}: largest difference of a step's loss"] = f"{gap.max():.1e}"
        speed = [np.median(common.points(run, "train", "tok_per_s")[1][part])
                 for part in (steps <= 150, steps > 250)]
        numbers[f"{label}: tokens/s"] = f"{speed[0]:,.0f} → {speed[1]:,.0f}"
    panel.axhline(sigma, color="0.3", ls="--", lw=1)
    panel.text(102, sigma * 1.2, "standard deviation of val loss between seeds", fontsize=8)
    panel.axvline(150, color="0.6", ls=":", lw=1)
    panel.set(yscale="log", ylim=(5e-9, 1), xlabel="step", ylabel="nats")
    panel.legend(fontsize=7, loc="lower right")


@script
def main(argv=None):
    Parser(description=__doc__.split("\n")[0]).parse_args(argv)
    numbers = {}
    figure, panels = common.figure_of(2, height=3.6)
    sigma = noise("7_seeds", [f"seed{seed}" for seed in range(1, 9)])
    numbers["seeds: standard deviation of val loss after 300 steps"] = f"{sigma:.4f}"
    compare(EXPERIMENT, MOVES, sigma, panels[0], numbers)
    panels[0].set_title("On one CPU: difference of the training loss", fontsize=10)
    sigma = noise("3_gpu", ["never_moved", "seed2", "seed3"])
    compare("3_gpu", GPU_MOVES, sigma, panels[1], numbers)
    panels[1].set_title("To a GPU and back, on another machine", fontsize=10)
    panels[1].axvline(225, color="0.6", ls=":", lw=1)
    common.save(figure, EXPERIMENT)
    common.report(EXPERIMENT, numbers)


if __name__ == "__main__":
    sys.exit(main())
