"""5. What does instruction tuning change, and what does it cost?

Each seed tunes the network of the same seed of experiment 1, with all weights and with LoRA.
"""

import common

from plot_dynamics import COLOURS
from support.runs import script

EXPERIMENT = "5_tuning"
METHODS = {"full": "all weights", "lora": "LoRA, rank 8"}
METRICS = [("sft_eval", "heldout_loss", "Loss on held-out answers, nats"),
           ("sft_eval", "ended", "Share of answers that end"),
           ("benchmark", "acc_pmi", "Questions on the manuals: acc_pmi"),
           ("eval", "val_bpb", "Cost: bits per byte of the\npretraining's validation text")]


@script
def main(argv=None):
    common.without_flags(__doc__, argv)
    figure, panels = common.figure_of(4, height=3.4)
    numbers = {}
    runs = {method: common.runs_of(EXPERIMENT, method) for method in METHODS}
    for panel, (event, key, title) in zip(panels, METRICS):
        for (method, label), colour in zip(METHODS.items(), COLOURS):
            steps, values = common.curves_of(runs[method], event, key)
            # steps + 1, because a logarithmic axis has no 0
            common.draw_band(panel, steps + 1, values, colour, label, ".-")
            numbers[f"{label}: {key} before"] = common.text(values[:, 0])
            numbers[f"{label}: {key} after {steps[-1]:.0f} steps"] = common.text(values[:, -1])
            change = values[:, -1] - values[:, 0]
            numbers[f"{label}: {key}, change"] = common.text(change, sign=True)
        panel.set(xscale="log", xlabel="steps + 1")
        panel.set_title(title, fontsize=9)
    for key in ("acc", "acc_norm"):
        for method, label in METHODS.items():
            _, values = common.curves_of(runs[method], "benchmark", key)
            change = values[:, -1] - values[:, 0]
            numbers[f"{label}: {key}, change"] = common.text(change, sign=True)
    panels[0].legend()
    common.report(EXPERIMENT, figure, numbers)


if __name__ == "__main__":
    main()
