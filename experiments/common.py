"""common.py — what the experiments share: logs, intervals over seeds, figures, the numbers.

An experiment reads the logs of its runs in logs/N_name/, draws logs/N_name/figure.png, and writes
its numbers into logs/summary.json, from which docs/dynamics.md quotes. It does not train:
reproduce.sh does.
"""
import json
import math
import sys
from pathlib import Path
from statistics import stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python experiments/1_emergence.py` finds plot_dynamics.py

import numpy as np

from plot_dynamics import open_figure, points, read_run, table_row
from support.flags import Parser
from support.runs import UserError

LOGS = ROOT / "logs"
SEEDS = (1, 2, 3)

# 97.5 % quantiles of Student's t with 1, 2, 3 … degrees of freedom: half-widths of 95 % intervals.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)


def without_flags(description, argv):
    """The command line of a script that has no flags: another one is an error, --help works."""
    Parser(description=description.split("\n")[0]).parse_args(argv)


def log_of(experiment, name):
    """The Run in logs/EXPERIMENT/NAME.jsonl. Raises UserError if it has not been made."""
    file = LOGS / experiment / f"{name}.jsonl"
    if not file.exists():
        raise UserError(f"{file} is missing — run: bash reproduce.sh {experiment[0]}")
    return read_run(file)


def runs_of(experiment, name, seeds=SEEDS):
    """The Run of each seed: of the names NAME1, NAME2, NAME3."""
    return [log_of(experiment, f"{name}{seed}") for seed in seeds]


def curves_of(runs, event, key):
    """Steps (n,) and values (len(runs), n) of a curve that has the same steps in all runs."""
    found = [points(run, event, key) for run in runs]
    return found[0][0], np.array([values for _, values in found])


def ends(runs, event, key):
    """The last number of a curve in each run, (len(runs),)."""
    return np.array([points(run, event, key)[1][-1] for run in runs])


def together(first, second):
    """The steps that two curves share, and the values of both there: three arrays (n,). A curve is
    (steps, values), as `points` returns it."""
    steps, place, other = np.intersect1d(first[0], second[0], return_indices=True)
    return steps, first[1][place], second[1][other]


def smooth(curves, width):
    """Means over `width` successive values: (…, n) → (…, n − width + 1)."""
    return np.lib.stride_tricks.sliding_window_view(curves, width, axis=-1).mean(-1)


def noise_of_seeds():
    """Standard deviation of the validation loss of eight runs that differ in their seed (7)."""
    return stdev(ends(runs_of("7_seeds", "seed", range(1, 9)), "eval", "val_loss"))


def interval(values):
    """(mean, half-width of its 95 % interval by Student's t) of one value for each seed."""
    n = len(values)
    return np.mean(values), T[n - 2] * stdev(values) / math.sqrt(n)


def text(values, digits=3, sign=False):
    """"1.234 ± 0.005": mean and 95 % interval over seeds."""
    mean, half = interval(values)
    return f"{mean:{'+' if sign else ''}.{digits}f} ± {half:.{digits}f}"


def changes(steps, values):
    """Differences of successive values, less their own slow trend: a parabola in the logarithm of
    the step. Two curves that merely both rise and level off have nothing in common after this."""
    x = np.log(steps[1:])
    found = np.diff(values)
    return found - np.polyval(np.polyfit(x, found, 2), x)


def pearson(x, y):
    return np.corrcoef(x, y)[0, 1]


def figure_of(columns, rows=1, height=3.3):
    """(figure, its panels in one list); as wide as a README."""
    figure = open_figure((9.2, height * rows))
    from matplotlib import rc
    rc("axes", titlesize=10, grid=True)
    rc("axes.spines", top=False, right=False)
    rc("grid", alpha=0.25)
    rc("legend", fontsize=8)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_band(panel, x, curves, colour, label, style="-"):
    """The mean of the curves of all seeds, (seeds, n), and their range."""
    panel.plot(x, curves.mean(0), style, color=colour, label=label)
    panel.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.2)


def report(experiment, figure, numbers):
    """Save the figure. Print {what: text or number}; keep it in logs/summary.json and, to be read,
    in logs/numbers.md."""
    path = LOGS / experiment / "figure.png"
    figure.savefig(path)
    print(f"drawn: {path.relative_to(ROOT)}")
    for name, value in numbers.items():
        print(f"  {name}: {value}")
    file = LOGS / "summary.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known[experiment] = numbers
    file.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["# The numbers of all experiments", "",
             "Written by `bash reproduce.sh figures`. ±: half of a 95 % interval over seeds."]
    for name, found in known.items():
        lines += ["", f"## {name}", "", table_row(["what", "value"]), "|---|---|"]
        lines += [table_row([what, str(value)]) for what, value in found.items()]
    (LOGS / "numbers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
