"""common.py — what the experiments share: logs, intervals over seeds, figures, the numbers.

An experiment reads the logs of its runs in logs/N_name/, draws logs/N_name/figure.png, and writes
its numbers into logs/summary.json, from which README quotes. It does not train: reproduce.sh does.
"""
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python experiments/1_emergence.py` finds plot_dynamics.py

import numpy as np

from plot_dynamics import column, open_figure, points, read_events, read_run, table_row
from support.runs import UserError

LOGS = ROOT / "logs"
# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
COLOURS = (BLUE, ORANGE, GREEN, "#D55E00", PURPLE, "#56B4E9")

# 97.5 % quantiles of Student's t with 1, 2, 3 … degrees of freedom: half-widths of 95 % intervals.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def log_of(experiment, name):
    """The Run in logs/EXPERIMENT/NAME.jsonl. Raises UserError if it has not been made."""
    file = LOGS / experiment / f"{name}.jsonl"
    if not file.exists():
        raise UserError(f"{file} is missing — run: bash reproduce.sh {experiment[0]}")
    return read_run(file)


def last(run, event, key):
    """The last number of a curve."""
    return points(run, event, key)[1][-1]


def interval(values):
    """(mean, half-width of its 95 % interval by Student's t) of one value for each seed."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return values.mean(), math.nan
    t = T[n - 2] if n - 2 < len(T) else 1.96
    return values.mean(), t * values.std(ddof=1) / math.sqrt(n)


def spread(values):
    """The standard deviation over seeds."""
    return float(np.std(np.asarray(values, dtype=float), ddof=1))


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
    return np.corrcoef(x, y)[0, 1] if np.std(x) > 0 and np.std(y) > 0 else math.nan


def ranks(values):
    """1 for the smallest; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


def spearman(x, y):
    return pearson(ranks(x), ranks(y))


def figure_of(columns, rows=1, height=3.3):
    """(figure, its panels in one list); as wide as a README."""
    figure = open_figure((9.2, height * rows))
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save(figure, experiment):
    path = LOGS / experiment / "figure.png"
    figure.savefig(path)
    print(f"drawn: {path.relative_to(ROOT)}")


def report(experiment, numbers):
    """Print {what: text or number}; keep it in logs/summary.json and, to be read, in
    logs/numbers.md."""
    file = LOGS / "summary.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known[experiment] = numbers
    known = dict(sorted(known.items()))
    file.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["# The numbers of all experiments", "",
             "Written by `bash reproduce.sh figures`. ±: half of a 95 % interval over seeds."]
    for name, found in known.items():
        lines += ["", f"## {name}", "", table_row(["what", "value"]), "|---|---|"]
        lines += [table_row([what, str(value)]) for what, value in found.items()]
    (LOGS / "numbers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    width = max(map(len, numbers))
    for name, value in numbers.items():
        print(f"  {name:<{width}}  {value}")
