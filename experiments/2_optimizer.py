"""2. What does it cost to resume without the optimizer's state?

Expected: a jump of the loss, larger with a higher learning rate, because the first updates move
every weight by about lr; then it goes away. Refuted if the excess (loss of the reset run minus that
of the restored one, on the same batches) is within the spread between seeds.

Grid: stopped at step 100 of 200. Four ways: stopped at 200 of 400, lr 3e-3, beta2 0.95. Long: the
same, but 2,000 steps follow.
"""
import sys

import common
import numpy as np
from common import BLUE, GREEN, ORANGE, PURPLE

from support.flags import Parser
from support.runs import script

EXPERIMENT = "2_optimizer"
SEEDS = (1, 2, 3)
RATES = ("1e-3", "3e-3", "6e-3")
BETAS = ("0.95", "0.99", "0.999")


def curve(name, key="loss"):
    """Steps and values of the training rows of a log."""
    return common.points(common.log_of(EXPERIMENT, name), "train", key)


def difference(name, base):
    """Steps of the log `base`, and the losses of `name` minus its own there: on the same batches.
    Both (n,)."""
    losses = dict(zip(*curve(name)))
    steps, base_losses = curve(base)
    return steps, np.array([losses[step] for step in steps]) - base_losses


def excess(name):
    """What a reset costs, in a run of the grid."""
    return difference(f"reset{name}", f"full{name}")


def smooth(values, width=10):
    """Mean over `width` values, the last of them the present one."""
    return np.convolve(values, np.ones(width) / width, "valid")


def end(name):
    return common.last(common.log_of(EXPERIMENT, name), "eval", "val_bpb")


def noise():
    """Standard deviation of the validation loss between the seeds of experiment 7."""
    return common.spread([common.last(common.log_of("7_seeds", f"seed{seed}"), "eval", "val_loss")
                          for seed in range(1, 9)])


def cell(lr, beta2):
    """The numbers of a cell of the grid: {what: one value for each seed}."""
    names = [f"_lr{lr}_beta{beta2}_seed{seed}" for seed in SEEDS]
    curves = [excess(name)[1] for name in names]
    above = np.flatnonzero(smooth(np.mean(curves, axis=0)) > noise())
    return {"first 20": [c[:20].mean() for c in curves],
            "peak": [smooth(c, 3).max() for c in curves],
            "last 50": [c[-50:].mean() for c in curves],
            "last step above noise": 0 if len(above) == 0 else int(above[-1]) + 10,
            "bits per byte": [end(f"reset{name}") - end(f"full{name}") for name in names]}


def draw_grid(panels):
    for lr, colour in zip(RATES, (BLUE, GREEN, ORANGE)):
        names = [f"_lr{lr}_beta0.95_seed{seed}" for seed in SEEDS]
        steps, _ = excess(names[0])
        curves = np.array([smooth(excess(name)[1], 5) for name in names])
        panels[0].plot(steps[4:], curves.mean(0), color=colour, label=f"lr {lr}")
        panels[0].fill_between(steps[4:], curves.min(0), curves.max(0), color=colour, alpha=0.2)
        for kind, style in (("reset", "-"), ("full", ":")):
            rms = np.mean([curve(kind + name, "update_rms")[1] for name in names], axis=0)
            panels[1].plot(steps, rms, style, color=colour, label=f"{kind}, lr {lr}")
    panels[0].set(title="Without the moments the loss jumps, more with a\nhigher rate (beta2 0.95; "
                  "mean and range of 3 seeds)", xlabel="step", ylabel="excess, nats")
    panels[1].set(title="Why: after a reset the updates are several\ntimes as large", xlabel="step",
                  ylabel="RMS of the change", yscale="log")


WAYS = (("reset", ORANGE, "moments reset"),
        ("paper", PURPLE, "as released: also a longer horizon"),
        ("rewarm", GREEN, "reset, 100 steps of warm-up"))


def of_way(way):
    """Steps 201 to 400, and for each seed the loss of a way minus that of the full state."""
    found = [difference(f"{way}{seed}", f"full{seed}") for seed in SEEDS]
    return found[0][0], [losses for _, losses in found]


def draw_ways(panel):
    for way, colour, label in WAYS:
        steps, curves = of_way(way)
        curves = [smooth(found) for found in curves]
        panel.plot(steps[9:], np.mean(curves, axis=0), color=colour, label=label)
        panel.fill_between(steps[9:], np.min(curves, 0), np.max(curves, 0), color=colour, alpha=0.2)
    panel.set(title="A warm-up avoids the jump, and costs more later", xlabel="step",
              ylabel="loss minus that of full state")


def long_excess():
    """Every fourth step from 204 on, and for each seed reset minus full."""
    found = [difference(f"long_reset{seed}", f"long_full{seed}") for seed in SEEDS]
    return found[0][0], [losses for _, losses in found]


def draw_long(panel):
    steps, curves = long_excess()
    for seed, colour, found in zip(SEEDS, (BLUE, ORANGE, GREEN), curves):
        panel.plot(steps[24:], smooth(found, 25), color=colour, lw=1, label=f"seed {seed}")
    panel.set(title="2,000 steps later (lr 3e-3; mean of 100 steps)", xlabel="step",
              ylabel="excess, nats")


@script
def main(argv=None):
    Parser(description=__doc__.split("\n")[0]).parse_args(argv)
    figure, panels = common.figure_of(2, 2, 3.2)
    draw_grid(panels)
    draw_ways(panels[2])
    draw_long(panels[3])
    for panel in panels:
        panel.legend(fontsize=7)
        panel.title.set_fontsize(10)
        if panel is not panels[1]:
            panel.axhline(0, color="0.5", lw=1)
    common.save(figure, EXPERIMENT)
    common.report(EXPERIMENT, numbers())


def numbers():
    found = {"noise of seeds: standard deviation of val loss (7)": f"{noise():.3f}"}
    for lr in RATES:
        for beta2 in BETAS:
            values = cell(lr, beta2)
            name = f"lr {lr}, beta2 {beta2}"
            for what in ("first 20", "peak", "last 50", "bits per byte"):
                found[f"{name}: {what}"] = common.text(values[what], 3, sign=True)
            found[f"{name}: last step above the noise of seeds"] = values["last step above noise"]
        sizes = [[curve(f"{kind}_lr{lr}_beta0.95_seed{seed}", "update_rms")[1][0] for seed in SEEDS]
                 for kind in ("reset", "full")]
        found[f"lr {lr}, beta2 0.95: first update, reset / full"] = (
            common.text(np.divide(*sizes), 1))
    for way, _, _ in WAYS:
        steps, curves = of_way(way)
        found[f"four ways, {way}: first 20"] = common.text([c[:20].mean() for c in curves], 3, True)
        found[f"four ways, {way}: last 50 of the common steps"] = common.text(
            [c[-50:].mean() for c in curves], 3, True)
    for way in ("reset", "rewarm"):  # not "paper", which makes 200 more steps
        found[f"four ways, {way}: bits per byte at the end"] = common.text(
            [end(f"{way}{seed}") - end(f"full{seed}") for seed in SEEDS], 3, True)
    _, curves = long_excess()
    for first in (0, 500, 1000, 1500):
        part = slice(first // 4, (first + 500) // 4)
        found[f"long: excess in steps {first + 1} to {first + 500} after the resume"] = (
            common.text([c[part].mean() for c in curves], 3, True))
    ends = [end(f"long_reset{seed}") - end(f"long_full{seed}") for seed in SEEDS]
    found["long: bits per byte at the end, reset minus full"] = common.text(ends, 3, True)
    found["long: the same for each seed"] = ", ".join(f"{value:+.3f}" for value in ends)
    found["long: spread of the full runs between seeds"] = (
        f"{common.spread([end(f'long_full{seed}') for seed in SEEDS]):.3f}")
    return found


if __name__ == "__main__":
    sys.exit(main())
