"""4. Does the kind of training text matter, at equal tokens?

Three kinds of the same manuals: clean prose, raw docstrings with code and tables, prose with
shuffled sentences. Expected: each network is best on its own kind, and on text of neither
(licences) prose is best. Refuted if raw text gives the lower loss there.
"""
import sys

import common
import numpy as np
from common import BLUE, GREEN, ORANGE

from support.flags import Parser
from support.runs import script

EXPERIMENT = "4_text"
KINDS = {"pydocs": "prose", "raw": "raw", "shuffled": "shuffled"}
OTHERS = (*KINDS, "licenses")
SEEDS = (1, 2, 3)


def scores(kind, seed):
    """{validation text: bits per byte}, and the row of all questions."""
    events = common.read_events(common.LOGS / EXPERIMENT / f"{kind}_seed{seed}.jsonl")
    scored = [event for event in events if "same_data" in event]  # by evaluate.py
    bits = {event["data"].split("/")[-1]: event["val_bpb"] for event in scored}
    questions = [event for event in events if event["event"] == "benchmark"]
    return bits, max(questions, key=lambda event: event["n"])


@script
def main(argv=None):
    Parser(description=__doc__.split("\n")[0]).parse_args(argv)
    bits = {}     # (kind, other): one value for each seed
    answers = {}  # (kind, key): likewise
    for kind in KINDS:
        for seed in SEEDS:
            found, questions = scores(kind, seed)
            for other in OTHERS:
                bits.setdefault((kind, other), []).append(found[other])
            for key in ("acc", "acc_norm", "acc_pmi"):
                answers.setdefault((kind, key), []).append(questions[key])

    figure, panels = common.figure_of(2, height=3.6)
    for number, (kind, colour) in enumerate(zip(KINDS, (BLUE, ORANGE, GREEN))):
        for panel, table, columns in ((panels[0], bits, OTHERS),
                                      (panels[1], answers, ("acc", "acc_norm", "acc_pmi"))):
            places = np.arange(len(columns)) + 0.2 * (number - 1)
            middle, half = np.array([common.interval(table[kind, c]) for c in columns]).T
            panel.errorbar(places, middle, half, fmt="o", color=colour, capsize=3,
                           label=f"trained on {KINDS[kind]}")
            panel.set_xticks(range(len(columns)), [KINDS.get(c, c) for c in columns])
    panels[0].set(title="Raw text does better on licences, worse on prose", ylabel="bits per byte",
                  xlabel="validation text")
    panels[1].set(title="Questions made from prose", ylabel="share right", xlabel="score")
    panels[1].axhline(0.25, color="0.5", ls="--", lw=1)
    panels[0].legend(fontsize=8)
    for panel in panels:
        panel.title.set_fontsize(10)
    common.save(figure, EXPERIMENT)

    numbers = {}
    for (kind, other), values in bits.items():
        numbers[f"trained on {KINDS[kind]}, read {KINDS.get(other, other)}"] = common.text(values)
    for (kind, key), values in answers.items():
        numbers[f"trained on {KINDS[kind]}: {key}"] = common.text(values)
    for kind in ("raw", "shuffled"):
        for other in ("pydocs", "licenses"):
            gap = np.subtract(bits[kind, other], bits["pydocs", other])
            numbers[f"{KINDS[kind]} minus prose, read {KINDS.get(other, other)}"] = (
                common.text(gap, sign=True))
    common.report(EXPERIMENT, numbers)


if __name__ == "__main__":
    sys.exit(main())
