"""1. Does the text become coherent, and do the benchmarks rise, as the validation loss falls?

All quantities change with time, so their curves correlate whatever causes them. So we compare their
changes too, from one evaluation to the next, without the slow trend of these changes; from step 600
on, since the first changes are steeper than a parabola can follow. Would a correlation be seen
there if a metric did nothing but follow the loss? "Expected" says how large it would be, given the
noise of the metric.
"""
from statistics import NormalDist

import common
from common import SEEDS

import numpy as np

from plot_dynamics import COLOURS, escape, points, table_row
from support.runs import script

EXPERIMENT = "1_emergence"
CHANCE = 0.25  # of the accuracies. That of the context gain is not known: the parts of the window
# differ in their text, and it is 0.1 at step 8, where no context is used.
METRICS = [  # event, key, title
    ("benchmark", "acc", "acc: likeliest ending"),
    ("benchmark", "acc_norm", "acc_norm: likeliest per token"),
    ("benchmark", "acc_pmi", "acc_pmi: what the context adds"),
    ("eval", "context_gain", "context gain, nats"),
    ("sample", "repetition", "sample: 4-grams seen before"),
    ("sample", "distinct_2", "sample: different bigrams"),
]


def series(run, event, key):
    """Steps, validation losses and values of a metric where all are known."""
    return common.together(points(run, "eval", "val_loss"), points(run, event, key))


def leaves_chance(run, key):
    """Index of the first evaluation from which on an accuracy stays above chance; None if there is
    none. Above means by 2 standard errors, widened for the number of evaluations (Bonferroni): so
    chance alone is above once in at most 2.3 % of all trajectories, and stays there in fewer."""
    rows = run.rows["benchmark"]
    z = NormalDist().inv_cdf(1 - 0.0228 / len(rows))
    threshold = CHANCE + z * np.sqrt(CHANCE * (1 - CHANCE) / rows[-1]["n"])
    values = series(run, "benchmark", key)[2]
    first = np.flatnonzero(values <= threshold).max(initial=-1) + 1
    return first if first < len(values) else None


def correlations(steps, losses, values):
    """{kind: correlation of a metric with the loss}, over the run and between the changes."""
    even = (steps >= 600) & (steps % 150 == 0)  # equally far apart
    x = common.changes(steps[even], losses[even])
    y = common.changes(steps[even], values[even])
    slope = np.polyfit(losses[even], values[even], 1)[0]
    return {"whole, Pearson": common.pearson(losses, values),
            "changes, Pearson": common.pearson(x, y),
            "changes, expected if it followed the loss": slope * np.std(x) / np.std(y)}


@script
def main(argv=None):
    common.without_flags(__doc__, argv)
    runs = common.runs_of(EXPERIMENT, "seed")
    figure, panels = common.figure_of(3, 2)
    numbers = {"val_bpb at the end": common.text(common.ends(runs, "eval", "val_bpb"))}
    for panel, (event, key, title) in zip(panels, METRICS):
        left = []
        found = []
        for run, seed, colour in zip(runs, SEEDS, COLOURS):
            steps, losses, values = series(run, event, key)
            panel.plot(losses, values, ".-", ms=4, lw=0.8, color=colour, label=f"seed {seed}")
            found.append(correlations(steps, losses, values))
            place = leaves_chance(run, key) if event == "benchmark" else None
            if place is not None:
                panel.plot(losses[place], values[place], "o", ms=11, mfc="none", color=colour)
                left.append((steps[place], losses[place]))
        if event == "benchmark":
            panel.axhline(CHANCE, color="0.5", ls="--", lw=1)
            left_at = [f"{step:,.0f}" for step, _ in left] + ["never"] * (len(runs) - len(left))
            numbers[f"{key} leaves chance at step"] = ", ".join(left_at)
            if len(left) > 1:
                numbers[f"{key} leaves chance at val loss"] = common.text([x for _, x in left], 2)
        numbers[f"{key} at the end"] = common.text(common.ends(runs, event, key))
        for kind in found[0]:
            numbers[f"{key}, {kind}"] = common.text([values[kind] for values in found], 2)
        panel.set(title=title, xlabel="validation loss, nats (falls to the right)")
        panel.invert_xaxis()
    panels[0].legend()
    figure.suptitle("Circles: where a metric leaves chance (dashed) for good", fontsize=11)
    write_samples(runs)
    common.report(EXPERIMENT, figure, numbers)


def write_samples(runs):
    """trajectory.md: each seed's sample just before and after acc_pmi leaves chance, and last."""
    lines = ["# Samples before and after acc_pmi leaves chance", "",
             table_row(["seed", "step", "val loss", "“The function returns” goes on with"]),
             "|---:|---:|---:|---|"]
    for seed, run in zip(SEEDS, runs):
        steps, losses, _ = series(run, "benchmark", "acc_pmi")
        texts = {row["step"]: row["text"] for row in run.rows["sample"]}
        place = leaves_chance(run, "acc_pmi")
        for i in [-1] if place is None else [place - 1, place, -1]:
            lines.append(table_row([str(seed), f"{steps[i]:,.0f}", f"{losses[i]:.2f}",
                                    escape(texts[steps[i]])]))
    path = common.LOGS / EXPERIMENT / "trajectory.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
