"""5. What does instruction tuning change, and what does it cost?

Expected: held-out answers become likelier and end; the text of the pretraining becomes less likely;
the accuracies on its questions stay. Refuted if the loss on held-out answers does not fall. Each
seed tunes the network of the same seed of experiment 1, with all weights and with LoRA.
"""
import sys

import common
import numpy as np
from common import BLUE, ORANGE

from support.flags import Parser
from support.runs import script

EXPERIMENT = "5_tuning"
SEEDS = (1, 2, 3)
METHODS = (("full", "all weights", BLUE), ("lora", "LoRA, rank 8", ORANGE))


def curve(method, seed, event, key):
    """{step: value}"""
    return dict(zip(*common.points(common.log_of(EXPERIMENT, f"{method}{seed}"), event, key)))


METRICS = [("sft_eval", "heldout_loss", "Loss on held-out answers, nats"),
           ("sft_eval", "ended", "Share of answers that end"),
           ("benchmark", "acc_pmi", "Questions on the manuals: acc_pmi"),
           ("eval", "val_bpb", "Cost: bits per byte of the\npretraining's validation text")]


@script
def main(argv=None):
    Parser(description=__doc__.split("\n")[0]).parse_args(argv)
    figure, panels = common.figure_of(4, height=3.4)
    numbers = {}
    for panel, (event, key, title) in zip(panels, METRICS):
        for method, label, colour in METHODS:
            curves = [curve(method, seed, event, key) for seed in SEEDS]
            steps = sorted(curves[0])
            values = np.array([[c[step] for step in steps] for c in curves])
            x = np.array(steps) + 1  # a logarithmic axis has no 0
            panel.plot(x, values.mean(0), ".-", color=colour, label=label)
            panel.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.2)
            numbers[f"{label}: {key} before"] = common.text(values[:, 0])
            numbers[f"{label}: {key} after {steps[-1]:.0f} steps"] = common.text(values[:, -1])
            change = common.text(values[:, -1] - values[:, 0], sign=True)
            numbers[f"{label}: {key}, change"] = change
        panel.set(xscale="log", xlabel="steps + 1")
        panel.set_title(title, fontsize=9)
    for key in ("acc", "acc_norm"):
        for method, label, _ in METHODS:
            ends = []
            for seed in SEEDS:
                found = curve(method, seed, "benchmark", key)
                ends.append(found[max(found)] - found[0])
            numbers[f"{label}: {key}, change"] = common.text(ends, sign=True)
    panels[0].legend(fontsize=8)
    common.save(figure, EXPERIMENT)
    common.report(EXPERIMENT, numbers)


if __name__ == "__main__":
    sys.exit(main())
