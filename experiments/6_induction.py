"""6. A transition that can be seen: when does a network learn to copy what came before?

Trained on random tokens that repeat every 16 to 32 tokens, after Olsson et al. 2022 (arXiv
2209.11895), who found heads that look at the token after the last occurrence of the present one.
"""
import math

import common
from common import SEEDS

import numpy as np

from plot_dynamics import COLOURS, group, points, read_events
from support.runs import script

EXPERIMENT = "6_induction"
LAYERS = (1, 2, 4)


def best_head(name, drawn="evenly"):
    """Steps; the score of the best head; nats that the second copy is easier than the first."""
    events = read_events(common.LOGS / EXPERIMENT / f"{name}.jsonl")
    rows = group(events, lambda event: event.get("drawn"))[drawn]
    steps = np.array([row["step"] for row in rows])
    best = [np.max(row["prefix_matching"]) for row in rows]
    easier = [row["first_copy"] - row["second_copy"] for row in rows]
    return steps, best, easier


def transition(steps, loss):
    """"last step above 3 nats–first step below 0.5", or "never"."""
    below = np.flatnonzero(loss < 0.5)
    if len(below) == 0:
        return "never"
    above = np.flatnonzero(loss[:below[0]] > 3)
    return f"{steps[above[-1]]:.0f}–{steps[below[0]]:.0f}"


@script
def main(argv=None):
    common.without_flags(__doc__, argv)
    figure, panels = common.figure_of(3, height=3.4)
    numbers = {"loss without any knowledge, ln 64": f"{math.log(64):.3f}"}
    for layers, colour in zip(LAYERS, COLOURS):
        falls = []
        ends = []
        for seed in SEEDS:
            name = f"layers{layers}_seed{seed}"
            run = common.log_of(EXPERIMENT, name)
            steps, _ = points(run, "eval", "val_loss")
            losses = np.array([row["position_loss"] for row in run.rows["eval"]])
            later = losses[:, 3]  # on tokens 48 to 63, all of which have been seen before
            label = f"{layers} layer{'s' * (layers > 1)}" if seed == 1 else None
            panels[0].plot(steps, later, lw=1.2, color=colour, label=label)
            panels[0].plot(steps, losses[:, 0], lw=0.8, ls=":", color=colour)  # first 16 tokens
            steps_of_heads, best, _ = best_head(name)
            panels[1].plot(steps_of_heads, best, ".-", lw=1, color=colour)
            falls.append(transition(steps, later))
            ends.append(later[-1])
            numbers[f"{layers} layers, seed {seed}: best head, before and after"] = (
                f"{best[0]:.2f}, {best[-1]:.2f}")
        numbers[f"{layers} layers: loss on later copies at the end"] = common.text(ends)
        numbers[f"{layers} layers: from above 3 to below 0.5 nats in steps"] = "; ".join(falls)
    for drawn, style in (("evenly", "-"), ("by frequency", "--")):
        gains = []
        heads = []
        for seed in SEEDS:
            steps, best, easier = best_head(f"seed{seed}", drawn)
            label = f"drawn {drawn}" if seed == 1 else None
            panels[2].plot(steps + 1, easier, style, color="0.3", lw=1, label=label)
            gains.append(easier[-1])
            heads.append(best[-1])
        who = f"tiny on text, random tokens {drawn}"
        numbers[f"{who}: second copy easier by"] = common.text(gains, sign=True)
        numbers[f"{who}: best head, each seed"] = ", ".join(f"{head:.3f}" for head in heads)
    panels[0].set(title="Two layers and more learn to copy\n(dotted: loss on the first copy)",
                  xlabel="step", ylabel="loss on later copies, nats")
    panels[1].set(title="as some head learns to look behind\nthe last occurrence (the best one)",
                  xlabel="step", ylabel="prefix-matching score", ylim=(0, 1))
    panels[2].set(title="tiny, trained on text, hardly copies:\nits second copy is easier by",
                  xlabel="step + 1", ylabel="nats", xscale="log")
    panels[0].legend()
    panels[2].legend()
    common.report(EXPERIMENT, figure, numbers)


if __name__ == "__main__":
    main()
