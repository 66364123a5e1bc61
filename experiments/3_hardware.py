"""3. Does a run stay the same when it moves to other hardware?

A run stopped at step 150 of 300 goes on with other processes, micro-batches, precision, kernels,
threads.
"""
from statistics import stdev

import common

import numpy as np

from plot_dynamics import COLOURS, points
from support.runs import script

EXPERIMENT = "3_hardware"
MOVES = {"stayed": "stopped and resumed", "micro_batch_2": "micro-batch 8 → 2",
         "threads_2": "1 → 2 threads", "processes_2": "1 → 2 processes",
         "compiled": "eager → compiled", "fp32": "bf16 → fp32"}
GPU_MOVES = {"gpu": "CPU → GPU", "gpu_and_back": "CPU → GPU → CPU",
             "gpu_from_the_start": "all on the GPU"}


def compare(experiment, moves, seeds, panel):
    """Draw how far the losses of moved runs are from those of the one that never moved. Returns
    {what: text}, and the standard deviation of the validation loss over seeds."""
    numbers = {}
    sigma = stdev(common.ends(seeds, "eval", "val_loss"))
    base = common.log_of(experiment, "never_moved")
    for (name, label), colour in zip(moves.items(), COLOURS):
        run = common.log_of(experiment, name)
        steps, moved, stayed = common.together(points(run, "train", "loss"),
                                               points(base, "train", "loss"))
        gap = np.maximum(np.abs(moved - stayed), 1e-8)  # 0 has no place on a logarithmic axis
        panel.plot(steps, gap, lw=1, color=colour, label=label)
        end, base_end = common.ends([run, base], "eval", "val_loss")
        numbers[f"{label}: val loss at the end, shift"] = f"{end - base_end:+.5f}"
        numbers[f"{label}: in standard deviations of seeds"] = f"{(end - base_end) / sigma:+.2f}"
        numbers[f"{label}: largest difference of a step's loss"] = f"{gap.max():.1e}"
        _, rates = points(run, "train", "tok_per_s")
        before = np.median(rates[steps <= 150])
        after = np.median(rates[steps > 250])
        numbers[f"{label}: tokens/s"] = f"{before:,.0f} → {after:,.0f}"
    panel.axhline(sigma, color="0.3", ls="--", lw=1)
    panel.text(102, sigma * 1.2, "standard deviation of val loss between seeds", fontsize=8)
    panel.axvline(150, color="0.6", ls=":", lw=1)
    panel.set(yscale="log", ylim=(5e-9, 1), xlabel="step", ylabel="nats")
    panel.legend(fontsize=7, loc="lower right")
    return numbers, sigma


@script
def main(argv=None):
    common.without_flags(__doc__, argv)
    figure, panels = common.figure_of(2, height=3.6)
    seeds = common.runs_of("7_seeds", "seed", range(1, 9))
    numbers, sigma = compare(EXPERIMENT, MOVES, seeds, panels[0])
    seeds = [common.log_of("3_gpu", name) for name in ("never_moved", "seed2", "seed3")]
    gpu_numbers, _ = compare("3_gpu", GPU_MOVES, seeds, panels[1])
    panels[0].set_title("On one CPU: difference of the training loss")
    panels[1].set_title("To a GPU and back, on another machine")
    panels[1].axvline(225, color="0.6", ls=":", lw=1)
    first = {"seeds: standard deviation of val loss after 300 steps": f"{sigma:.4f}"}
    common.report(EXPERIMENT, figure, first | numbers | gpu_numbers)


if __name__ == "__main__":
    main()
