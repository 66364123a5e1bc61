"""9. Which part of a full state does a resume need, and why?

    python experiments/9_state.py                # draw and count
    python experiments/9_state.py --absent RUN   # of a stopped run: see absent_rows

At step 200 of 400 a part of the state is set to 0 (edit_state.py), and the run goes on. AdamW
(Loshchilov & Hutter 2019, algorithm 2) moves a weight by lr · m̂ / √v̂. These are the averages of
its gradients and of their squares, each divided by 1 − beta^count. `predicted` says how large that
is if gradients are nothing but noise.
"""
import json
import math
from argparse import Namespace
from pathlib import Path

import common
from common import SEEDS, noise_of_seeds, smooth

import numpy as np
import torch

import checkpoint
from data import DataFolder, Windows
from plot_dynamics import COLOURS, points
from support import durable
from support.flags import Parser
from support.runs import script
from train import lr_at

EXPERIMENT = "9_state"
RATES = ("1e-3", "3e-3", "6e-3")
BETAS = ("0.95", "0.99")
BETA1 = 0.9
EPS = 1e-8
PARTS = {  # way: its label, its colour, what is set to 0
    "first": ("first moments", COLOURS[0], ["exp_avg"]),
    "second": ("second moments", COLOURS[3], ["exp_avg_sq"]),
    "both": ("both", COLOURS[4], ["exp_avg", "exp_avg_sq"]),
    "count": ("count of updates", COLOURS[2], ["step"]),
    "all": ("all three", COLOURS[1], ["exp_avg", "exp_avg_sq", "step"])}
OTHERS = ("data", "schedule")


def predicted(zeroed, beta2, k, count=200):
    """RMS of the k-th update after a resume, divided by lr, if each gradient is an independent
    normal number of mean 0: then its size cancels. zeroed: names in AdamW's state. count: updates
    before the resume."""
    m2 = (1 - BETA1) / (1 + BETA1)  # mean square of the average, of gradients of variance 1
    v = 1 - beta2 ** (count + k)
    if "exp_avg" in zeroed:
        m2 *= 1 - BETA1 ** (2 * k)
    if "exp_avg_sq" in zeroed:
        v = 1 - beta2 ** k
    if "step" in zeroed:
        count = 0
    return math.sqrt(m2 / (v / (1 - beta2 ** (count + k)))) / (1 - BETA1 ** (count + k))


def predicted_ratio(way, beta2, k, count=200):
    """The same as a multiple of the untouched run's k-th update."""
    zeroed = PARTS[way][2]
    return predicted(zeroed, beta2, k, count) / predicted([], beta2, k, count)


def absent_rows(run):
    """RMS, over all weights, of the next update if the second moments are set to 0, counting only
    what is certain: the rows of the embedding whose tokens the next batch does not have. Their
    gradient is 0, so v̂ is 0, and the first moment is divided by eps."""
    state = checkpoint.load(durable.newest(run))
    config = Namespace(**state["config"])
    step = state["step"]
    data = DataFolder(config.data)
    windows = Windows(data.train, config.seq_len, data.vocab_size, config.seed, config.shuffle)
    sequences = config.batch_tokens // config.seq_len
    read = windows.read(step * sequences, sequences)[:, :-1]
    moments = state["optimizer"]["model.embed_tokens.weight"]["exp_avg"].double()
    absent = np.setdiff1d(np.arange(len(moments)), read)
    average = BETA1 * moments[torch.from_numpy(absent)] / (1 - BETA1 ** (step + 1))
    total = sum(each["exp_avg"].numel() for each in state["optimizer"].values())
    return {"rms": lr_at(step, config) / EPS * math.sqrt(average.square().sum() / total),
            "rows": len(absent), "of": len(moments)}


def curves(names, key):
    """What follows the resume in each run of `names`, (runs, steps): NaN after it has diverged."""
    found = []
    for name in names:
        run = common.log_of(EXPERIMENT, name)
        steps, values = points(run, "train", key)
        resumed, *_ = run.marks[-1]
        curve = np.full(400, np.nan)
        curve[steps[steps <= resumed + 400].astype(int) - resumed - 1] = values[:400]
        found.append(curve)
    return np.array(found)


def cell(way, lr, beta2):
    """The names of a way's runs, one for each seed."""
    return [f"{way}_lr{lr}_beta{beta2}_seed{seed}" for seed in SEEDS]


def compared(names, others):
    """(excess loss, size of the updates as a multiple) of the runs `names` beside the untouched
    runs `others`, both (runs, steps)."""
    excess = curves(names, "loss") - curves(others, "loss")
    return excess, curves(names, "update_rms") / curves(others, "update_rms")


def of_cell(way, lr, beta2):
    return compared(cell(way, lr, beta2), cell("full", lr, beta2))


def last_loud_step(excess, noise):
    """The last step after the resume at which the excess, averaged over runs and 10 steps, is
    further from 0 than `noise`."""
    level = np.abs(smooth(excess.mean(axis=0), 10))
    loud = np.flatnonzero(level[np.isfinite(level)] > noise)
    return int(loud.max(initial=-10)) + 10


def numbers(noise):
    """{what: text or number}: the first update, the excess loss, and how long it lasts."""
    absent = json.loads((common.LOGS / EXPERIMENT / "absent.json").read_text())
    first = curves(cell("second", "1e-3", "0.95")[:1], "update_rms")[0, 0]
    found = {"noise of seeds: standard deviation of val loss (7)": f"{noise:.3f}"}
    same = [abs(of_cell("nothing", "3e-3", beta2)[0][:, :200]).max() for beta2 in BETAS]
    found["second moments, lr 1e-3, beta2 0.95, seed 1: first update, and what the rows of absent "
          "tokens explain of it"] = f"{first:.4f}, {absent['rms']:.4f}"
    found["rows of absent tokens"] = f"{absent['rows']:,} of {absent['of']:,}"
    found["nothing changed: largest difference of a loss"] = float(max(same))
    def add_excess(what, excess):
        found[f"{what}: excess of the first 20"] = common.text(excess[:, :20].mean(1), sign=True)
        found[f"{what}: excess of the last 50"] = common.text(excess[:, 150:200].mean(1), sign=True)

    for beta2 in BETAS:
        for way, (label, *_) in PARTS.items():
            what = f"beta2 {beta2}, {label}"
            guess = predicted_ratio(way, float(beta2), 1)
            found[f"{what}: first update, predicted"] = f"{guess:.2f}"
            for lr in RATES:
                what = f"beta2 {beta2}, {label}, lr {lr}"
                excess, sizes = of_cell(way, lr, beta2)
                found[f"{what}: first update, measured"] = common.text(sizes[:, 0], 2)
                add_excess(what, excess)
                last = last_loud_step(excess[:, :200], noise)
                found[f"{what}: last step above the noise of seeds"] = last
        for way in OTHERS:
            add_excess(f"beta2 {beta2}, another {way}, lr 3e-3", of_cell(way, "3e-3", beta2)[0])
    for way, (label, *_) in PARTS.items():
        excess, sizes = compared([f"{way}_long"], ["full_long"])
        what = f"long run, {label}"
        found[f"{what}: first update, predicted"] = f"{predicted_ratio(way, 0.99, 1, 2000):.2f}"
        found[f"{what}: first update, measured"] = f"{sizes[0, 0]:.2f}"
        found[f"{what}: excess of the first 20"] = f"{excess[0, :20].mean():+.3f}"
        found[f"{what}: excess of the last 100 of 400"] = f"{excess[0, 300:].mean():+.3f}"
    return found


def draw_first_updates(panel):
    """Predicted and measured, a place for each way and beta2."""
    for place, (way, (label, colour, _)) in enumerate(PARTS.items()):
        for beta2, marker, shift in zip(BETAS, "os", (-0.18, 0.18)):
            x = place + shift
            guess = predicted_ratio(way, float(beta2), 1)
            panel.plot([x - 0.14, x + 0.14], [guess, guess], color="0.3", lw=2)
            for lr in RATES:
                _, sizes = of_cell(way, lr, beta2)
                panel.plot([x] * len(SEEDS), sizes[:, 0], marker, color=colour, ms=4, alpha=0.6)
    panel.set(title="Size of the first update, × that of the untouched run\n(bars: predicted; "
              "circles beta2 0.95, squares 0.99)", yscale="log")
    panel.set_xticks(range(len(PARTS)), [label.replace(" ", "\n") for label, *_ in PARTS.values()])


def draw_sizes(panel, beta2):
    steps = np.arange(1, 201)
    for way, (label, colour, _) in PARTS.items():
        _, sizes = of_cell(way, "3e-3", beta2)
        panel.plot(steps, np.nanmean(sizes[:, :200], axis=0), color=colour, label=label)
        guesses = [predicted_ratio(way, float(beta2), k) for k in steps]
        panel.plot(steps, guesses, ":", color=colour)
    panel.set(title="The same for the updates that follow\n"
              f"(lr 3e-3, beta2 {beta2}; dotted: predicted)", xscale="log", yscale="log")


def draw_excess(panel, beta2):
    for way, (label, colour, _) in PARTS.items():
        excess, _ = of_cell(way, "3e-3", beta2)
        common.draw_band(panel, np.arange(5, 201), smooth(excess[:, :200], 5), colour, label)
    panel.axhline(0, color="0.5", lw=1)
    panel.set(title=f"What it costs (lr 3e-3, beta2 {beta2})", ylabel="excess loss, nats")
    panel.set_yscale("symlog", linthresh=0.2)


@script
def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--absent", type=Path, metavar="RUN", help="note what a stopped run's rows "
                        "of absent tokens would do")
    args = parser.parse_args(argv)
    if args.absent is not None:
        file = common.LOGS / EXPERIMENT / "absent.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(absent_rows(args.absent)) + "\n")
        return
    noise = noise_of_seeds()
    figure, panels = common.figure_of(2, 2, 3.4)
    draw_first_updates(panels[0])
    draw_sizes(panels[1], "0.99")
    draw_excess(panels[2], "0.95")
    draw_excess(panels[3], "0.99")
    for panel in panels[1:]:
        panel.set_xlabel("steps after the resume")
    panels[2].legend(fontsize=7)
    common.report(EXPERIMENT, figure, numbers(noise))


if __name__ == "__main__":
    main()
