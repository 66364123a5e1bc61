"""4. Does the kind of training text matter, at equal tokens?

Three kinds of the same manuals: clean prose, raw docstrings with code and tables, prose with
shuffled sentences; scored on each of them, and on text of neither, licences.
"""

import common
from common import SEEDS

import numpy as np

from plot_dynamics import COLOURS, read_events
from support.runs import script

EXPERIMENT = "4_text"
KINDS = {"pydocs": "prose", "raw": "raw", "shuffled": "shuffled"}  # data folder: its name here
TEXTS = KINDS | {"licenses": "licenses"}
SCORES = ("acc", "acc_norm", "acc_pmi")


def measured(kind, seed):
    """{validation text: bits per byte, score: share of all questions} of a run."""
    events = read_events(common.LOGS / EXPERIMENT / f"{kind}_seed{seed}.jsonl")
    scored = [event for event in events if "same_data" in event]  # by evaluate.py
    bits = {event["data"].split("/")[-1]: event["val_bpb"] for event in scored}
    questions = [event for event in events if event["event"] == "benchmark"]
    return bits | max(questions, key=lambda event: event["n"])


@script
def main(argv=None):
    common.without_flags(__doc__, argv)
    found = {}  # (kind, validation text or score): one value for each seed
    for kind in KINDS:
        rows = [measured(kind, seed) for seed in SEEDS]
        for what in (*TEXTS, *SCORES):
            found[kind, what] = np.array([row[what] for row in rows])

    figure, panels = common.figure_of(2, height=3.6)
    for number, (kind, colour) in enumerate(zip(KINDS, COLOURS)):
        for panel, columns in zip(panels, (TEXTS, SCORES)):
            places = np.arange(len(columns)) + 0.2 * (number - 1)
            middle, half = np.array([common.interval(found[kind, what]) for what in columns]).T
            panel.errorbar(places, middle, half, fmt="o", color=colour, capsize=3,
                           label=f"trained on {KINDS[kind]}")
    panels[0].set_xticks(range(len(TEXTS)), TEXTS.values())
    panels[1].set_xticks(range(len(SCORES)), SCORES)
    panels[0].set(title="Raw text does better on licences, worse on prose", ylabel="bits per byte",
                  xlabel="validation text")
    panels[1].set(title="Questions made from prose", ylabel="share right", xlabel="score")
    panels[1].axhline(0.25, color="0.5", ls="--", lw=1)
    panels[0].legend()

    numbers = {}
    for kind in KINDS:
        for other in TEXTS:
            numbers[f"trained on {KINDS[kind]}, read {TEXTS[other]}"] = (
                common.text(found[kind, other]))
    for kind in KINDS:
        for score in SCORES:
            numbers[f"trained on {KINDS[kind]}: {score}"] = common.text(found[kind, score])
    for kind in ("raw", "shuffled"):
        for other in ("pydocs", "licenses"):
            gap = found[kind, other] - found["pydocs", other]
            numbers[f"{kind} minus prose, read {TEXTS[other]}"] = common.text(gap, sign=True)
    common.report(EXPERIMENT, figure, numbers)


if __name__ == "__main__":
    main()
