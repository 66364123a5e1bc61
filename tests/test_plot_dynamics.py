"""plot_dynamics.py shows what the logs say: figure and tables against the lines of a log."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import plot_dynamics
from conftest import messages, rows
from plot_dynamics import Page, read_run

ROOT = Path(__file__).parent.parent
DRAW = plot_dynamics.main  # conftest replaces plot_dynamics.main, which train.py calls


def draw(*arguments):
    """The exit code of plot_dynamics.py."""
    try:
        return DRAW([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code


def events_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_log(folder, events):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(event) + "\n" for event in events]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def panel(page, title):
    """The axes of the first panel whose title starts with `title`, or None."""
    found = [axes for axes in page.figure.axes if axes.get_title().startswith(title)]
    return found[0] if found else None


def curve(page, title, label):
    """(x, y) of the curve in that panel whose label starts with `label`."""
    lines = panel(page, title).lines
    return next(line.get_data() for line in lines if line.get_label().startswith(label))


def test_training_draws_its_run(whole):
    """Catches: a finished run folder without figure, or with one of an earlier moment."""
    assert (whole / "dynamics.png").read_bytes()[:4] == b"\x89PNG"
    assert "| 20 |" in (whole / "trajectory.md").read_text()


def test_page_has_a_panel_for_all_that_is_logged(whole):
    """Catches: a panel that is lost, or drawn without numbers (a tuning has some of its own)."""
    page = Page([read_run(whole)], "log")
    assert [axes.get_title().split()[0].strip(":,") for axes in page.figure.axes] == [
        "Loss", "Bits", "Accuracy", "Context", "Samples", "Learning", "Gradient", "Throughput",
        "Loss"]


@pytest.mark.parametrize("title, label, event, key", [
    ("Loss", "validation", "eval", "val_loss"),
    ("Accuracy", "acc_pmi", "benchmark", "acc_pmi"),
])
def test_curves_are_those_of_the_log(whole, title, label, event, key):
    """Catches: a curve of another key, at other steps, or over steps instead of tokens."""
    x, y = curve(Page([read_run(whole)], "log"), title, label)
    wanted = np.array(rows(whole, event, ("step", key)))
    assert np.array_equal(x, wanted[:, 0] * 128)
    assert np.array_equal(y, wanted[:, 1])
    other = np.array(rows(whole, event, ("seconds",)))
    assert not np.array_equal(y, other[:, 0])  # control


def test_trajectory_shows_the_samples(whole, tmp_path):
    """Catches: a sample beside the loss of another step, or one that Markdown swallows."""
    assert draw(whole, "--out", tmp_path) == 0
    table = (tmp_path / "trajectory.md").read_text()
    last_loss = rows(whole, "eval", ("val_loss",))[-1][0]
    last_text = rows(whole, "sample", ("text",))[-1][0]
    assert f"| 20 | 2,560 | {last_loss:.4f} |" in table
    assert plot_dynamics.escape(last_text) in table
    assert plot_dynamics.escape("<b> a|b\n*c*") == r"\<b\> a\|b \*c\*"


def test_tuning_shows_base_and_tuned_answers(whole, tmp_path):
    """Catches: a question whose answer is another's, another step's, or sample.py's."""
    question = {"question": "a?", "answer": "right"}
    answer = {"event": "sample", "prompt": "a?"}
    write_log(tmp_path, [
        {"event": "instructions", "step": 0, "frequent_answer": "often", "frequent_share": 0.25,
         "questions": [question]},
        {"event": "sft_eval", "step": 0, "heldout_loss": 3.0, "token_acc": 0.1, "ended": 0.0},
        {**answer, "step": 0, "text": "base", "cut": True},
        {**answer, "step": 12, "text": "tuned", "cut": False},
        {**answer, "step": 12, "text": "other", "seed": 1},
    ])
    table = plot_dynamics.trajectory([read_run(tmp_path)])
    assert "| a? | base … | tuned | often | right |" in table
    assert "answer (25.00%)" in table
    assert "“a?” is answered (seed 1):" in table
    assert "question, held out" not in plot_dynamics.trajectory([read_run(whole)])  # control


def test_tuning_is_drawn_over_steps(whole, tmp_path):
    """Catches: tokens on the x axis of a tuning, whose steps differ in their number of tokens."""
    tuning = {"event": "sft_eval", "step": 0, "heldout_loss": 3.0, "token_acc": 0.1, "ended": 0.5}
    run = read_run(write_log(tmp_path, [*events_of(whole), tuning]))
    page = Page([run], "log")
    assert panel(page, "Held-out answers").get_xlabel() == "steps"
    assert curve(page, "Held-out answers", "tokens right")[1].tolist() == [0.1]
    assert panel(Page([read_run(whole)], "log"), "Loss").get_xlabel() == "tokens"  # control
    assert panel(Page([run, read_run(whole)], "log"), "Loss").get_xlabel() == "steps"


def test_later_evaluations_are_added(whole, tmp_path):
    """Catches: losses of other text, or scores of another benchmark, in the curves of a run."""
    folder = write_log(tmp_path, events_of(whole))
    own = rows(whole, "benchmark", ("step", "acc"))
    score = next(event for event in events_of(whole) if event["event"] == "benchmark")
    added = [
        {"event": "eval", "step": 3, "val_loss": 99.0},
        {**score, "acc": 0.99},
        {**score, "name": "hellaswag", "acc": 0.5, "step": 20},
        {"event": "sample", "step": 20, "prompt": "p", "text": "later", "seed": 0, "top_k": None},
    ]
    lines = [json.dumps(event) + "\n" for event in added]
    (folder / "evaluations.jsonl").write_text("".join(lines))
    run = read_run(folder)
    assert run.rows["eval"] == read_run(whole).rows["eval"]
    assert [(row["step"], row["acc"]) for row in run.rows["benchmark"]] == own
    assert "hellaswag (token, 6 questions), %" in plot_dynamics.summary(run)
    assert list(run.samples)[-1] == ("p", "seed 0")
    assert "“p” goes on with (seed 0):" in plot_dynamics.trajectory([run])


def results_of_lm_eval(folder, **tasks):
    """A result file in the form of lm-eval 0.4: of each task its acc, and acc_norm = acc + 0.1."""
    folder.mkdir(parents=True)
    scores = {name: {"alias": name, "acc,none": acc, "acc_stderr,none": 0.01,
                     "acc_norm,none": acc + 0.1, "acc_norm_stderr,none": 0.02}
              for name, acc in tasks.items()}
    (folder / "results_2026-01-01T00-00-00.json").write_text(json.dumps({
        "results": scores, "n-samples": {name: {"original": 9, "effective": 8} for name in tasks}}))


def test_results_of_lm_eval_are_drawn(whole, tmp_path, capsys):
    """Catches: a benchmark trajectory that is not drawn, or at another step; a broken file that
    stops the drawing."""
    copied = Path(shutil.copytree(whole, tmp_path / "r"))
    for step in (4, 8, 16):
        results_of_lm_eval(copied / f"lm_eval/step_{step}/hf__tiny", piqa=step / 100, sciq=0.5)
    run = read_run(copied)
    assert "piqa (lm-eval, 8 questions)" in run.benchmarks
    page = Page([run], "log")
    steps, values = curve(page, "Benchmarks", "piqa")
    assert list(np.array(steps) / run.batch_tokens) == [4, 8, 16]
    assert np.allclose(values, [0.14, 0.18, 0.26])
    assert panel(Page([read_run(whole)], "log"), "Benchmarks") is None  # control
    two = Page([run, read_run(whole)], "log")  # beside another run they can still be told apart
    labels = [line.get_label() for line in panel(two, "Benchmarks").lines]
    assert [label.split(" ")[1] for label in labels[:3]] == ["cloze", "piqa", "sciq"]
    assert len({line.get_color() for line in panel(two, "Benchmarks").lines}) == len(labels)
    bad = {"no_step/results_a.json": "{}", "step_9/results_a.json": "{", "step_9/results_b.json":
           '{"results": [1]}', "step_9/results_c.json": '{"results": {"a": null}}'}
    for name, text in bad.items():
        (copied / "lm_eval" / name).parent.mkdir(exist_ok=True)
        (copied / "lm_eval" / name).write_text(text)
    (copied / "lm_eval/step_9/results_d.json").mkdir()
    capsys.readouterr()
    assert draw(copied, "--out", tmp_path / "figures") == 0
    assert len(messages(capsys)) == 5
    assert list(read_run(copied).benchmarks) == list(run.benchmarks)


def test_new_event_is_drawn_by_one_line_in_panels(whole, tmp_path, monkeypatch):
    """Catches: a reader that drops keys it does not know, so that a new curve needs more edits."""
    measured = [{"event": "measured", "step": step, "norm.0": 1.5, "norm.1": step / 7}
               for step in (0, 10, 20)]
    run = read_run(write_log(tmp_path, events_of(whole) + measured))
    assert panel(Page([run], "log"), "A new panel") is None  # control: not without the line
    monkeypatch.setattr(plot_dynamics, "PANELS", [
        *plot_dynamics.PANELS,
        ("A new panel", "L2", [("measured", f"norm.{i}", f"layer {i}") for i in range(3)]),
    ])
    page = Page([run], "log")
    x, y = curve(page, "A new panel", "layer 1")
    assert x.tolist() == [0, 1280, 2560]
    assert y.tolist() == [0, 10 / 7, 20 / 7]
    assert len(panel(page, "A new panel").lines) == 2  # layer 2 has no numbers
    assert panel(Page([read_run(whole)], "log"), "A new panel") is None


PLAIN_LOG = """0 val 10.9
0 train 10.95
2 train 8.0
1 train 9.0
1 train 9.5
2 val 7.5
2 hella 0.2504
2 grad 3.0
what is this
3 train

3 train 7.0"""


def test_plain_log_is_read(tmp_path, capsys):
    """Catches: an unsorted or repeated step that is drawn twice, a stream under another name."""
    log = tmp_path / "log.txt"
    log.write_text(PLAIN_LOG)
    run = read_run(log, batch_tokens=1000)
    losses = [(row["step"], row["loss"]) for row in run.rows["train"]]
    assert losses == [(0, 10.95), (1, 9.5), (3, 7.0)]  # 2 is of a branch that was given up
    assert [row["val_loss"] for row in run.rows["eval"]] == [10.9, 7.5]
    assert run.rows["grad"] == [{"event": "grad", "step": 2, "grad": 3.0}]
    broken, again = messages(capsys)[-2:]
    assert "broken lines left out: 2 (line 9, 10)" in broken
    assert "its steps begin again; 1 lines before that" in again
    x, y = curve(Page([run], "linear"), "Accuracy on hellaswag", "acc_norm")
    assert (x.tolist(), y.tolist()) == ([2000], [0.2504])
    x, _ = curve(Page([read_run(log)], "linear"), "Accuracy", "acc_norm")
    assert x.tolist() == [2]  # nothing tells how many tokens a step has
    assert draw(log, "--out", tmp_path / "out", "--batch_tokens", 1000) == 0
    assert (tmp_path / "out/dynamics.png").stat().st_size > 10_000


def losses_of(steps, **more):
    return [{"event": "train", "step": step, "tokens": 128 * step, "loss": 5 - step / 1000, **more}
            for step in steps]


@pytest.mark.row(61)
def test_run_that_came_to_harm_says_so(tmp_path, capsys):
    """Catches: a run of NaN drawn as a healthy one, and the last good number as its state."""
    well = write_log(tmp_path / "well", [*losses_of(range(1, 9)), {"event": "end", "step": 8}])
    first = {"event": "eval", "step": 0, "val_loss": 9.0}
    nan = write_log(tmp_path / "nan", [first, *losses_of(range(1, 6)),
                                       *losses_of(range(6, 9), loss=None)])
    end = {"event": "end", "step": 5, "reason": "diverged"}
    diverged = write_log(tmp_path / "diverged", [first, *losses_of(range(1, 6)), end])
    found = {log.name: read_run(log) for log in (well, nan, diverged)}
    assert [run.trouble for run in found.values()] == ["", "no loss from step 6 on",
                                                       "diverged at step 5"]
    title = " ".join(Page([found["nan"]], "log").figure.get_suptitle().split())
    assert "nan (8 steps, no loss from step 6 on)" in title
    assert draw(nan, diverged, well, "--out", tmp_path / "out") == 0
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "note: no loss from step 6 on" in lines["nan"]
    assert "loss 4.995 (at step 5), val loss 9.000 (at step 0)" in lines["nan"]
    assert "diverged at step 5" in lines["diverged"]
    assert "note" not in lines["well"] and "(at step" not in lines["well"]  # control


@pytest.mark.row(61)
def test_two_runs_in_one_log_are_not_one_curve(tmp_path, capsys):
    """Catches: the end of a first run behind a second that was stopped earlier."""
    events = [*losses_of(range(1, 9)), *losses_of(range(1, 5), loss=1.0)]
    run = read_run(write_log(tmp_path / "twice", events))
    rows = [(row["step"], row["loss"]) for row in run.rows["train"]]
    assert rows == [(1, 1), (2, 1), (3, 1), (4, 1)]
    assert "its steps begin again; 8 lines before that" in messages(capsys)[-1]
    run = read_run(write_log(tmp_path / "from 5", [*events[:8], *losses_of(range(5, 7), loss=1.0)]))
    assert [row["step"] for row in run.rows["train"]] == [1, 2, 3, 4, 5, 6]
    read_run(write_log(tmp_path / "once", events[:8]))
    assert len(messages(capsys)) == 1  # control: the second alone says it again


@pytest.mark.row(62)
def test_many_runs_fit_the_page(tmp_path, capsys):
    """Catches: a title that is wider than the page, legends that cover the curves, one folder
    without a log for which nothing is drawn."""
    logs = [write_log(tmp_path / f"a run with a long name and a number, {n:02d}, {'x' * 60}",
                      losses_of(range(1, 9))) for n in range(30)]
    runs = [read_run(log) for log in logs]
    page = Page(runs, "log")
    renderer = FigureCanvasAgg(page.figure).get_renderer()
    page.figure.draw(renderer)
    width, height = page.figure.bbox.size
    legend, = page.figure.legends
    assert len({text.get_text() for text in legend.get_texts()}) == 30
    for thing in (page.figure._suptitle, legend):
        box = thing.get_window_extent(renderer)
        assert 0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height
    assert len({line.get_color() for line in panel(page, "Loss").lines}) == 30
    few = Page(runs[:3], "log")
    assert few.figure.legends == [] and panel(few, "Loss").get_legend() is not None  # control
    (tmp_path / "empty").mkdir()
    assert draw(logs[0], tmp_path / "empty", logs[1], "--out", tmp_path / "out") == 0
    assert "left out: " in messages(capsys)[-1] and "empty: no log" not in capsys.readouterr().out
    assert draw(tmp_path / "empty", "--out", tmp_path / "out") == 2


@pytest.mark.row(62)
def test_figures_do_not_depend_on_the_users_settings(whole, tmp_path):
    """Catches: text.usetex in a matplotlibrc, which ends in a traceback where there is no LaTeX;
    another look on another machine."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nlines.linewidth: 9\n")
    drawn = []
    for settings in (str(tmp_path), "nowhere"):
        command = [sys.executable, str(ROOT / "plot_dynamics.py"), str(whole), "--out",
                   str(tmp_path / "out")]
        env = {**os.environ, "MPLCONFIGDIR": str(tmp_path), "MATPLOTLIBRC": settings}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        drawn.append((tmp_path / "out/dynamics.png").read_bytes())
    assert drawn[0] == drawn[1]


def test_log_overrules_batch_tokens(whole, tmp_path, capsys):
    """Catches: --batch_tokens, meant for another log on the page, that changes what a run says."""
    log = tmp_path / "log.txt"
    log.write_text(PLAIN_LOG)
    assert draw(log, whole, "--out", tmp_path / "out", "--batch_tokens", 1000) == 0
    printed = capsys.readouterr().out
    assert "steps 3, tokens 3,000" in printed
    assert "whole: steps 20, tokens 2,560" in printed


def test_live_and_broken_logs_are_drawn(whole, tmp_path, capsys):
    """Catches: a drawing that fails on a half-written line, or before the first training step."""
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    broken = ["{}", "[]", '{"event": "train", "step": "x"}']
    half = lines[-3][:25]
    log = tmp_path / "r/metrics.jsonl"
    log.parent.mkdir()
    log.write_text("\n".join([*lines[:20], *broken, *lines[20:-3], half]))
    assert draw(log.parent, "--out", tmp_path / "out") == 0
    assert "broken lines left out: 4 (line 21, 22, 23, " in messages(capsys)[-1]
    log.write_text("\n".join(lines[:2]) + "\n")  # the start and the first evaluation
    assert draw(log.parent, "--out", tmp_path / "out") == 0
    assert messages(capsys) == []


@pytest.mark.parametrize("content, message", [
    ("", "nothing to draw"),
    ("\x00\xff\n", "nothing to draw"),
    ("some text\n", "nothing to draw"),
    ('{"event": "weights", "step": 1, "norm": 2.0}\n', "nothing to draw"),
    ('{"event": "train", "step": 1, "loss": null, "lr": "high"}\n', "no number"),
])
def test_log_without_numbers_is_one_line_and_exit_2(tmp_path, capsys, content, message):
    """Catches: a traceback, or an empty page, where there is nothing to draw."""
    (tmp_path / "metrics.jsonl").write_text(content)
    assert draw(tmp_path, "--out", tmp_path) == 2
    assert message in messages(capsys)[-1]
    assert not (tmp_path / "dynamics.png").exists()


def test_bad_arguments_are_one_line_and_exit_2(whole, tmp_path, capsys):
    """Catches: a traceback where the user mistyped a path or a number."""
    for arguments, message in [([tmp_path / "none"], "no log"),
                               ([tmp_path], "no log"),
                               ([whole, "--out", whole / "metrics.jsonl"], "File exists"),
                               ([whole, "--batch_tokens", 0], "out of range")]:
        assert draw(*arguments) == 2
        last_line = messages(capsys)[-1]
        assert last_line.startswith("plot_dynamics.py: ")
        assert message in last_line


ODD = [
    '"loss": 1e999', '"loss": 1' + "0" * 400, '"tokens": "x", "loss": true', '"seconds": null',
    '"tokens": -20', '"n_choices": [4]', '"n": "x"', '"position_loss": 3.0', '"position_loss": []',
    '"position_loss": [null, "x"]', '"step": -1', '"step": true', '"step": 1' + "0" * 400,
    '"prompt": "\\ud800", "text": ["$x^{"]', '"name": "$x^{"', '"question": 3, "heldout_loss": "x"',
    '"questions": [3, {}]', '"questions": null', '"questions": 3', '"env": {"a": [1]}',
]


def test_odd_values_do_not_stop_the_drawing(whole, tmp_path):
    """Catches: a value of another type, a huge one, or a $ or _ in a name, that ends in a
    traceback."""
    folder = tmp_path / "_a$x^{$b"  # in a figure: hidden, and a formula
    folder.mkdir()
    log = (whole / "metrics.jsonl").read_text()
    for step, odd in enumerate(ODD, 20):  # each at its own step: the last row of a step counts
        for event in ("start", "train", "eval", "benchmark", "sample", "end", "resume", "sft_eval",
                      "instructions"):
            log += f'{{"event": "{event}", "step": {step}, {odd}}}\n'
    (folder / "metrics.jsonl").write_text(log + '{"a": ' + "[" * 100_000 + "\n")
    assert draw(folder, "--out", tmp_path / "out") == 0
    assert draw(folder, whole, "--out", tmp_path / "out") == 0
    legend = panel(Page([read_run(folder), read_run(whole)], "log"), "Learning rate").get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [r"a\$x^{\$b", "whole"]


def test_smoothing_keeps_a_straight_line():
    """Catches: a smoothed curve that lags behind, or ends above or below the values it shows."""
    x = np.arange(1.0, 400.0)
    smooth_x, smooth_y = plot_dynamics.smooth(x, 3 * x)
    assert np.allclose(smooth_y, 3 * smooth_x)
    assert np.array_equal(smooth_x[:5], x[:5])  # the first steps stay single
    assert len(smooth_x) < 90
    smooth_x, smooth_y = plot_dynamics.smooth(x, x**2)
    assert not np.allclose(smooth_y, smooth_x**2)  # control: it does smooth


def resumed(run):
    """Events of a finished run, as if it had been resumed three times; and its first env."""
    events = events_of(run)
    env = events[0]["env"]
    changes = {5: {}, 10: {"restored_optimizer": False}, 12: {"env": {**env, "threads": 64}}}
    with_resumes = []
    for event in events:
        with_resumes.append(event)
        if event["event"] == "train" and event["step"] in changes:
            resume = {"event": "resume", "env": env, "restored_optimizer": True}
            with_resumes.append({**resume, "step": event["step"], **changes[event["step"]]})
    return with_resumes, env


def test_resumes_and_changes_are_marked(whole, tmp_path):
    """Catches: a jump in a curve whose cause, a resume or another machine, is not on the page."""
    events, env = resumed(whole)
    run = read_run(write_log(tmp_path, events))
    assert run.marks == [(5, "resume", "resume"),
                         (10, "optimizer", "without optimizer state"),
                         (12, "hardware", f"threads {env['threads']} → 64")]
    page = Page([run], "log")
    for axes in page.figure.axes[:-1]:  # all but the one by position
        vertical = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
        assert vertical == [5 * 128, 10 * 128, 12 * 128]
    texts = [text.get_text() for text in panel(page, "Throughput").texts]
    texts = [" ".join(text.split()) for text in texts]  # they are wrapped
    assert len(texts) == 2
    assert re.fullmatch(r"without optimizer state: [\d,]+ → [\d,]+ tokens/s", texts[0])
    assert re.fullmatch(r"threads \d+ → 64: [\d,]+ → [\d,]+ tokens/s", texts[1])
    assert read_run(whole).marks == []  # control


def test_seconds_are_those_of_an_undisturbed_run(whole, tmp_path):
    """Catches: a duration with the pause before a resume in it, or without what came before."""
    events = [event for event in events_of(whole) if event["event"] != "end"]
    events[0]["time"] = 1000.0
    unfinished = read_run(write_log(tmp_path / "a", events))
    assert "seconds" not in plot_dynamics.summary(unfinished)
    end = {"event": "end", "step": 20, "reason": "done"}
    new = read_run(write_log(tmp_path / "b", [*events, {**end, "seconds": 12.0}]))
    assert plot_dynamics.summary(new)["seconds"] == "12"
    old = read_run(write_log(tmp_path / "c", [*events, {**end, "time": 1034.0}]))
    assert plot_dynamics.summary(old)["seconds"] == "34"
    events.append({"event": "resume", "step": 20})
    again = read_run(write_log(tmp_path / "d", [*events, {**end, "seconds": 1.0}]))
    assert "seconds" not in plot_dynamics.summary(again)


def test_several_runs_stay_apart(whole, tmp_path, capsys):
    """Catches: two runs with the same name, of which one replaces the other or cannot be told."""
    for name in ("a", "b", "c/a"):
        write_log(tmp_path / name, events_of(whole))
    shutil.copy(whole / "metrics.jsonl", tmp_path / "c/other.jsonl")
    logs = [tmp_path / "a", tmp_path / "b", tmp_path / "c/other.jsonl", whole, tmp_path / "c/a"]
    assert draw(*logs, logs[0], "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    for name in (tmp_path / "a", "b", "other", "whole", tmp_path / "c/a"):
        assert printed.count(f"{name}: steps 20") == 1
    page = Page([read_run(tmp_path / name) for name in ("a", "b")], "log")
    legend = panel(page, "Loss (pale: training)").get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["a: val_loss", "b: val_loss"]
    accuracies = [line for line in panel(page, "Accuracy").lines if line.get_marker() == "o"]
    assert len(accuracies) == 2  # one for each run; a single run shows three


@pytest.mark.slow
def test_long_logs_are_drawn_in_seconds(tmp_path):
    """Catches: a drawing that takes minutes at the end of a run of 50,000 steps."""
    noise = np.random.RandomState(0).rand(50_000)
    lines = []
    for i in range(50_000):
        event = {"event": "train", "step": i + 1, "tokens": 1000 * (i + 1), "loss": 3 + noise[i],
                 "lr": 1e-3, "grad_norm": noise[i], "dt_ms": 10.0, "tok_per_s": 1e5 * noise[i]}
        lines.append(json.dumps(event) + "\n")
    (tmp_path / "long.jsonl").write_text("".join(lines))
    shorter = [tmp_path / f"{name}.jsonl" for name in "0123456789"]
    for path in shorter:
        path.write_text("".join(lines[:5000]))
    for logs in [tmp_path / "long.jsonl"], shorter:
        start = time.perf_counter()
        assert draw(*logs, "--out", tmp_path) == 0
        assert time.perf_counter() - start < 20  # a few seconds, with room for a busy machine


def test_drawing_needs_no_torch(whole, tmp_path):
    """Catches: an import that makes logs unreadable on a computer without PyTorch."""
    (tmp_path / "support").mkdir()
    for name in ("plot_dynamics.py", "support/runs.py", "support/flags.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    code = ("import sys; sys.modules['torch'] = None; "  # an import of it now fails
            "import plot_dynamics; plot_dynamics.main(sys.argv[1:]); "
            "import torch")
    command = [sys.executable, "-c", code, str(whole), "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "drawn: " in result.stdout
    assert "import of torch halted" in result.stderr  # control: this one did fail
