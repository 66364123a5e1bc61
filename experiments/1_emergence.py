"""1. Does the text become coherent, and do the benchmarks rise, as the validation loss falls?

Expected: yes, and accuracy by what the context adds (acc_pmi) leaves chance first. Refuted if the
accuracies stay at chance, or leave it in one seed only. All quantities change with time, so their
curves correlate whatever causes them. So we look at their changes too, from one evaluation to the
next, after the slow trend of these changes is taken out; from step 600 on, since the first ones are
steeper than a parabola can follow. Would a correlation be seen there if a metric did nothing but
follow the loss? "Expected" says how large it would be, given the noise of the metric.
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
METRICS = [  # event, key, title, its value by chance. That of the context gain is not known: the
    # parts of the window differ in their text, and it is 0.1 at step 8, where nothing is used.
    ("benchmark", "acc", "acc: likeliest ending", 0.25),
    ("benchmark", "acc_norm", "acc_norm: likeliest per token", 0.25),
    ("benchmark", "acc_pmi", "acc_pmi: what the context adds", 0.25),
    ("eval", "context_gain", "context gain, nats", None),
    ("sample", "repetition", "sample: 4-grams seen before", None),
    ("sample", "distinct_2", "sample: different bigrams", None),
]


def series(run, event, key):
    """Steps, validation losses and values of a metric where all are known."""
    losses = dict(zip(*common.points(run, "eval", "val_loss")))
    found = [(s, losses[s], v) for s, v in zip(*common.points(run, event, key)) if s in losses]
    return np.array(found).T


def threshold(run):
    """The accuracy that chance alone passes in 2.3 % of all trajectories, not of all evaluations: 2
    standard errors, and more because one looks often (Bonferroni)."""
    rows = run.rows["benchmark"]
    z = NormalDist().inv_cdf(1 - 0.0228 / len(rows))
    return 0.25 + z * np.sqrt(0.25 * 0.75 / rows[-1]["n"])


def leaves_chance(run, key):
    """Index of the first evaluation from which on an accuracy stays above the threshold; None if it
    does not."""
    values = series(run, "benchmark", key)[2]
    below = np.flatnonzero(values <= threshold(run))
    first = below[-1] + 1 if len(below) else 0
    return int(first) if first < len(values) else None


def correlations(steps, losses, values):
    """{kind: correlation of a metric with the loss}, over the run and between the changes."""
    even = (steps >= 600) & (steps % 150 == 0)  # equally far apart
    x, y = [common.changes(steps[even], found[even]) for found in (losses, values)]
    slope = np.polyfit(losses[even], values[even], 1)[0]
    expected = slope * np.std(x) / np.std(y) if np.std(y) > 0 else 0.0
    return {"whole, Pearson": common.pearson(losses, values),
            "whole, Spearman": common.spearman(losses, values),
            "changes, Pearson": common.pearson(x, y), "changes, Spearman": common.spearman(x, y),
            "changes, expected if it followed the loss": expected}


@script
def main(argv=None):
    Parser(description=__doc__.split("\n")[0]).parse_args(argv)
    runs = [common.log_of(EXPERIMENT, f"seed{seed}") for seed in SEEDS]
    figure, panels = common.figure_of(3, 2)
    numbers = {"val_bpb at the end": common.text([common.last(r, "eval", "val_bpb") for r in runs])}
    for panel, (event, key, title, chance) in zip(panels, METRICS):
        left = []
        found = []
        for run, seed, colour in zip(runs, SEEDS, (BLUE, ORANGE, GREEN)):
            steps, losses, values = series(run, event, key)
            panel.plot(losses, values, ".-", ms=4, lw=0.8, color=colour, label=f"seed {seed}")
            found.append(correlations(steps, losses, values))
            place = None if chance is None else leaves_chance(run, key)
            if place is not None:
                panel.plot(losses[place], values[place], "o", ms=11, mfc="none", color=colour)
                left.append((int(steps[place]), losses[place]))
        if chance is not None:
            panel.axhline(chance, color="0.5", ls="--", lw=1)
            numbers[f"{key} leaves chance at step"] = ", ".join(
                [f"{step:,}" for step, _ in left] + ["never"] * (len(runs) - len(left)))
            if len(left) > 1:
                numbers[f"{key} leaves chance at val loss"] = common.text([x for _, x in left], 2)
        numbers[f"{key} at the end"] = common.text([series(r, event, key)[2, -1] for r in runs])
        for kind in found[0]:
            numbers[f"{key}, {kind}"] = common.text([values[kind] for values in found], 2)
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
        steps, losses, _ = series(run, "benchmark", "acc_pmi")
        place = leaves_chance(run, "acc_pmi")
        shown = [len(steps) - 1] if place is None else [max(0, place - 1), place, len(steps) - 1]
        texts = {row["step"]: row["text"] for row in run.rows["sample"]}
        for i in shown:
            lines.append(table_row([str(seed), f"{steps[i]:,.0f}", f"{losses[i]:.2f}",
                                    escape(texts[steps[i]])]))
    path = common.LOGS / EXPERIMENT / "trajectory.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
