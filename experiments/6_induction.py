"""6. A transition that can be seen: when does a network learn to copy what came before?

Trained on random tokens that repeat every 16 to 32 tokens. Expected, after Olsson et al. 2022
(arXiv 2209.11895): with two layers and more the loss on later copies falls suddenly to nearly 0, as
heads arise that look at the token after the last occurrence of the present one; one layer cannot.
Refuted if it falls with one layer too, or slowly, or without such heads.
"""
import math
import sys

import common
import numpy as np
from common import BLUE, GREEN, ORANGE

from support.flags import Parser
from support.runs import script

EXPERIMENT = "6_induction"
SEEDS = (1, 2, 3)
LAYERS = ((1, ORANGE), (2, BLUE), (4, GREEN))


def name(layers, seed):
    return f"layers{layers}_seed{seed}"


def copies(run):
    """Steps, loss on the first 16 tokens, which nothing tells, and on tokens 48 to 63, where all
    has been seen before."""
    rows = run.rows["eval"]
    losses = np.array([row["position_loss"] for row in rows])
    return np.array([row["step"] for row in rows]), losses[:, 0], losses[:, 3]


def best_head(run_name, drawn="evenly"):
    """Steps; the score of the best head; nats that the second copy is easier than the first."""
    events = common.read_events(common.LOGS / EXPERIMENT / f"{run_name}.jsonl")
    rows = [row for row in events if row["event"] == "repeats" and row["drawn"] == drawn]
    rows = sorted({row["step"]: row for row in rows}.values(), key=lambda row: row["step"])
    best = [max(max(layer) for layer in row["prefix_matching"]) for row in rows]
    easier = [row["first_copy"] - row["second_copy"] for row in rows]
    return [row["step"] for row in rows], best, easier


def transition(steps, loss):
    """(last step above 3 nats, first step below 0.5); None if it never gets there."""
    below = np.flatnonzero(loss < 0.5)
    if len(below) == 0:
        return None
    above = np.flatnonzero(loss[:below[0]] > 3)
    return int(steps[above[-1]]), int(steps[below[0]])


@script
def main(argv=None):
    Parser(description=__doc__.split("\n")[0]).parse_args(argv)
    figure, panels = common.figure_of(3, height=3.4)
    numbers = {"loss without any knowledge, ln 64": f"{math.log(64):.3f}"}
    for layers, colour in LAYERS:
        found = []
        ends = []
        for seed in SEEDS:
            run = common.log_of(EXPERIMENT, name(layers, seed))
            steps, first, later = copies(run)
            label = f"{layers} layer{'s' * (layers > 1)}" if seed == 1 else None
            panels[0].plot(steps, later, lw=1.2, color=colour, label=label)
            panels[0].plot(steps, first, lw=0.8, ls=":", color=colour)
            steps_of_heads, best, _ = best_head(name(layers, seed))
            panels[1].plot(steps_of_heads, best, ".-", lw=1, color=colour)
            found.append(transition(steps, later))
            ends.append(later[-1])
            numbers[f"{layers} layers, seed {seed}: best head, before and after"] = (
                f"{best[0]:.2f}, {best[-1]:.2f}")
        numbers[f"{layers} layers: loss on later copies at the end"] = common.text(ends)
        numbers[f"{layers} layers: from above 3 to below 0.5 nats in steps"] = "; ".join(
            "never" if pair is None else f"{pair[0]}–{pair[1]}" for pair in found)
    for drawn, style in (("evenly", "-"), ("by frequency", "--")):
        gains = []
        heads = []
        for seed in SEEDS:
            steps, best, easier = best_head(f"seed{seed}", drawn)
            label = f"drawn {drawn}" if seed == 1 else None
            panels[2].plot(np.array(steps) + 1, easier, style, color="0.3", lw=1, label=label)
            gains.append(easier[-1])
            heads.append(best[-1])
        who = f"tiny on text, random tokens {drawn}"
        numbers[f"{who}: second copy easier by"] = common.text(gains, sign=True)
        numbers[f"{who}: best head, each seed"] = ", ".join(f"{head:.3f}" for head in heads)
    panels[0].set(xlabel="step", ylabel="loss on later copies, nats")
    panels[0].set_title("Two layers and more learn to copy\n(dotted: loss on the first copy)",
                        fontsize=9)
    panels[1].set(xlabel="step", ylabel="prefix-matching score", ylim=(0, 1))
    panels[1].set_title("as some head learns to look behind\nthe last occurrence (the best one)",
                        fontsize=9)
    panels[2].set(xscale="log", xlabel="step + 1", ylabel="nats")
    panels[2].set_title("tiny, trained on text, hardly copies:\nits second copy is easier by",
                        fontsize=9)
    panels[0].legend(fontsize=8)
    panels[2].legend(fontsize=8)
    common.save(figure, EXPERIMENT)
    common.report(EXPERIMENT, numbers)


if __name__ == "__main__":
    sys.exit(main())
