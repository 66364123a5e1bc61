"""2. What does it cost to resume without the optimizer's state?

The excess is the loss of the reset run minus that of the restored one, on the same batches.

Grid: stopped at step 100 of 200. Four ways: stopped at 200 of 400, lr 3e-3, beta2 0.95. Long: the
same, also at lr 1e-3, but 2,000 steps follow, of which every fourth is logged; and with the state,
but for one bit.
"""
from statistics import stdev

import common
from common import SEEDS, noise_of_seeds, smooth

import numpy as np

from plot_dynamics import COLOURS, points
from support.runs import script

EXPERIMENT = "2_optimizer"
RATES = {"1e-3": ":", "3e-3": "--", "6e-3": "-"}  # and how they are drawn
BETAS = ("0.95", "0.99", "0.999")
LONG = {"long": "3e-3", "low": "1e-3"}  # names of the runs of 2,000 steps more, and their rates
# A way to go on has the same colour in all panels.
WITH, WITHOUT, REWARM, RELEASED = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[4]
WAYS = {"reset": ("without the state", WITHOUT),
        "paper": ("without the state, as in the released code", RELEASED),
        "rewarm": ("without it, 100 steps of warm-up", REWARM)}


def excess(name, base):
    """Steps after the resume (n,), and for each seed the training losses of the run `name` minus
    those of the run `base`, (seeds, n)."""
    curves = []
    for run, other in zip(common.runs_of(EXPERIMENT, name), common.runs_of(EXPERIMENT, base)):
        steps, losses, base_losses = common.together(points(run, "train", "loss"),
                                                     points(other, "train", "loss"))
        resumed, *_ = run.marks[-1]
        after = steps > resumed
        curves.append((losses - base_losses)[after])
    return steps[after], np.array(curves)


def bits(name):
    """Bits per byte at the end, (seeds,)."""
    return common.ends(common.runs_of(EXPERIMENT, name), "eval", "val_bpb")


def updates(name):
    """Steps (n,), and for each seed how far a step moves the weights, (seeds, n)."""
    return common.curves_of(common.runs_of(EXPERIMENT, name), "train", "update_rms")


def draw_resume(panel):
    stop = common.runs_of(EXPERIMENT, "full")[0].marks[-1][0]
    for way, first, last, colour, label in (
            ("full", stop - 50, stop, "0.4", "before the stop"),
            ("reset", stop, stop + 100, WITHOUT, "resumed without the optimizer's state"),
            ("full", stop, stop + 100, WITH, "resumed with it")):
        steps, curves = common.curves_of(common.runs_of(EXPERIMENT, way), "train", "loss")
        part = (first < steps) & (steps <= last)
        common.draw_band(panel, steps[part][2:-2], smooth(curves[:, part], 5), colour, label)
    panel.axvline(stop, color="0.3", ls=":", label="stopped and resumed")
    panel.set(title="Each run resumed in two ways", ylabel="training loss, nats")


def draw_grid(first, second):
    for lr, style in RATES.items():
        name = f"_lr{lr}_beta0.95_seed"
        steps, curves = excess(f"reset{name}", f"full{name}")
        common.draw_band(first, steps[4:], smooth(curves, 5), WITHOUT, f"lr {lr}", style)
        for way, colour, label in (("reset", WITHOUT, "without"), ("full", WITH, "with")):
            steps, sizes = updates(way + name)
            second.plot(steps, sizes.mean(0), style, color=colour,
                        label=f"{label} the state, lr {lr}")
    first.set(title="The jump is larger with higher learning rates", ylabel="excess, nats")
    second.set(title="Why: the first updates are several times as large",
               ylabel="RMS of the change", yscale="log")


def draw_ways(panel):
    for way, (label, colour) in WAYS.items():
        steps, curves = excess(way, "full")
        common.draw_band(panel, steps[9:], smooth(curves, 10), colour, label)
    panel.text(steps[-1], -0.045, "has another learning rate", color=RELEASED, ha="right",
               fontsize=8)
    panel.set(title="A warm-up avoids the jump, and costs more later", ylabel="excess, nats")


def draw_long(panel):
    for way, colour, label in (("reset", WITHOUT, "without the state"),
                               ("bit", "0.4", "with it, but for one bit of one weight")):
        for name, lr in LONG.items():
            steps, curves = excess(f"{name}_{way}", f"{name}_full")
            common.draw_band(panel, steps[24:], smooth(curves, 25), colour, f"{label}, lr {lr}",
                             RATES[lr])
    panel.set(title="What is left over 2,000 steps", ylabel="excess, nats")


def numbers():
    """{what: text or number}: the excess in each cell of the grid, the four ways, the long runs."""
    noise = noise_of_seeds()
    found = {"noise of seeds: standard deviation of val loss (7)": f"{noise:.3f}"}

    def add(what, values):
        found[what] = common.text(values, sign=True)

    for lr in RATES:
        for beta2 in BETAS:
            what = f"lr {lr}, beta2 {beta2}"
            name = f"_lr{lr}_beta{beta2}_seed"
            _, curves = excess(f"reset{name}", f"full{name}")
            add(f"{what}: first 20", curves[:, :20].mean(1))
            add(f"{what}: peak", smooth(curves, 3).max(1))
            add(f"{what}: last 50", curves[:, -50:].mean(1))
            add(f"{what}: bits per byte", bits(f"reset{name}") - bits(f"full{name}"))
            above = np.flatnonzero(smooth(curves.mean(0), 10) > noise)
            found[f"{what}: last step above the noise of seeds"] = int(above.max(initial=-10)) + 10
        name = f"_lr{lr}_beta0.95_seed"
        ratios = updates(f"reset{name}")[1][:, 0] / updates(f"full{name}")[1][:, 0]
        found[f"lr {lr}, beta2 0.95: first update, reset / full"] = common.text(ratios, 1)
    for way in WAYS:
        _, curves = excess(way, "full")
        add(f"four ways, {way}: first 20", curves[:, :20].mean(1))
        add(f"four ways, {way}: last 50 of the common steps", curves[:, -50:].mean(1))
    for way in ("reset", "rewarm"):  # not "paper", which makes 200 more steps
        add(f"four ways, {way}: bits per byte at the end", bits(way) - bits("full"))
    return {**found, **numbers_of_long()}


def numbers_of_long():
    """The same for the runs of 2,000 steps more: what a reset moves, and what chance does."""
    found = {}
    for name, lr in LONG.items():
        for way, label in (("reset", "reset"), ("bit", "one bit")):
            what = f"long, lr {lr}, {label}"
            _, curves = excess(f"{name}_{way}", f"{name}_full")
            for first in (0, 500, 1000, 1500):
                part = curves[:, first // 4:(first + 500) // 4].mean(1)
                found[f"{what}: excess in steps {first + 1} to {first + 500}"] = common.text(
                    part, 4, sign=True)
            gaps = bits(f"{name}_{way}") - bits(f"{name}_full")
            found[f"{what}: bits per byte at the end"] = common.text(gaps, 4, sign=True)
            found[f"{what}: the same for each seed"] = ", ".join(f"{gap:+.4f}" for gap in gaps)
        spread = stdev(bits(f"{name}_full"))
        found[f"long, lr {lr}: spread of the full runs between seeds"] = f"{spread:.3f}"
    return found


@script
def main(argv=None):
    common.without_flags(__doc__, argv)
    simple, [panel] = common.figure_of(1)
    draw_resume(panel)
    figure, panels = common.figure_of(2, 2, 3.2)
    draw_grid(panels[0], panels[1])
    draw_ways(panels[2])
    draw_long(panels[3])
    for axes in (panel, *panels):
        axes.set_xlabel("step")
        axes.legend(fontsize=7)
        if axes not in (panel, panels[1]):
            axes.axhline(0, color="0.5", lw=1)
    simple.savefig(common.LOGS / EXPERIMENT / "resume.png")
    common.report(EXPERIMENT, figure, numbers())


if __name__ == "__main__":
    main()
