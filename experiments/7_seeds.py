"""7. How far are runs apart that differ in nothing but the seed of weights and data order?

This is the noise that every difference in the other experiments is judged against. No expectation.
logs/7_seeds/default.jsonl is `python train.py`, with its default seed 1337, on the same machine.
"""
import math
import sys

import common
import numpy as np
from common import BLUE, ORANGE

from support.flags import Parser
from support.runs import script

EXPERIMENT = "7_seeds"
SEEDS = range(1, 9)
# 95 % interval of a standard deviation from 8 values, as factors: √(7 / quantiles of χ² with 7
# degrees of freedom, 16.01 and 1.690).
FACTORS = (math.sqrt(7 / 16.01), math.sqrt(7 / 1.690))


@script
def main(argv=None):
    Parser(description=__doc__.split("\n")[0]).parse_args(argv)
    runs = [common.log_of(EXPERIMENT, f"seed{seed}") for seed in SEEDS]
    longer = [common.log_of("1_emergence", f"seed{seed}") for seed in (1, 2, 3)]
    numbers = {}
    for key, digits in (("val_loss", 4), ("val_bpb", 4)):
        ends = [common.last(run, "eval", key) for run in runs]
        sigma = common.spread(ends)
        numbers[f"{key} after 300 steps, 8 seeds"] = common.text(ends, digits)
        numbers[f"{key} after 300 steps: standard deviation"] = (
            f"{sigma:.{digits}f} ({sigma * FACTORS[0]:.{digits}f} to "
            f"{sigma * FACTORS[1]:.{digits}f})")
        ends = [common.last(run, "eval", key) for run in longer]
        numbers[f"{key} after 3,800 steps: standard deviation, 3 seeds"] = (
            f"{common.spread(ends):.{digits}f}")
    for key in ("acc", "acc_norm", "acc_pmi"):
        ends = [common.last(run, "benchmark", key) for run in longer]
        stderr = np.mean([common.last(run, "benchmark", key.replace("acc", "stderr"))
                          for run in longer])
        numbers[f"{key} after 3,800 steps: standard deviation, 3 seeds"] = (
            f"{common.spread(ends):.3f} (standard error over questions {stderr:.3f})")
    default = common.log_of(EXPERIMENT, "default")
    for event, key in (("eval", "val_bpb"), ("benchmark", "acc_pmi")):
        numbers[f"{key} after 3,800 steps: seeds 1, 2, 3; 1337"] = ", ".join(
            f"{common.last(run, event, key):.3f}" for run in [*longer, default])
    numbers["context gain after 3,800 steps: standard deviation, 3 seeds"] = (
        f"{common.spread([common.last(run, 'eval', 'context_gain') for run in longer]):.3f}")

    figure, panels = common.figure_of(2)
    for panel, group, colour in ((panels[0], runs, BLUE), (panels[1], longer, ORANGE)):
        curves = np.array([common.points(run, "eval", "val_bpb")[1] for run in group])
        steps = common.points(group[0], "eval", "val_bpb")[0]
        for curve in curves - curves.mean(0):
            panel.plot(steps + 1, curve, ".-", lw=1, color=colour, alpha=0.7)
        panel.set(xscale="log", xlabel="step + 1", ylabel="bits per byte, minus the mean")
        panel.set_title(f"{len(group)} seeds, {int(steps[-1]):,} steps", fontsize=10)
    common.save(figure, EXPERIMENT)
    common.report(EXPERIMENT, numbers)


if __name__ == "__main__":
    sys.exit(main())
