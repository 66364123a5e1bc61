"""plot_dynamics.py — logs into pictures and numbers: dynamics.png, one page, and trajectory.md, the samples as a table.

    python plot_dynamics.py runs/tiny                        # into figures/; also while the run is going on
    python plot_dynamics.py runs/a runs/b logs/default       # several on one page, each with its name
    python plot_dynamics.py log.txt --batch_tokens 524288    # the plain log of build-nanogpt and of the paper's code

Reads a run's metrics.jsonl, and from its evaluations.jsonl the samples and the benchmarks that the run itself did not
score (losses there may be of other text, and are left alone). Needs numpy and matplotlib and no checkpoint: a log is enough.
"""
import argparse
import json
import math
import re
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


def fail(message):
    print(f"plot_dynamics.py: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Reading. Whatever wrote the log, it becomes a list of events: {"event": …, "step": …, …}.

NUMBERS = set("""tokens loss lr grad_norm dt_ms tok_per_s val_loss val_bpb context_gain context_gain_stderr acc acc_norm acc_pmi
    stderr stderr_norm stderr_pmi heldout_loss token_acc ended frequent_share n n_choices distinct_2 repetition seconds time""".split())


def number(value):
    """A float; NaN for what is no number, as train.py writes a loss that is none."""
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def parse_json(line):
    event = json.loads(line)
    if not isinstance(event["event"], str) or type(event["step"]) is not int or not 0 <= event["step"] < 2**53:
        raise ValueError("no event")
    if not isinstance(event.get("questions", []), list):
        raise ValueError("no list")
    event |= {key: number(value) for key, value in event.items() if key in NUMBERS}
    if "position_loss" in event:
        event["position_loss"] = [number(loss) for loss in event["position_loss"] or []]
    return event


def parse_plain(line):
    """A line "step stream value" of build-nanogpt's log.txt; None for streams that we do not know."""
    step, stream, value = line.split()
    if not step.isdigit() or len(step) > 15:
        raise ValueError("no step")
    step, value = int(step), float(value)
    return {"train": {"event": "train", "step": step, "loss": value},
            "val": {"event": "eval", "step": step, "val_loss": value},
            "hella": {"event": "benchmark", "step": step, "name": "hellaswag", "acc_norm": value, "n_choices": 4}}.get(stream)


def read_events(path):
    """All events of one log file. Lines that are broken, or half written, are left out with a warning."""
    events, broken = [], []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                events.append((parse_json if path.suffix == ".jsonl" or line[0] in "{[" else parse_plain)(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                broken.append(line_number)
    if broken:
        print(f"warning: {path}: {len(broken)} broken line{'s' * (len(broken) > 1)} left out (line {', '.join(map(str, broken[:5]))}"
              f"{' …' * (len(broken) > 5)})", file=sys.stderr)
    return [event for event in events if event]


def column(rows, key):
    """The numbers under `key`, (len(rows),) float64; NaN where there is none."""
    return np.array([row.get(key, math.nan) for row in rows], dtype=float)


DRAWN = ("temperature", "top_k", "top_p", "seed", "max_new_tokens")  # how sample.py --trajectory drew; a run's own samples do not say


@dataclass
class Run:
    """What is drawn of a run: rows by kind, sorted by step, one per step (after a resume the later one counts)."""
    name: str
    train: list
    eval: list
    benchmarks: dict                            # (name, style, number of questions): rows; the one with the most rows first
    samples: dict                               # (prompt, how it was drawn): rows
    batch_tokens: int | None                    # None: unknown or not the same each step; the x axis shows steps
    tuning: list = field(default_factory=list)  # of sft.py: rows about held-out answers
    asked: dict = field(default_factory=dict)   # of sft.py: its "instructions" event
    marks: list = field(default_factory=list)   # (step, kind, text): resumes and changes
    seconds: float | None = None                # from the start to the end, if nothing came between
    looking: float = 0.0                        # of them, seconds of evaluations and benchmarks

    def x(self, steps, in_tokens):
        return np.asarray(steps, dtype=float) * (self.batch_tokens if in_tokens else 1)


def latest(events, key=lambda event: None):
    """{key: rows sorted by step}: of several events with the same key and step the last wins."""
    kept = {}
    for event in events:
        kept.setdefault(key(event), {})[event["step"]] = event
    return {name: [rows[step] for step in sorted(rows)] for name, rows in kept.items()}


def find_marks(events):
    """[(step, "resume" | "optimizer" | "hardware", text)] of every resume."""
    marks, env = [], None
    for event in events:
        if event["event"] not in ("start", "resume") or not isinstance(event.get("env"), dict):
            continue
        new = event["env"]
        if event["event"] == "resume":
            changed = [f"{name} {env.get(name)} → {new.get(name)}" for name in {**(env or {}), **new}
                       if env and env.get(name) != new.get(name)]
            kind = "hardware" if changed else "resume" if event.get("restored_optimizer", True) else "optimizer"
            lost = [] if event.get("restored_optimizer", True) else ["without optimizer state"]
            marks.append((event["step"], kind, ", ".join(changed + lost).replace("$", r"\$") or "resume"))
        env = new
    return marks


def read_run(path, batch_tokens=None):
    """The Run in a folder (metrics.jsonl or log.txt) or a single log file."""
    path = Path(path)
    files = [path / "metrics.jsonl", path / "log.txt"] if path.is_dir() else [path]
    log = next((file for file in files if file.is_file()), None)
    if log is None:
        fail(f"{path}: no metrics.jsonl and no log.txt in it — give a run folder or a log file" if path.is_dir() else
             f"{path}: no such file or folder — give a run folder or a log file")
    events, extra = read_events(log), []
    if log.name == "metrics.jsonl" and log.with_name("evaluations.jsonl").is_file():
        extra = read_events(log.with_name("evaluations.jsonl"))
    of = {kind: [e for e in events if e["event"] == kind] for kind in ("train", "eval", "sft_eval", "instructions", "start", "resume", "end")}
    if not of["train"] and not of["eval"] and not of["sft_eval"]:
        fail(f"{log}: nothing to draw, no train or eval line in it — is it a log of train.py, or lines of \"step train|val|hella value\"?")
    scores = [e for e in extra + events if e["event"] == "benchmark"]  # the last of a step wins: the run's own
    said = [e for e in events + extra if e["event"] == "sample"]
    known = [e["tokens"] / e["step"] for e in of["train"] if e["step"] and e.get("tokens", 0) > 0 and not of["sft_eval"]]
    whole = len(of["start"]) == len(of["end"]) == 1 and not of["resume"]
    seconds = of["end"][0].get("time", math.nan) - of["start"][0].get("time", math.nan) if whole else math.nan
    benchmarks = latest(scores, lambda e: (str(e.get("name", "benchmark")), str(e.get("style", "token")), number(e.get("n"))))
    return Run(name=(log.resolve().parent.name if log.name in ("metrics.jsonl", "log.txt") else log.stem),
               train=latest(of["train"]).get(None, []), eval=latest(of["eval"]).get(None, []),
               benchmarks=dict(sorted(benchmarks.items(), key=lambda item: -len(item[1]))),
               samples=latest(said, lambda e: (str(e.get("prompt", "")), ", ".join(f"{k} {e[k]}" for k in DRAWN if e.get(k) is not None))),
               batch_tokens=round(np.median(known)) if known else batch_tokens, marks=find_marks(events),
               tuning=latest(of["sft_eval"]).get(None, []), asked=(of["instructions"] or [{}])[-1],
               looking=sum(e.get("seconds", 0) for e in events if e["event"] in ("eval", "sft_eval", "benchmark")),
               seconds=seconds if math.isfinite(seconds) else None)


# ---------------------------------------------------------------------------------------------------------------------
# The page. Each panel draws what all runs have of it; a panel that none has anything for is left out.

ACCURACIES = ("acc", "acc_norm", "acc_pmi")


def smooth(values, share=0.05):
    """Mean over the steps around each one, `share` of its number to each side: even on a logarithmic axis. Fewer near the
    end, so that as many are before as after."""
    i, known = np.arange(len(values)), np.isfinite(values)
    half = np.minimum((share * i).astype(int), len(values) - 1 - i)
    total, count = (np.concatenate([[0], np.cumsum(v)]) for v in (np.where(known, values, 0), known))
    low, high = i - half, i + half + 1
    return (total[high] - total[low]) / np.where(count[high] > count[low], count[high] - count[low], math.nan)


def thin(x, y, most=2000):
    """At most so many points, evenly on a logarithmic axis: no page shows more."""
    if len(x) <= most:
        return x, y
    keep = np.unique(np.geomspace(1, len(x), most).astype(int) - 1)
    return x[keep], y[keep]


class Page:
    """Draws runs into axes. One run is drawn with a colour for each quantity, several with a colour for each run."""

    def __init__(self, runs, scale):
        try:
            from matplotlib import colormaps
            from matplotlib.figure import Figure  # without pyplot: no window, no state that others share
        except ImportError:
            fail("matplotlib is missing — run: pip install -r requirements.txt")
        self.runs, self.scale, self.alone, self.colormap = runs, scale, len(runs) == 1, colormaps["viridis"]
        self.number = {id(run): number for number, run in enumerate(runs)}
        self.names = {id(run): run.name.lstrip("_").replace("$", r"\$") for run in runs}  # _ would hide, $ starts a formula
        self.in_tokens = all(run.batch_tokens for run in runs)
        panels = [self.loss, self.bits_per_byte, self.answers, self.accuracy, self.context_gain, self.position_loss, self.samples,
                  self.learning_rate, self.grad_norm, self.throughput]
        panels = [panel for panel in panels if panel(None)]
        if not panels:
            fail("no number to draw in these logs yet")
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        self.figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.5), layout="constrained", dpi=110)
        for number, panel in enumerate(panels, 1):
            panel(self.figure.add_subplot(rows, columns, number))
        last = {self.names[id(run)]: (run.train or run.eval or run.tuning)[-1]["step"] for run in runs}
        self.figure.suptitle("Training dynamics: " + ", ".join(f"{name} ({step:,} steps)" for name, step in last.items()), fontsize=13)

    def color(self, run, number=0):
        return f"C{number if self.alone else self.number[id(run)] % 10}"

    def label(self, run, what=None):
        return what if self.alone else self.names[id(run)]

    def curve(self, axes, run, rows, key, number=0, what=None, smoothed=False, **how):
        """One line of rows[key] over tokens; False if there are no numbers."""
        y = column(rows, key)
        if axes is None or not np.isfinite(y).any():
            return bool(np.isfinite(y).any())
        x = self.run_x(run, rows)
        if smoothed:
            if self.alone:
                axes.plot(x, y, color=self.color(run, number), alpha=0.25, linewidth=0.7)
            x, y = thin(x, smooth(y))
        known = np.isfinite(y)
        axes.plot(x[known], y[known], color=self.color(run, number), label=self.label(run, what), **{"linewidth": 1.5, **how})
        return True

    def run_x(self, run, rows):
        return run.x([row["step"] for row in rows], self.in_tokens)

    def finish(self, axes, title, ylabel):
        """Title, scale, and a vertical line for each resume and change; the same in every panel over tokens."""
        drawn = [x for run in self.runs for rows in (run.train, run.eval, run.tuning) for x in self.run_x(run, rows[:2])]
        first = min((x for x in drawn if x > 0), default=1)
        if self.scale == "log":
            axes.set_xscale("symlog", linthresh=first, linscale=0.3)  # symlog: step 0 has a place too
            axes.set_xlim(left=0)
        styles = {"resume": ("0.55", ":"), "optimizer": ("purple", "--"), "hardware": ("firebrick", "--")}
        for run in self.runs:
            for step, kind, text in run.marks:
                color, style = styles[kind]
                axes.axvline(run.x(step, self.in_tokens), color=color, linestyle=style, linewidth=1)
        axes.set_xlabel("tokens" if self.in_tokens else "steps")
        axes.set_title(title, fontsize=11)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, edgecolor="none")
        return True

    # Each panel: without axes it says whether there is anything to draw; with them it draws.

    def every(self, axes, rows_of, key, title, ylabel, **how):
        drawn = [self.curve(axes, run, rows_of(run), key, **how) for run in self.runs]
        return any(drawn) and (axes is None or self.finish(axes, title, ylabel))

    def loss(self, axes):
        drawn = []
        for run in self.runs:
            drawn.append(self.curve(axes, run, run.train, "loss", 0, "training", smoothed=True, alpha=1 if self.alone else 0.4))
            if drawn[-1] and not self.alone and axes:
                axes.lines[-1].set_label("_" if run.eval or run.tuning else self.names[id(run)])
            drawn.append(self.curve(axes, run, run.eval, "val_loss", 1, "validation", marker="o", markersize=3))
            drawn.append(self.curve(axes, run, run.tuning, "heldout_loss", 1, "held-out answers", marker="o", markersize=3))
        return any(drawn) and (axes is None or self.finish(axes, "Loss", "nats per token"))

    def bits_per_byte(self, axes):
        return self.every(axes, lambda run: run.eval, "val_bpb", "Bits per byte of validation text", "bits per byte",
                          number=1, marker="o", markersize=3)

    def answers(self, axes):
        drawn = []
        for run in self.runs:
            drawn.append(self.curve(axes, run, run.tuning, "token_acc", 8, "tokens right, given those before", marker="o", markersize=3))
            drawn.append(self.curve(axes, run, run.tuning, "ended", 9, "answers that end", marker="o", markersize=3, linestyle=":"))
            if drawn[-1] and axes and not self.alone:
                axes.lines[-1].set_label("_")
        return any(drawn) and (axes is None or self.finish(axes, "Held-out answers" if self.alone else "Held-out answers: tokens right; dotted: that end", "share"))

    def band(self, axes, run, rows, key, error, number):
        y, spread = column(rows, key), column(rows, error)
        if axes and np.isfinite(spread).any():
            axes.fill_between(self.run_x(run, rows), y - spread, y + spread, color=self.color(run, number), alpha=0.15, linewidth=0)

    def accuracy(self, axes):
        """Of one run all three accuracies of the benchmark that it scored most often; of others, and of several runs, acc_norm."""
        drawn, chances, names = False, set(), {key: None for run in self.runs for key in list(run.benchmarks)[:None if self.alone else 1]}
        for run in self.runs:
            for place, (name, style, n) in enumerate(key for key in names if key in run.benchmarks):
                rows = run.benchmarks[name, style, n]
                chances |= {1 / row["n_choices"] for row in rows if row.get("n_choices", 0) > 1}
                about = f"{name}, {style} style".replace("$", r"\$") + (f", {n:.0f} questions" if n > 0 else "")
                measures = dict(zip(ACCURACIES, ("whole ending", "per character" if style == "harness" else "per token", "gain over no context")))
                for number, key in enumerate(measures if self.alone and not place else ["acc_norm"], start=3 * place):
                    what = f"{key}: {measures[key]}" if not place else f"{key}: {about}"
                    if self.curve(axes, run, rows, key, number, what, marker="o", markersize=3, linestyle="-" if not place else ":"):
                        drawn = True
                        if axes and not self.alone and len(names) > 1:
                            axes.lines[-1].set_label(f"{self.names[id(run)]}: {about}")
                        self.band(axes, run, rows, key, key.replace("acc", "stderr"), number)
        if axes is None or not drawn:
            return drawn
        for chance in chances:
            axes.axhline(chance, color="0.4", linestyle="--", linewidth=1, label=f"chance {chance:.0%}")
        return self.finish(axes, f"Accuracy on {', '.join(sorted({name for name, *_ in names}))} (band: ± 1 standard error)".replace("$", r"\$"),
                           "share right" if self.alone else "acc_norm")

    def context_gain(self, axes):
        for run in self.runs:
            self.band(axes, run, run.eval, "context_gain", "context_gain_stderr", 2)
        return self.every(axes, lambda run: run.eval, "context_gain", "Context gain: loss of the first eighth − of the last", "nats",
                          number=2, marker="o", markersize=3)

    def position_loss(self, axes):
        found = [(run, [row for row in run.eval if row.get("position_loss")]) for run in self.runs]
        found = [(run, rows) for run, rows in found if rows]
        if axes is None or not found:
            return bool(found)
        for run, rows in found:
            steps = {row["step"]: row for row in rows}
            shown = [rows[-1]] if not self.alone else [steps[s] for s in steps if s == rows[-1]["step"] or s > 0 and math.log(s, 4).is_integer()]
            for i, row in enumerate(shown):
                color = self.colormap(i / max(1, len(shown))) if self.alone else self.color(run)
                y = np.array(row["position_loss"])
                axes.plot(range(1, 1 + len(y)), y - y[0], color=color, marker="o", markersize=3, label=self.label(run, f"step {row['step']:,}"))
        axes.set(xlabel="eighth of the window", ylabel="nats per token")
        axes.set_title("Loss by position, minus that of the first eighth", fontsize=11)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, edgecolor="none")
        return True

    def samples(self, axes):
        drawn = []
        for run in self.runs:
            rows = next(iter(run.samples.values()), [])  # the run's own, if it has any
            drawn.append(self.curve(axes, run, rows, "repetition", 3, "repetition: 4-grams seen before", marker="o", markersize=3))
            if self.alone:
                drawn.append(self.curve(axes, run, rows, "distinct_2", 4, "distinct_2: different bigrams", marker="o", markersize=3))
        return any(drawn) and (axes is None or self.finish(axes, "Samples" if self.alone else "Samples: 4-grams seen before", "share"))

    def learning_rate(self, axes):
        return self.every(axes, lambda run: run.train, "lr", "Learning rate", "lr", number=5)

    def grad_norm(self, axes):
        if axes:
            axes.set_yscale("log")
        return self.every(axes, lambda run: run.train, "grad_norm", "Gradient norm, before clipping", "L2 norm", number=6, smoothed=True)

    def throughput(self, axes):
        drawn = self.every(axes, lambda run: run.train, "tok_per_s", "Throughput, without evaluating and saving", "tokens per second",
                           number=7, smoothed=True)
        if axes and drawn:
            rates = np.concatenate([column(run.train, "tok_per_s") for run in self.runs])
            axes.set_ylim(0, 1.1 * np.percentile(rates[np.isfinite(rates)], 99))
            for run in self.runs:
                for step, kind, text in run.marks:
                    if kind != "resume":
                        axes.text(run.x(step, self.in_tokens), 0, textwrap.fill(f" {speed_change(run, step, text)}", 40), rotation=90, fontsize=7,
                                  va="bottom", ha="right", clip_on=True, in_layout=False)
        return drawn


def speed_change(run, step, text):
    """A mark with the median tokens/s of the 100 steps before and after it."""
    before, after = ([row for row in run.train if low < row["step"] <= high] for low, high in ((step - 100, step), (step, step + 100)))
    rates = [np.nanmedian(column(rows, "tok_per_s")) for rows in (before, after) if rows and np.isfinite(column(rows, "tok_per_s")).any()]
    return text + (f": {rates[0]:,.0f} → {rates[1]:,.0f} tokens/s" if len(rates) == 2 else "")


# ---------------------------------------------------------------------------------------------------------------------
# The words and the numbers

def percent(row):
    """The three accuracies of a benchmark row, in percent, as "28.1 / 29.4 / 33.0"."""
    shares = [row[key] for key in ACCURACIES if math.isfinite(row.get(key, math.nan))]
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def trajectory(runs):
    """What each run said, and how good it was, step by step: Markdown."""
    parts = []
    for run in runs:
        losses = {row["step"]: row["heldout_loss" if run.tuning else "val_loss"] for row in run.tuning or run.eval if row.keys() & {"val_loss", "heldout_loss"}}
        (name, *_), scored = next(iter(run.benchmarks.items()), ([""], []))  # the one scored most often
        accuracies = {row["step"]: percent(row) for row in scored}
        title = f"accuracy on {name} in %: {' / '.join(ACCURACIES)}" if name else "accuracy"
        parts.append(f"# {run.name}\n")
        parts += side_by_side(run) if run.tuning else []
        for (prompt, drawn), rows in run.samples.items():
            of_tokens = bool(run.batch_tokens)
            parts.append(f"“{escape(prompt)}” {'is answered' if run.tuning else 'goes on with'}{f' ({escape(drawn)})' if drawn else ''}:\n\n"
                         f"| step | {'tokens | ' * of_tokens}{'held-out' if run.tuning else 'val'} loss | {title} | {'answer' if run.tuning else 'sample'} |\n"
                         f"|---:|{'---:|' * of_tokens}---:|---:|---|")
            for row in rows:
                step, loss = row["step"], losses.get(row["step"])
                tokens = f"{step * run.batch_tokens:,} | " if of_tokens else ""
                loss = "" if loss is None else f"{loss:.4f}"
                parts.append(f"| {step:,} | {tokens}{loss} | {accuracies.get(step, '')} | {said_in(row)} |")
            parts.append("")
        if not run.samples:
            parts.append("No samples in this log.\n")
    return "\n".join(parts)


def side_by_side(run):
    """Questions that were held out, their answers by the base and by the tuned model, and what training showed most often."""
    said = {prompt: {row["step"]: said_in(row) for row in rows} for (prompt, _), rows in run.samples.items()}
    answers = {str(q.get("question")): escape(str(q.get("answer", ""))) for q in run.asked.get("questions", []) if isinstance(q, dict)}
    if not answers:
        return ["No held-out row to ask a question from: none was held out, or none fits into the window.\n"]
    last = max((max(steps) for steps in said.values()), default=0)
    habit, share = escape(str(run.asked.get("frequent_answer", ""))), number(run.asked.get("frequent_share"))
    lines = [f"| question, held out | base (step 0) | tuned (step {last:,}) | the most frequent training answer ({share:.2%}) | right answer |", "|---|---|---|---|---|"]
    lines += [f"| {escape(q)} | {said.get(q, {}).get(0, '')} | {said.get(q, {}).get(last, '')} | {habit} | {answer} |" for q, answer in answers.items()]
    return [*lines, "\nWhat a model says to every question is a habit of its training, not knowledge.\n"]


def said_in(row):
    """The text of a sample; with " …" where it is known to have been cut short."""
    return escape(str(row.get("text", ""))) + " …" * (row.get("cut") is True)


def escape(text):
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(text.split()))


def summary(run):
    """What one wants to know of a run, as {name: text}."""
    step = max(rows[-1]["step"] for rows in (run.train, run.eval, run.tuning) if rows)
    words = {"steps": f"{step:,}"}
    if run.batch_tokens:
        words["tokens"] = f"{step * run.batch_tokens:,}"
    for name, rows, key in (("loss", run.train, "loss"), ("val loss", run.eval, "val_loss"), ("bits/byte", run.eval, "val_bpb"),
                            ("context gain", run.eval, "context_gain"), ("held-out answers: loss", run.tuning, "heldout_loss"),
                            ("tokens right", run.tuning, "token_acc"), ("that end", run.tuning, "ended")):
        known = [row[key] for row in rows if math.isfinite(row.get(key, math.nan))]
        if known:
            words[name] = f"{known[-1]:.3f}"
    for (name, style, n), rows in run.benchmarks.items():
        words[f"{name} ({style}{f', {n:.0f} questions' if n > 0 else ''}), %"] = percent(rows[-1])
    rates = column(run.train, "tok_per_s")
    if np.isfinite(rates).any():
        words["tokens/s (median)"] = f"{np.nanmedian(rates):,.0f}"
    if run.seconds:
        words["seconds"] = f"{run.seconds:.0f}"
        words["of them evaluating"] = f"{run.looking / run.seconds:.1%}"
    return words


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw logs: dynamics.png and trajectory.md.")
    parser.add_argument("logs", nargs="+", metavar="RUN_OR_LOG", help="run folder, metrics.jsonl, another .jsonl, or a plain log.txt")
    parser.add_argument("--out", default="figures", help="folder to write into (default figures)")
    parser.add_argument("--scale", choices=("log", "linear"), default="log", help="of the x axis (default log: early learning is fast)")
    parser.add_argument("--batch_tokens", type=int, help="tokens per step, for logs that do not say")
    args = parser.parse_args(argv)
    if args.batch_tokens is not None and not 1 <= args.batch_tokens <= 2**40:
        fail(f"--batch_tokens {args.batch_tokens} is out of range — it can be 1 to {2**40}")
    sys.stdout.reconfigure(errors="replace")  # a terminal that knows fewer characters than the log shows "?"
    out = Path(args.out)
    try:
        args.logs = list(dict.fromkeys(args.logs))
        runs = [read_run(log, args.batch_tokens) for log in args.logs]
        repeated = Counter(run.name for run in runs)
        for run, log in zip(runs, args.logs):
            run.name = log if repeated[run.name] > 1 else run.name
        out.mkdir(parents=True, exist_ok=True)
        Page(runs, args.scale).figure.savefig(out / "dynamics.png")
        (out / "trajectory.md").write_text(trajectory(runs), encoding="utf-8", errors="replace")
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror} — check the path, its permissions and the disk")
    for run in runs:
        print(f"{run.name}: " + ", ".join(f"{name} {text}" for name, text in summary(run).items()))
        for step, kind, text in run.marks:
            print(f"  step {step:,}: {speed_change(run, step, text)}")
    print(f"drawn: {out}/dynamics.png, {out}/trajectory.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
