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


def predicted(zeroed, beta2, k, count=200):
    """Size of the k-th update after a resume, divided by lr: √(E m̂² / E v̂), if each gradient is
    an independent number of mean 0. Its own size cancels. zeroed: names in AdamW's state. count:
    updates before the resume. Second moments alone at 0 can give far more: where a weight's next
    gradient is near 0, only eps bounds the quotient."""
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
    """Each step after the resume in each run of `names`, (runs, 400): NaN behind its end."""
    found = np.full((len(names), 400), np.nan)
    for row, name in zip(found, names):
        _, values = points(common.log_of(EXPERIMENT, name), "train", key)
        row[:len(values)] = values
    return found


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


def at_the_end(way, lr, beta2):
    """By how much the validation loss at the end is above that of the untouched run, (seeds,)."""
    first, second = ([common.log_of(EXPERIMENT, name) for name in cell(each, lr, beta2)]
                     for each in (way, "full"))
    return common.ends(first, "eval", "val_loss") - common.ends(second, "eval", "val_loss")


def excess_numbers(what, excess, digits, windows):
    """{what: text} of the mean excess between two steps after the resume, for each of `windows`."""
    return {f"{what}: excess of steps {first} to {last}": common.text(
        excess[:, first - 1:last].mean(1), digits, sign=True) for first, last in windows}


def numbers_of_grid(noise):
    """{what: text or number} for each beta2, part and rate."""
    found = {}
    for beta2 in BETAS:
        for way, (label, *_) in PARTS.items():
            guess = predicted_ratio(way, float(beta2), 1)
            found[f"beta2 {beta2}, {label}: first update, predicted"] = f"{guess:.2f}"
            digits = 3 if way != "second" else 1
            for lr in RATES:
                what = f"beta2 {beta2}, {label}, lr {lr}"
                excess, sizes = of_cell(way, lr, beta2)
                found[f"{what}: first update"] = common.text(sizes[:, 0], digits - 1)
                found |= excess_numbers(what, excess, digits, ((1, 20), (21, 200)))
                found[f"{what}: val loss at the end"] = common.text(at_the_end(way, lr, beta2),
                                                                    sign=True)
                found[f"{what}: last step above the noise of seeds"] = last_loud_step(
                    excess[:, :200], noise)
    return found


def numbers_of_others():
    """The same for what is no part of the optimizer's state, and for the long run."""
    found = {}
    for beta2 in BETAS:
        for lr in RATES:
            what = f"beta2 {beta2}, one bit, lr {lr}"
            found |= excess_numbers(what, of_cell("bit", lr, beta2)[0], 4, ((1, 20), (21, 200)))
            ends = at_the_end("bit", lr, beta2)
            found[f"{what}: val loss at the end"] = common.text(ends, 4, sign=True)
        same = np.abs(of_cell("nothing", "3e-3", beta2)[0][:, :200]).max()
        found[f"beta2 {beta2}, nothing: largest difference of a loss"] = float(same)
        ends = at_the_end("data", "3e-3", beta2)
        found[f"beta2 {beta2}, another order: val loss at the end"] = common.text(ends, sign=True)
        found |= excess_numbers(f"beta2 {beta2}, another schedule", of_cell(
            "schedule", "3e-3", beta2)[0], 3, ((1, 20), (151, 200)))
    for way, (label, *_) in PARTS.items():
        excess, sizes = compared([f"{way}_long"], ["full_long"])
        what = f"long run, {label}"
        found[f"{what}: first update, predicted"] = f"{predicted_ratio(way, 0.99, 1, 2000):.2f}"
        found[f"{what}: first update"] = f"{sizes[0, 0]:.2f}"
        for first, last in ((1, 20), (51, 100), (301, 400)):
            mean = excess[0, first - 1:last].mean()
            found[f"{what}: excess of steps {first} to {last}"] = f"{mean:+.3f}"
    return found


def numbers_of_absent_rows():
    absent = json.loads((common.LOGS / EXPERIMENT / "absent.json").read_text())
    measured = curves(cell("second", "1e-3", "0.95")[:1], "update_rms")[0, 0]
    return {"second moments, lr 1e-3, beta2 0.95, seed 1: the first update": f"{measured:.4f}",
            "what the rows of absent tokens explain of it": f"{absent['rms']:.4f}",
            "rows of absent tokens": f"{absent['rows']:,} of {absent['of']:,}"}


def draw_first_updates(panel):
    """Predicted and measured, a place for each part and beta2."""
    for place, (way, (label, colour, _)) in enumerate(PARTS.items()):
        for beta2, shift in zip(BETAS, (-0.2, 0.2)):
            guess = predicted_ratio(way, float(beta2), 1)
            middle = place + shift
            panel.plot([middle - 0.17, middle + 0.17], [guess, guess], color="0.3", lw=2)
            if way == "second":
                panel.annotate("", (middle, 8 * guess), (middle, guess),
                               arrowprops={"arrowstyle": "->", "color": "0.3"})
            for lr, marker, aside in zip(RATES, "osD", (-0.1, 0, 0.1)):
                _, sizes = of_cell(way, lr, beta2)
                panel.plot([middle + aside] * len(SEEDS), sizes[:, 0], marker, color=colour, ms=3)
    panel.set(title="Size of the first update, × that of the untouched run\n(left beta2 0.95, "
              "right 0.99; bars: predicted, arrow: or more)", yscale="log")
    panel.set_xticks(range(len(PARTS)), [label.replace(" ", "\n") for label, *_ in PARTS.values()])


def draw_sizes(panel, beta2):
    steps = np.arange(1, 201)
    for way, (_, colour, _) in PARTS.items():
        if way == "second":
            continue
        guesses = [predicted_ratio(way, float(beta2), k) for k in steps]
        panel.plot(steps, guesses, ":", color=colour)
        for lr, style in (("1e-3", "-"), ("6e-3", "--")):
            _, sizes = of_cell(way, lr, beta2)
            panel.plot(steps, sizes[:, :200].mean(0), style, color=colour)
    panel.set(title=f"The same for the updates that follow\n(beta2 {beta2}; lr 1e-3, "
              "dashed 6e-3; dotted: predicted)", xscale="log", ylim=(0, 7))
    panel.set_xticks([1, 10, 100], ["1", "10", "100"])


def draw_excess(panel, lr, beta2):
    for way, (label, colour, _) in PARTS.items():
        excess = of_cell(way, lr, beta2)[0][:, :200]
        if way == "second":
            panel.text(200, 0.19, f"{label}: never below {smooth(excess, 5).min():.1f}",
                       color=colour, ha="right", fontsize=8)
        else:
            common.draw_band(panel, np.arange(5, 201), smooth(excess, 5), colour, label)
    panel.axhline(0, color="0.5", lw=1)
    panel.set(title=f"Loss minus that of the untouched run\n(lr {lr}, beta2 {beta2})",
              ylabel="nats", ylim=(-0.04, 0.21))


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
    for panel, beta2 in zip(panels[2:], BETAS):
        draw_excess(panel, "1e-3", beta2)
    for panel in panels[1:]:
        panel.set_xlabel("steps after the resume")
    panels[2].legend(fontsize=8, loc=(0.62, 0.5))
    common.report(EXPERIMENT, figure, {
        "noise of seeds: standard deviation of val loss (7)": f"{noise:.3f}",
        **numbers_of_grid(noise), **numbers_of_others(), **numbers_of_absent_rows()})


if __name__ == "__main__":
    main()
