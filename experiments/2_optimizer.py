"""2. What does it cost to resume without the optimizer's state?

Expected: a jump of the loss, larger with a higher learning rate, because the first updates move
every weight by about lr; then it goes away. Refuted if the excess (loss of the reset run minus that
of the restored one, on the same batches) is within the spread between seeds.

Grid: stopped at step 100 of 200. Four ways: stopped at 200 of 400, lr 3e-3, beta2 0.95. Long: the
same, but 2,000 steps follow, of which every fourth is logged.
"""
from statistics import stdev

import common
import numpy as np
from common import COLOURS, SEEDS

from plot_dynamics import points
from support.runs import script

EXPERIMENT = "2_optimizer"
RATES = ("1e-3", "3e-3", "6e-3")
BETAS = ("0.95", "0.99", "0.999")
WAYS = {"reset": "moments reset",
        "paper": "as released: also a longer horizon",
        "rewarm": "reset, 100 steps of warm-up"}


def excess(name, base):
    """Steps (n,), and for each seed the training losses of the run `name` minus those of the run
    `base`, (seeds, n)."""
    curves = []
    for run, other in zip(common.runs_of(EXPERIMENT, name), common.runs_of(EXPERIMENT, base)):
        steps, losses, base_losses = common.together(points(run, "train", "loss"),
                                                     points(other, "train", "loss"))
        curves.append(losses - base_losses)
    return steps, np.array(curves)


def bits(name):
    """Bits per byte at the end, (seeds,)."""
    return common.ends(common.runs_of(EXPERIMENT, name), "eval", "val_bpb")


def updates(name):
    """Steps (n,), and for each seed how far a step moves the weights, (seeds, n)."""
    return common.curves_of(common.runs_of(EXPERIMENT, name), "train", "update_rms")


def smooth(curves, width):
    """Means over `width` successive values: (…, n) → (…, n − width + 1)."""
    return np.lib.stride_tricks.sliding_window_view(curves, width, axis=-1).mean(-1)


def draw_grid(first, second):
    for lr, colour in zip(RATES, COLOURS):
        name = f"_lr{lr}_beta0.95_seed"
        steps, curves = excess(f"reset{name}", f"full{name}")
        common.draw_band(first, steps[4:], smooth(curves, 5), colour, f"lr {lr}")
        for kind, style in (("reset", "-"), ("full", ":")):
            steps, sizes = updates(kind + name)
            second.plot(steps, sizes.mean(0), style, color=colour, label=f"{kind}, lr {lr}")
    first.set(title="Without the moments the loss jumps, more with a\nhigher rate (beta2 0.95; "
              "mean and range of 3 seeds)", ylabel="excess, nats")
    second.set(title="Why: after a reset the updates are several\ntimes as large",
               ylabel="RMS of the change", yscale="log")


def draw_ways(panel):
    for (way, label), colour in zip(WAYS.items(), COLOURS):
        steps, curves = excess(way, "full")
        common.draw_band(panel, steps[9:], smooth(curves, 10), colour, label)
    panel.set(title="A warm-up avoids the jump, and costs more later",
              ylabel="loss minus that of full state")


def draw_long(panel):
    steps, curves = excess("long_reset", "long_full")
    for seed, colour, curve in zip(SEEDS, COLOURS, smooth(curves, 25)):
        panel.plot(steps[24:], curve, color=colour, lw=1, label=f"seed {seed}")
    panel.set(title="2,000 steps later (lr 3e-3; mean of 100 steps)", ylabel="excess, nats")


def numbers():
    """{what: text or number}: the excess in each cell of the grid, the four ways, the long
    pairs."""
    eight = common.ends(common.runs_of("7_seeds", "seed", range(1, 9)), "eval", "val_loss")
    noise = stdev(eight)
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
    _, curves = excess("long_reset", "long_full")
    for first in (0, 500, 1000, 1500):
        part = curves[:, first // 4:(first + 500) // 4]
        add(f"long: excess in steps {first + 1} to {first + 500} after the resume", part.mean(1))
    gaps = bits("long_reset") - bits("long_full")
    add("long: bits per byte at the end, reset minus full", gaps)
    found["long: the same for each seed"] = ", ".join(f"{gap:+.3f}" for gap in gaps)
    found["long: spread of the full runs between seeds"] = f"{stdev(bits('long_full')):.3f}"
    return found


@script
def main(argv=None):
    common.without_flags(__doc__, argv)
    figure, panels = common.figure_of(2, 2, 3.2)
    draw_grid(panels[0], panels[1])
    draw_ways(panels[2])
    draw_long(panels[3])
    for panel in panels:
        panel.set_xlabel("step")
        panel.legend(fontsize=7)
        if panel is not panels[1]:
            panel.axhline(0, color="0.5", lw=1)
    common.report(EXPERIMENT, figure, numbers())


if __name__ == "__main__":
    main()
