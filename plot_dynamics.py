"""plot_dynamics.py — draw logs: dynamics.png, a page of curves; trajectory.md, the samples; of a
single run also story.png, its loss with some of the samples.

    python plot_dynamics.py runs/tiny                        # into figures/; also during training
    python plot_dynamics.py runs/a runs/b logs/default       # compare several runs on one page
    python plot_dynamics.py log.txt --batch_tokens 524288    # the plain log of build-nanogpt

Also draws the result files of lm-evaluation-harness in RUN/lm_eval/step_NNN/
(docs/huggingface.md says how to make them).

To draw something new, log it in train.py, `log.event("weights", step, norm=…)`, and add it to the
table PANELS. Reads a run's metrics.jsonl, and the samples and benchmarks that sample.py and
evaluate.py appended to its evaluations.jsonl, which is all that an imported run has. Needs no
checkpoint and no PyTorch.
"""
import math
import os
import re
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.flags import Parser, count
from support.runs import UserError, parse_json, script, shown

# -------------------------------------------------------------------------------------------------
# What the page shows. A panel is (title, y label, curves), a curve is (event, key, label): it shows
# the values of `key` in all rows {"event": event, "step": …, key: …} of a log. Curves and panels
# without a number are left out. With several runs on the page, a panel shows the last of each run's
# curves, and pale behind it the rows of "train".

PANELS = [
    ("Loss", "nats per token", [
        ("train", "loss", "training"),
        ("eval", "val_loss", "validation"),
        ("sft_eval", "heldout_loss", "held-out answers")]),
    ("Bits per byte of validation text", "bits per byte", [("eval", "val_bpb", "")]),
    ("Held-out answers: tokens right, given those before", "share", [
        ("sft_eval", "token_acc", "")]),
    ("Held-out answers that end", "share", [("sft_eval", "ended", "")]),
    ("Context gain: loss of the first eighth − of the last", "nats (band: ± 1 standard error)", [
        ("eval", "context_gain", "")]),
    ("Samples, one short text each: so they jump", "share", [
        ("sample", "distinct_2", "distinct_2: different bigrams"),
        ("sample", "repetition", "repetition: 4-grams seen before")]),
    ("Learning rate", "lr", [("train", "lr", "")]),
    ("Gradient norm, before clipping", "L2 norm", [("train", "grad_norm", "")]),
    ("How far a step moves the weights", "RMS of the change", [("train", "update_rms", "")]),
    ("Throughput of the steps, without the first", "tokens/s", [
        ("train", "tok_per_s", "")]),
]
ACCURACIES = {  # the curves of a benchmark, which has a panel of its own
    "acc": "acc: whole ending",
    "acc_pmi": "acc_pmi: gain over no context",
    "acc_norm": "acc_norm: divided by its length",
}
LOG_Y = {"grad_norm", "update_rms"}
LINEAR_X = {"lr", "tok_per_s"}  # a schedule is made of straight lines, and time passes evenly
BANDS = {  # key of a curve: key of its standard error
    "acc": "stderr", "acc_norm": "stderr_norm", "acc_pmi": "stderr_pmi",
    "context_gain": "context_gain_stderr",
}
MARKS = {  # colour and style of the vertical line at a resume
    "resume": ("0.55", ":"),
    "optimizer": ("purple", "--"),    # without the optimizer's state
    "hardware": ("firebrick", "--"),  # on another machine, or with other software
}


# -------------------------------------------------------------------------------------------------
# Reading: every log becomes a list of events {"event": …, "step": …, …}.

PLAIN = {  # stream of the plain log: its event, and the key of its value
    "train": ("train", "loss"),
    "val": ("eval", "val_loss"),
    "hella": ("benchmark", "acc_norm"),
}


def parse(line):
    """The event in a JSON line, or in a line "step stream value". Raises if there is none."""
    if line.startswith("{"):
        event = parse_json(line)
    else:
        step, stream, value = line.split()
        name, key = PLAIN.get(stream, (stream, stream))
        event = {"event": name, "step": int(step), key: float(value)}
        if stream == "hella":
            event |= {"name": "hellaswag", "n_choices": 4}
    is_step = type(event["step"]) is int and 0 <= event["step"] < 10**15
    if not is_step or not isinstance(event["event"], str):
        raise ValueError("not an event")
    return event


def read_events(path):
    """All events of a log file. Broken or half-written lines are left out, with a warning."""
    events = []
    broken = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                events.append(parse(line))
            except (ValueError, KeyError, TypeError):
                broken.append(str(line_number))
    if broken:
        where = textwrap.shorten(", ".join(broken), 40, placeholder=" …")
        print(f"warning: {path}: broken lines left out: {len(broken)} (line {where})",
              file=sys.stderr)
    return events


def cut_back(events, log):
    """Leave out the events that a later start from an earlier step has replaced: of two runs in one
    log the first, and a branch that was abandoned. Prints how many are left out."""
    rows = [event for event in events if event["event"] == "train"]
    starts = []  # where steps begin again. The next row must confirm it: one is a broken number
    for before, row, behind in zip(rows, rows[1:], rows[2:] + rows[-1:]):
        if row["step"] <= before["step"] and behind["step"] <= before["step"]:
            starts.append(id(row))
    kept = []
    for event in events:
        if id(event) in starts:
            # In a plain log the evaluation of a step stands before its training row: it is kept.
            place = (event["step"], True)
            kept = [old for old in kept if (old["step"], old["event"] == "train") < place]
        kept.append(event)
    if len(kept) < len(events):
        print(f"warning: {log}: its steps begin again; {len(events) - len(kept)} lines before "
              f"that, of the same or later steps, are left out", file=sys.stderr)
    return kept


def of_one_text(events, log):
    """Of losses that evaluate.py measured, those measured as the last one was: on the same text, in
    windows of the same length. Prints how many are left out."""
    def how(event):
        return [event.get(name) for name in ("data", "seq_len", "eval_tokens")]

    last = [how(event) for event in events if event["event"] == "eval"][-1:]
    kept = [event for event in events if event["event"] != "eval" or how(event) in last]
    if len(kept) < len(events):
        print(f"{log}: {len(events) - len(kept)} losses of other text or windows than those of the "
              f"last evaluation, {last[0][0]}, are not drawn")
    return kept


def read_lm_eval(folder):
    """The "benchmark" events in lm-evaluation-harness's result files under `folder`. Their step is
    in the name of a folder: step_500 or step_00000500. Broken files are left out, with a
    warning."""
    events = []
    for file in sorted(folder.rglob("results_*.json")):  # they are named after the time
        step = re.search(r"step_(\d+)", str(file.relative_to(folder)))
        try:
            found = parse_json(file.read_bytes())
            counts = found.get("n-samples", {})
            for task, scores in found["results"].items():
                events.append({
                    "event": "benchmark", "step": int(step.group(1)), "name": task,
                    "style": "lm-eval", "n": counts.get(task, {}).get("effective"),
                    "acc": scores.get("acc,none"), "stderr": scores.get("acc_stderr,none"),
                    "acc_norm": scores.get("acc_norm,none"),
                    "stderr_norm": scores.get("acc_norm_stderr,none")})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as why:
            print(f"warning: {file} left out: not a result file of lm-eval under a folder "
                  f"step_NNN ({why!r})", file=sys.stderr)
    return events


def number(value):
    """`value` as a float; NaN if it is not a finite number. Logs have null where a loss was NaN."""
    if not isinstance(value, (int, float)) or abs(value) > 1e300:
        return math.nan
    return float(value)


def column(rows, key):
    """The numbers under `key`, (len(rows),) float64; NaN where a row has none."""
    return np.array([number(row.get(key)) for row in rows], dtype=float)


def points(run, event, key):
    """Steps and values of a curve, both (n,) float64, without the rows that have no number."""
    rows = run.rows.get(event, [])
    values = column(rows, key)
    known = np.isfinite(values)
    return column(rows, "step")[known], values[known]


def group(events, key):
    """{key(event): rows}, the rows sorted by step. Of several rows with the same step the last one
    counts: after a resume, a run may log a step again."""
    groups = {}
    for event in events:
        groups.setdefault(key(event), {})[event["step"]] = event
    return {name: [rows[step] for step in sorted(rows)] for name, rows in groups.items()}


def benchmark_name(event):
    """For example "cloze (token, 320 questions)": only scores with the same name are comparable."""
    questions = number(event.get("n"))
    size = f", {questions:.0f} questions" if questions > 0 else ""
    return f"{event.get('name', 'benchmark')} ({event.get('style', 'token')}{size})"


def prompt_and_settings(event):
    """Samples belong together if both are the same. A run's own samples have no settings, those of
    `sample.py --trajectory` do."""
    names = ("temperature", "top_k", "top_p", "seed", "max_new_tokens")
    settings = [f"{name} {event[name]}" for name in names if event.get(name) is not None]
    return str(event.get("prompt", "")), ", ".join(settings)


@dataclass
class Run:
    """What a log tells about a run."""
    name: str
    rows: dict                # {event: rows}, and {benchmark_name: rows}; "benchmark" and "sample":
                              # the first of the next two
    benchmarks: dict          # {benchmark_name: rows}, the one scored most often first
    samples: dict             # {(prompt, settings): rows}, the run's own first
    marks: list               # (step, kind, text) of each resume
    steps: list               # all steps that were trained or evaluated
    evaluating: float         # seconds of evaluations and benchmarks
    batch_tokens: int | None  # tokens per step; None: unknown, or not always the same

    @property
    def is_tuning(self):
        return "sft_eval" in self.rows

    @property
    def seconds(self):
        """From start to end; NaN without an end. NaN also after a resume: the seconds of a process
        that was killed are not in the log."""
        if "end" not in self.rows or "resume" in self.rows:
            return math.nan
        return number(self.rows["end"][-1].get("seconds"))

    @property
    def trouble(self):
        """"diverged after step 512", "no loss from step 501 on", or "": whether the curves show the
        state of the run."""
        end = self.rows.get("end", [{}])[-1]
        if end.get("reason") == "diverged":
            return f"diverged after step {end['step']:,}"
        rows = self.rows.get("train", [])
        known = np.flatnonzero(np.isfinite(column(rows, "loss")))
        after_known = known.max(initial=-1) + 1
        if after_known < len(rows):
            return f"no loss from step {rows[after_known]['step']:,} on"
        return ""


def read_run(path, batch_tokens=None):
    """The Run in a folder with metrics.jsonl or log.txt, or in a single log file. `batch_tokens`
    is for a log that does not tell it. Raises UserError."""
    log = find_log(Path(path))
    events = cut_back(read_events(log), log)
    added = []
    evaluations = log.with_name("evaluations.jsonl")
    if log.name == "evaluations.jsonl":
        events = of_one_text(events, log)
    if log.name == "metrics.jsonl" and evaluations.is_file():
        added = read_events(evaluations)  # its losses may be of other text, and are not drawn
    added += read_lm_eval(log.parent / "lm_eval")
    training = [event for event in events if event["event"] in ("train", "eval", "sft_eval")]
    if not training:
        raise UserError(f"{log}: nothing to draw, no train or eval line — is it a log of train.py, "
                        f"or lines of \"step train|val|hella value\"?")

    # Of two scores at the same step, the last in this order counts: the run's own.
    scores = [event for event in added + events if event["event"] == "benchmark"]
    scores = group(scores, benchmark_name)
    benchmarks = dict(sorted(scores.items(), key=lambda item: -len(item[1])))
    samples = [event for event in events + added if event["event"] == "sample"]
    samples = group(samples, prompt_and_settings)
    rows = group(events, lambda event: event["event"]) | benchmarks
    rows["benchmark"] = next(iter(benchmarks.values()), [])
    rows["sample"] = next(iter(samples.values()), [])
    timed = [event for event in events if event["event"] in ("eval", "sft_eval", "benchmark")]
    run = Run(name=log.resolve().parent.name if log.name in LOG_NAMES else log.stem,
              rows=rows,
              benchmarks=benchmarks,
              samples=samples,
              marks=find_marks(events),
              steps=sorted({event["step"] for event in training}),
              evaluating=np.nansum(column(timed, "seconds")),
              batch_tokens=batch_tokens)

    steps, tokens = points(run, "train", "tokens")
    if len(steps) > 0 and not run.is_tuning:  # the batches of a tuning differ in length
        if batch_tokens is not None:
            print(f"{log} has its own tokens per step: --batch_tokens is not used for it")
        run.batch_tokens = round(np.median(tokens / np.maximum(steps, 1)))
    return run


LOG_NAMES = ("metrics.jsonl", "log.txt", "evaluations.jsonl")  # an imported run has only the last


def find_log(path):
    """The log in a run folder, or the file itself. Raises UserError."""
    for file in (*(path / name for name in LOG_NAMES), path):
        if file.is_file():
            return file
    raise UserError(f"{path}: no log — give a run folder with metrics.jsonl or log.txt, or a file")


def find_marks(events):
    """[(step, kind, text)] of each resume; the text tells what was different from before it."""
    marks = []
    env = {}
    for event in events:
        new_env = event.get("env")
        if event["event"] not in ("start", "resume") or not isinstance(new_env, dict):
            continue
        if event["event"] == "resume":
            changed = [name for name in env if name in new_env and env[name] != new_env[name]]
            notes = [f"{name} {shown(env[name])} → {shown(new_env[name])}" for name in changed]
            kind = "hardware" if changed else "resume"
            if not event.get("restored_optimizer", True):
                kind = "optimizer"
                notes.append("without optimizer state")
            marks.append((event["step"], kind, ", ".join(notes) or "resume"))
        env = new_env
    return marks


def speed_change(run, step, text):
    """The text of a mark, with the median tokens/s of the 100 steps before and after it."""
    steps, rates = points(run, "train", "tok_per_s")
    before = rates[(steps > step - 100) & (steps <= step)]
    after = rates[(steps > step) & (steps <= step + 100)]
    if len(before) == 0 or len(after) == 0:
        return text
    return f"{text}: {np.median(before):,.0f} → {np.median(after):,.0f} tokens/s"


# -------------------------------------------------------------------------------------------------
# Drawing

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


def smooth(x, y):
    """Mean x and y of at most 80 parts of a curve that are equally wide on a logarithmic axis: of
    single steps at first, of more and more steps later."""
    starts = np.unique(np.geomspace(1, len(x) + 1, 81).astype(int))[:-1] - 1
    sizes = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


LONG = 40  # characters of a name on the page


def titles(runs):
    """The name of each run in the title or legend: "tiny (512 steps, diverged after step 512)". Of
    long names the beginning that all have in common is left out, and then the middle."""
    names = [run.name for run in runs]
    begin = 0
    if len(names) > 1 and max(map(len, names)) > LONG:
        begin = len(os.path.commonprefix(names))
    found = []
    for run in runs:
        name = "…" * (begin > 0) + run.name[begin:]
        if len(name) > LONG:
            name = f"{name[:LONG // 2]}…{name[1 - LONG // 2:]}"
        notes = [f"{run.steps[-1]:,} steps", run.trouble]
        found.append(f"{plain(name)} ({', '.join(filter(None, notes))})")
    return found


def plain(text):
    """`text` for matplotlib, where $ starts a formula and a leading _ hides a legend entry."""
    return text.replace("$", r"\$").lstrip("_")


def position_rows(run):
    """Evaluations with a loss for each eighth of the window: at powers of four, and the last."""
    rows = [row for row in run.rows.get("eval", []) if isinstance(row.get("position_loss"), list)]
    powers = [4**n for n in range(25)]
    return [row for row in rows if row["step"] in powers or row is rows[-1]]


def open_figure(size):
    """A matplotlib Figure that opens no window: without pyplot it needs none."""
    os.environ.pop("MPLBACKEND", None)  # a notebook may name a backend that does not exist here
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcdefaults()  # so that figures are the same whatever the user's matplotlibrc says
    return Figure(figsize=size, layout="constrained", dpi=110)


def accuracy_panels(benchmarks):
    """A panel for each benchmark: scores on different questions are not comparable."""
    panels = []
    for name in benchmarks:
        curves = [(name, key, label) for key, label in ACCURACIES.items()]
        panels.append((f"Accuracy on {plain(name)}", "share right (band: ± 1 standard error)",
                       curves))
    return panels


def curves_of(run, panel):
    """The curves of a panel for which a run has numbers."""
    return [curve for curve in panel[2] if len(points(run, curve[0], curve[1])[0]) > 0]


def colors_of(n):
    """n colours, from dark blue to orange."""
    from matplotlib import colormaps
    return [colormaps["plasma"](place) for place in np.linspace(0, 0.75, n)]


class Page:
    """The figure. A single run has a colour for each curve, several have a colour for each run."""

    def __init__(self, runs, scale):
        self.runs = runs
        self.scale = scale
        self.alone = len(runs) == 1
        self.in_tokens = all(run.batch_tokens for run in runs)
        self.benchmarks = {}
        for run in runs:
            self.benchmarks |= run.benchmarks
        panels = []
        # The accuracies stand after the losses.
        for panel in [*PANELS[:4], *accuracy_panels(self.benchmarks), *PANELS[4:]]:
            if any(curves_of(run, panel) for run in runs):
                panels.append(panel)
        has_positions = any(position_rows(run) for run in runs)
        total = len(panels) + has_positions
        if total == 0:
            raise UserError("no number to draw in these logs yet — wait for the first evaluation")

        columns = min(3, total)
        rows = math.ceil(total / columns)
        legend_rows = math.ceil(len(runs) / columns)
        self.figure = open_figure((5.2 * columns, 3.6 * rows + 0.5 + 0.18 * legend_rows))
        self.colors = colors_of(len(runs))
        for place, panel in enumerate(panels, 1):
            self.draw(self.figure.add_subplot(rows, columns, place), panel)
        if has_positions:
            self.draw_positions(self.figure.add_subplot(rows, columns, total))
        names = titles(runs)
        title = names[0]
        if not self.alone:
            from matplotlib.lines import Line2D
            lines = [Line2D([], [], color=color) for color in self.colors]
            self.figure.legend(lines, names, loc="outside lower center", ncols=columns, fontsize=7)
            title = f"{len(runs)} runs"
        title = textwrap.fill(f"Training dynamics: {title}", 40 * columns)
        self.figure.suptitle(title, fontsize=13)

    def x(self, run, steps):
        return steps * run.batch_tokens if self.in_tokens else steps

    def draw(self, axes, panel):
        """One panel over tokens or steps."""
        title, ylabel, curves = panel
        keys = {key for _, key, _ in curves}
        compared = {}  # keys of the curves of several runs; a dict, because it keeps the order
        for run, color in zip(self.runs, self.colors):
            drawn = curves_of(run, panel)
            for place, curve in enumerate(drawn):
                event, key, label = curve
                if self.alone:
                    self.curve(axes, run, curve, COLOURS[place % len(COLOURS)], label)
                elif curve == drawn[-1]:
                    self.curve(axes, run, curve, color)
                    compared[key] = True
                elif event == "train":
                    self.curve(axes, run, curve, color, alpha=0.4)
                    compared[f"{key} (pale)"] = True
        if compared and len(curves) > 1:
            title += f": {', '.join(compared)}"
        if "acc" in keys:
            benchmark = curves[0][0]
            draw_chance(axes, self.benchmarks[benchmark][-1])
        if keys & LOG_Y:
            axes.set_yscale("log")
        scale = "linear" if keys & LINEAR_X else self.scale
        axes.set_xlabel("tokens" if self.in_tokens else "steps")
        self.draw_x_axis(axes, scale)
        sizes = {run.batch_tokens for run in self.runs}
        if panel is PANELS[0] and self.in_tokens and len(sizes) == 1:
            above = axes.twiny()
            self.draw_x_axis(above, scale, sizes.pop())
            above.set_xlabel("steps", fontsize=8)
            above.tick_params(labelsize=8)
        self.draw_marks(axes, with_text="tok_per_s" in keys)
        finish(axes, title, ylabel)

    def curve(self, axes, run, curve, color, label=None, alpha=1.0):
        """One curve. The rows of "train" are many and noisy: smoothed, the raw values behind it."""
        event, key, _ = curve
        steps, values = points(run, event, key)
        if key == "tok_per_s" and len(steps) > 1:  # the first step compiles
            steps, values = steps[1:], values[1:]
        x = self.x(run, steps)
        if event == "train" and key != "lr":
            if self.alone:
                axes.plot(x, values, color=color, alpha=0.25, linewidth=0.7)
            x, values = smooth(x, values)
        marker = None if event == "train" and len(x) > 1 else "o"
        axes.plot(x, values, color=color, alpha=alpha, label=label, marker=marker, markersize=3)
        if key in BANDS:
            rows = run.rows[event]
            x = self.x(run, column(rows, "step"))
            y = column(rows, key)
            error = column(rows, BANDS[key])
            axes.fill_between(x, y - error, y + error, color=color, alpha=0.15, linewidth=0)

    def draw_x_axis(self, axes, scale, unit=1):
        """Scale and ends of the x axis, in numbers of `unit` tokens or steps."""
        last = max(self.x(run, max(1, run.steps[-1])) for run in self.runs) / unit
        if scale == "log":
            # symlog is linear from 0 to the first step: so step 0 has its place too
            first = min(self.x(run, max(1, run.steps[0])) for run in self.runs) / unit
            axes.set_xscale("symlog", linthresh=first, linscale=0.3)
            powers = 10.0 ** np.arange(math.ceil(math.log10(first / 2)), math.log10(1.3 * last))
            if len(powers) > 0:
                axes.set_xticks([0, *powers])  # else 0 and the next may stand on each other
            last *= 1.3
        else:
            from matplotlib.ticker import EngFormatter, MaxNLocator
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2M
        axes.set_xlim(0, 1.05 * last)

    def draw_marks(self, axes, with_text):
        """A vertical line at each resume. with_text: what changed, and what that did to the
        speed."""
        for run in self.runs:
            for step, kind, text in run.marks:
                color, style = MARKS[kind]
                x = self.x(run, step)
                axes.axvline(x, color=color, linestyle=style, linewidth=1)
                if with_text and kind != "resume":
                    text = textwrap.fill(" " + plain(speed_change(run, step, text)), 40)
                    axes.text(x, 0, text, rotation=90, fontsize=7, va="bottom", ha="right",
                              clip_on=True, in_layout=False)
        if with_text:
            axes.set_ylim(bottom=0)

    def draw_positions(self, axes):
        """Loss by position: how it develops in a single run, or where several runs ended."""
        for run, color in zip(self.runs, self.colors):
            rows = position_rows(run)
            colors = colors_of(len(rows))
            if not self.alone:
                rows = rows[-1:]
                colors = [color]
            for row, color in zip(rows, colors):
                y = np.array([number(loss) for loss in row["position_loss"]])
                x = np.arange(len(y)) + 1
                label = f"step {row['step']:,}" if self.alone else None
                axes.plot(x, y - y[:1], color=color, label=label, marker="o", markersize=3)
        axes.set_xlabel("eighth of the window")
        finish(axes, "Loss by position, minus that of the first eighth", "nats per token")
        if self.alone:  # beside the curves, which fill the panel
            axes.legend(fontsize=7, edgecolor="none", loc="center left", bbox_to_anchor=(1, 0.5))


def story(runs):
    """A figure of one pretraining: its loss, and what it wrote at four of the steps. None if there
    are several runs, or if there is no sample."""
    run = runs[0]
    steps, losses = points(run, "eval", "val_loss")
    rows = [row for row in run.rows["sample"] if row["step"] in steps]
    if len(runs) > 1 or not rows:
        return None
    figure = open_figure((8, 4.5))
    axes = figure.add_subplot()
    axes.plot(*points(run, "train", "loss"), color="0.8", linewidth=0.7, label="training")
    axes.plot(steps, losses, color=COLOURS[1], marker="o", markersize=3, label="validation")
    # Not evenly spread: the first samples are all noise.
    places = sorted({round(share * (len(rows) - 1)) for share in (0, 0.5, 0.75, 1)})
    for line, place in enumerate(places):
        row = rows[place]
        text = f"step {row['step']:,}: {row.get('prompt')} {row.get('text')}"
        text = "".join(c if c.isprintable() and c < "\u0590" else " " for c in text)  # has a glyph
        text = textwrap.fill(plain(textwrap.shorten(text, 80, placeholder=" ...")), 42)
        place = (row["step"], losses[steps == row["step"]][0])
        axes.annotate(text, place, fontsize=8, xytext=(0.63, 0.97 - 0.13 * line), va="top",
                      textcoords="axes fraction", zorder=3,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                      arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7})
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_xlim(left=0)
    axes.set_xlabel("steps")
    finish(axes, plain(f"{run.name}: loss, and what it writes"), "nats per token")
    axes.get_legend().set_loc("lower left")
    return figure


def draw_chance(axes, row):
    """What guessing would score: 25 % where a question has four endings."""
    n_choices = number(row.get("n_choices"))
    if n_choices > 1:
        axes.axhline(1 / n_choices, color="0.4", linestyle="--", linewidth=1,
                     label=f"chance {1 / n_choices:.0%}")


def finish(axes, title, ylabel):
    axes.set_title(textwrap.fill(title, 55), fontsize=11)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, edgecolor="none")


# -------------------------------------------------------------------------------------------------
# trajectory.md

def trajectory(runs):
    """The samples of each run, step by step, beside its loss and accuracy: Markdown."""
    lines = []
    for run in runs:
        lines += [f"# {escape(run.name)}", ""]
        if run.is_tuning:
            lines += questions_table(run)
        for (prompt, settings), rows in run.samples.items():
            lines += samples_table(run, prompt, settings, rows)
        if not run.samples:
            lines += ["No samples in this log.", ""]
    return "\n".join(lines)


def samples_table(run, prompt, settings, rows):
    """The lines of a table with a row for each sample."""
    if run.is_tuning:
        losses = dict(zip(*points(run, "sft_eval", "heldout_loss")))  # {step: loss}
        intro = f"“{escape(prompt)}” is answered"
        titles = ["held-out loss", "accuracy", "answer"]
    else:
        losses = dict(zip(*points(run, "eval", "val_loss")))
        intro = f"“{escape(prompt)}” goes on with"
        titles = ["val loss", "accuracy", "sample"]
    if settings:
        intro += f" ({escape(settings)})"
    if run.benchmarks:
        benchmark = escape(run.rows["benchmark"][0].get("name"))
        titles[1] = f"accuracy on {benchmark} in %: acc / acc_norm / acc_pmi"
    first = ["step", "tokens"] if run.batch_tokens else ["step"]
    lines = [f"{intro}:", "", table_row(first + titles), "|" + "---:|" * (len(first) + 2) + "---|"]
    accuracies = {row["step"]: percent(row) for row in run.rows["benchmark"]}
    for row in rows:
        step = row["step"]
        cells = [f"{step:,}"]
        if run.batch_tokens:
            cells.append(f"{step * run.batch_tokens:,}")
        loss = f"{losses[step]:.4f}" if step in losses else ""
        lines.append(table_row([*cells, loss, accuracies.get(step, ""), sample_text(row)]))
    return [*lines, ""]


def questions_table(run):
    """The lines of a table with the held-out questions of a tuning: the answers of the base and of
    the tuned model, the most frequent answer of the training data, and the right answer."""
    info = run.rows.get("instructions", [{}])[-1]
    questions = info.get("questions")
    if not isinstance(questions, list) or not questions:
        return ["No held-out row to ask a question from: none was held out, or none fits into the "
                "window.", ""]
    last = run.rows["sample"][-1]["step"] if run.rows["sample"] else 0
    frequent = escape(info.get("frequent_answer", ""))
    share = number(info.get("frequent_share"))
    lines = [table_row(["question, held out", "base (step 0)", f"tuned (step {last:,})",
                        f"the most frequent training answer ({share:.2%})", "right answer"]),
             "|---|---|---|---|---|"]
    for question in questions:
        if not isinstance(question, dict):
            continue
        prompt = str(question.get("question"))
        answers = {row["step"]: sample_text(row) for row in run.samples.get((prompt, ""), [])}
        lines.append(table_row([escape(prompt), answers.get(0, ""), answers.get(last, ""), frequent,
                                escape(question.get("answer"))]))
    lines += ["", "What a model says to every question is a habit of its training, not knowledge."]
    return [*lines, ""]


def table_row(cells):
    return f"| {' | '.join(cells)} |"


def sample_text(row):
    """The text of a sample; with " …" if it was cut short."""
    cut = " …" if row.get("cut") is True else ""
    return escape(row.get("text", "")) + cut


def escape(value):
    """A value as text that Markdown shows as it is, on one line, without control characters."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(value).split()))
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", text)


def percent(row):
    """The accuracies of a benchmark row in percent: "28.1 / 29.4 / 33.0"."""
    shares = [number(row.get(key)) for key in ("acc", "acc_norm", "acc_pmi")]
    return " / ".join(f"{100 * share:.1f}" for share in shares if math.isfinite(share))


# -------------------------------------------------------------------------------------------------
# The console

SUMMARY = [  # the last number of each: name, event, key
    ("loss", "train", "loss"),
    ("val loss", "eval", "val_loss"),
    ("bits/byte", "eval", "val_bpb"),
    ("context gain", "eval", "context_gain"),
    ("held-out answers: loss", "sft_eval", "heldout_loss"),
    ("tokens right", "sft_eval", "token_acc"),
    ("that end", "sft_eval", "ended"),
]


def summary(run):
    """{name: text}: the last numbers of a run, its speed and its duration."""
    texts = {"steps": f"{run.steps[-1]:,}"}
    if run.trouble:
        texts["note:"] = run.trouble
    if run.batch_tokens:
        texts["tokens"] = f"{run.steps[-1] * run.batch_tokens:,}"
    for name, event, key in SUMMARY:
        steps, values = points(run, event, key)
        if len(values) > 0:
            texts[name] = f"{values[-1]:.3f}"
            if steps[-1] < run.steps[-1]:
                texts[name] += f" (at step {steps[-1]:,.0f})"
    for name, rows in run.benchmarks.items():
        texts[f"{name}, %"] = percent(rows[-1])
    _, rates = points(run, "train", "tok_per_s")
    if len(rates) > 0:
        texts["tokens/s (median)"] = f"{np.median(rates):,.0f}"
    if run.seconds > 0:
        texts["seconds"] = f"{run.seconds:.0f}"
        texts["of them evaluating"] = f"{run.evaluating / run.seconds:.1%}"
    return texts


@script
def main(argv=None):
    parser = Parser(description="Draw logs: dynamics.png, trajectory.md, story.png.")
    parser.add_argument("logs", nargs="+", metavar="RUN_OR_LOG",
                        help="run folder, metrics.jsonl, another .jsonl, or a plain log.txt")
    parser.add_argument("--out", default="figures", help="folder to write into")
    parser.add_argument("--scale", choices=("log", "linear"), default="log",
                        help="of the x axis; log because early learning is fast")
    parser.add_argument("--batch_tokens", type=count, help="tokens per step, if not in the log")
    args = parser.parse_args(argv)
    found = {}
    for log in args.logs:
        try:
            found[log] = read_run(log, args.batch_tokens)
        except UserError as why:
            if log == args.logs[-1] and not found:
                raise
            print(f"left out: {why}", file=sys.stderr)
    times = Counter(run.name for run in found.values())
    for path, run in found.items():
        if times[run.name] > 1:
            run.name = path
    runs = list(found.values())

    page = Page(runs, args.scale)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    page.figure.savefig(out / "dynamics.png")
    (out / "trajectory.md").write_text(trajectory(runs), encoding="utf-8", errors="replace")
    for run in runs:
        numbers = [f"{name} {text}" for name, text in summary(run).items()]
        print(f"{run.name}: {', '.join(numbers)}")
        for step, _, text in run.marks:
            print(f"  step {step:,}: {speed_change(run, step, text)}")
    drawn = [f"{out}/dynamics.png", f"{out}/trajectory.md"]
    figure = story(runs)
    (out / "story.png").unlink(missing_ok=True)  # of another run
    if figure is not None:
        figure.savefig(out / "story.png")
        drawn.append(f"{out}/story.png")
    print(f"drawn: {', '.join(drawn)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
