"""7. How far are runs apart that differ in nothing but the seed of weights and data order?

This is the noise that every difference in the other experiments is judged against. No expectation.
"""
import math
from statistics import fmean, stdev

import common

from plot_dynamics import COLOURS
from support.runs import script

EXPERIMENT = "7_seeds"
# 95 % interval of a standard deviation from 8 values, as factors: √(7 / quantiles of χ² with 7
# degrees of freedom, 16.01 and 1.690).
LOWER = math.sqrt(7 / 16.01)
UPPER = math.sqrt(7 / 1.690)


@script
def main(argv=None):
    common.without_flags(__doc__, argv)
    runs = common.runs_of(EXPERIMENT, "seed", range(1, 9))
    longer = common.runs_of("1_emergence", "seed")
    numbers = {}
    for key in ("val_loss", "val_bpb"):
        ends = common.ends(runs, "eval", key)
        sigma = stdev(ends)
        numbers[f"{key} after 300 steps, 8 seeds"] = common.text(ends, 4)
        numbers[f"{key} after 300 steps: standard deviation"] = (
            f"{sigma:.4f} ({sigma * LOWER:.4f} to {sigma * UPPER:.4f})")
        numbers[f"{key} after 3,800 steps: standard deviation, 3 seeds"] = (
            f"{stdev(common.ends(longer, 'eval', key)):.4f}")
    for key in ("acc", "acc_norm", "acc_pmi"):
        sigma = stdev(common.ends(longer, "benchmark", key))
        stderr = fmean(common.ends(longer, "benchmark", key.replace("acc", "stderr")))
        numbers[f"{key} after 3,800 steps: standard deviation, 3 seeds"] = (
            f"{sigma:.3f} (standard error over questions {stderr:.3f})")
    for event, key in (("eval", "val_bpb"), ("benchmark", "acc_pmi")):
        numbers[f"{key} after 3,800 steps: seeds 1, 2, 3"] = ", ".join(
            f"{end:.3f}" for end in common.ends(longer, event, key))
    numbers["context gain after 3,800 steps: standard deviation, 3 seeds"] = (
        f"{stdev(common.ends(longer, 'eval', 'context_gain')):.3f}")

    figure, panels = common.figure_of(2)
    for panel, group, colour in zip(panels, (runs, longer), COLOURS):
        steps, curves = common.curves_of(group, "eval", "val_bpb")
        panel.plot(steps + 1, (curves - curves.mean(0)).T, ".-", lw=1, color=colour, alpha=0.7)
        panel.set(xscale="log", xlabel="step + 1", ylabel="bits per byte, minus the mean",
                  title=f"{len(group)} seeds, {steps[-1]:,.0f} steps")
    common.report(EXPERIMENT, figure, numbers)


if __name__ == "__main__":
    main()
