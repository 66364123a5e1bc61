"""1. Does the text become coherent, and do the benchmarks rise, as the validation loss falls?

Expected: yes, and accuracy by what the context adds (acc_pmi) leaves chance first. Refuted if the
accuracies stay at chance, or leave it in one seed only. All quantities change with time, so their
curves correlate whatever causes them. What counts is whether their changes do, from one evaluation
to the next, after the slow trend of these changes is taken out.
"""
import sys
from statistics import NormalDist

import common
import numpy as np
from common import BLUE, GREEN, ORANGE

from plot_dynamics import escape, table_row
from support.flags import Parser
from support.runs import script

EXPERIMENT = "1_emergence"
SEEDS = (1, 2, 3)
METRICS = [  # event, key, title, its value by chance and the key of its standard error, if any
    ("benchmark", "acc", "acc: likeliest ending", 0.25, None),
    ("benchmark", "acc_norm", "acc_norm: likeliest per token", 0.25, None),
    ("benchmark", "acc_pmi", "acc_pmi: what the context adds", 0.25, None),
    ("eval", "context_gain", "context gain, nats", 0.0, "context_gain_stderr"),
    ("sample", "repetition", "sample: 4-grams seen before", None, None),
    ("sample", "distinct_2", "sample: different bigrams", None, None),
]


def series(run, event, key):
    """Steps, validation losses and values of a metric where all are known."""
    losses = dict(zip(*common.points(run, "eval", "val_loss")))
    found = [(s, losses[s], v) for s, v in zip(*common.points(run, event, key)) if s in losses]
    return np.array(found).T


def threshold(run, metric):
    """The value that chance alone passes in 2.3 % of all trajectories, not of all evaluations:
    2 standard errors, and more because one looks often (Bonferroni)."""
    event, key, _, chance, stderr = metric
    looks = len(run.rows[event])
    z = NormalDist().inv_cdf(1 - 0.0228 / looks)
    if stderr is None:
        n = run.rows[event][-1]["n"]
        return np.full(looks, chance + z * np.sqrt(chance * (1 - chance) / n))
    return chance + z * common.column(run.rows[event], stderr)


def leaves_chance(run, metric):
    """Index of the first evaluation from which on the metric stays above the threshold; None if it
    does not."""
    below = np.flatnonzero(series(run, *metric[:2])[2] <= threshold(run, metric))
    first = below[-1] + 1 if len(below) else 0
    return first if first < len(run.rows[metric[0]]) else None


@script
def main(argv=None):
    Parser(description=__doc__.split("\n")[0]).parse_args(argv)
    runs = [common.log_of(EXPERIMENT, f"seed{seed}") for seed in SEEDS]
    figure, panels = common.figure_of(3, 2)
    numbers = {"val_bpb at the end": common.text([common.last(r, "eval", "val_bpb") for r in runs])}
    for panel, metric in zip(panels, METRICS):
        event, key, title, chance, _ = metric
        left = []
        found = {"whole, Pearson": [], "whole, Spearman": [], "changes, Pearson": [],
                 "changes, Spearman": []}
        for run, seed, colour in zip(runs, SEEDS, (BLUE, ORANGE, GREEN)):
            steps, losses, values = series(run, event, key)
            panel.plot(losses, values, ".-", ms=4, lw=0.8, color=colour, label=f"seed {seed}")
            found["whole, Pearson"].append(common.pearson(losses, values))
            found["whole, Spearman"].append(common.spearman(losses, values))
            even = (steps > 0) & (steps % 150 == 0)  # equally far apart
            both = [common.changes(steps[even], x[even]) for x in (losses, values)]
            found["changes, Pearson"].append(common.pearson(*both))
            found["changes, Spearman"].append(common.spearman(*both))
            if chance is not None and (place := leaves_chance(run, metric)) is not None:
                panel.plot(losses[place], values[place], "o", ms=11, mfc="none", color=colour)
                left.append((int(steps[place]), losses[place]))
        if chance is not None:
            panel.axhline(chance, color="0.5", ls="--", lw=1)
            if len(left) == len(runs):
                steps = ", ".join(f"{step:,}" for step, _ in left)
                numbers[f"{key} leaves chance at step"] = steps
                numbers[f"{key} leaves chance at val loss"] = common.text([x for _, x in left], 2)
            else:
                numbers[f"{key} leaves chance"] = f"in {len(left)} of {len(runs)} seeds"
            numbers[f"{key} at the end"] = common.text([series(r, event, key)[2, -1] for r in runs])
        for kind, values in found.items():
            numbers[f"{key}, {kind}"] = common.text(values, 2)
        panel.set(title=title, xlabel="validation loss, nats (falls to the right)")
        panel.title.set_fontsize(10)
        panel.invert_xaxis()
    panels[0].legend(fontsize=8)
    figure.suptitle("Circles: where a metric leaves chance (dashed) for good", fontsize=11)
    common.save(figure, EXPERIMENT)
    write_samples(runs)
    common.report(EXPERIMENT, numbers)


def write_samples(runs):
    """trajectory.md: each seed's sample just before and after acc_pmi leaves chance, and last."""
    lines = ["# Samples before and after acc_pmi leaves chance", "",
             table_row(["seed", "step", "val loss", "“The function returns” goes on with"]),
             "|---:|---:|---:|---|"]
    for seed, run in zip(SEEDS, runs):
        place = leaves_chance(run, METRICS[2])
        losses = dict(zip(*common.points(run, "eval", "val_loss")))
        for row in [run.rows["sample"][i] for i in (place - 1, place, -1)]:
            lines.append(table_row([str(seed), f"{row['step']:,}", f"{losses[row['step']]:.2f}",
                                    escape(row["text"])]))
    path = common.LOGS / EXPERIMENT / "trajectory.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
