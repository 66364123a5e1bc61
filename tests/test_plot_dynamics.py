"""plot_dynamics.py shows what the logs say: figure and tables against the lines of a log."""
import json
import shutil
import subprocess
import sys
import time

import matplotlib
import numpy as np
import pytest

import plot_dynamics
from conftest import ROOT, exit_code, messages, rows, write_lines
from plot_dynamics import Page, read_run

DRAW = plot_dynamics.main  # conftest replaces plot_dynamics.main, which train.py calls


def draw(*arguments):
    """The exit code of plot_dynamics.py."""
    return exit_code(DRAW, arguments)


def write_log(folder, events):
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "metrics.jsonl", events)
    return folder


def losses_of(steps, **more):
    return [{"event": "train", "step": step, "tokens": 128 * step, "loss": 5 - step / 1000, **more}
            for step in steps]


def page_of(*folders):
    return Page([read_run(folder) for folder in folders], "log")


def panel(page, title):
    """The axes of the first panel whose title starts with `title`, or None."""
    found = [axes for axes in page.figure.axes if axes.get_title().startswith(title)]
    return found[0] if found else None


def curve(page, title, label):
    """[x, y] as lists, of the curve in that panel whose label starts with `label`."""
    line, = [line for line in panel(page, title).lines if line.get_label().startswith(label)]
    return [values.tolist() for values in line.get_data()]


def names_on(page):
    """The names in the legend below the page, one for each run."""
    return [text.get_text() for text in page.figure.legends[0].get_texts()]


def test_training_draws_its_run(whole):
    """Catches: a finished run folder without figure, or with one of an earlier moment; a sample
    beside the loss of another step, or one that Markdown swallows."""
    for name in ("dynamics.png", "story.png"):
        assert (whole / name).read_bytes()[:4] == b"\x89PNG"
    table = (whole / "trajectory.md").read_text()
    last_loss = rows(whole, "eval", ("val_loss",))[-1][0]
    last_text = rows(whole, "sample", ("text",))[-1][0]
    assert f"| 20 | 2,560 | {last_loss:.4f} |" in table
    assert plot_dynamics.escape(last_text) in table
    assert plot_dynamics.escape("<b> a|b\n*c*") == r"\<b\> a\|b \*c\*"


def test_story_has_the_samples_at_their_losses(whole):
    """Catches: a text beside the loss of another step; a story of several runs, or without text."""
    run = read_run(whole)
    losses = dict(rows(whole, "eval", ("step", "val_loss")))
    texts = dict(rows(whole, "sample", ("step", "text")))
    notes = plot_dynamics.story([run]).axes[0].texts
    assert [note.xy for note in notes] == [(step, losses[step]) for step in (0, 4, 8, 20)]
    words = notes[-1].get_text().split()
    assert words[:3] == ["step", "20:", "The"]
    assert words[3] in plot_dynamics.plain(texts[20])
    assert plot_dynamics.story([run, run]) is None
    run.rows["sample"] = []
    assert plot_dynamics.story([run]) is None


def test_curves_are_those_of_the_log(whole):
    """Catches: a panel that is lost; a curve of another key, at other steps, or over steps instead
    of tokens."""
    page = page_of(whole)
    titles = [axes.get_title().split()[0].strip(":,") for axes in page.figure.axes
              if axes.get_title()]
    assert titles == ["Loss", "Bits", "Accuracy", "Context", "Samples", "Learning", "Gradient",
                      "Throughput", "Loss"]
    x, y = curve(page, "Loss", "validation")
    logged = rows(whole, "eval", ("step", "val_loss", "val_bpb"))
    assert x == [128 * step for step, _, _ in logged]
    assert y == [loss for _, loss, _ in logged]
    assert y != [bits for _, _, bits in logged]  # control


def test_steps_stand_above_tokens(whole):
    """Catches: a second axis that is another scale than the first, or other numbers."""
    loss, steps = [axes for axes in page_of(whole).figure.axes
                   if axes.get_title() == "Loss" or axes.get_xlabel() == "steps"]
    for step in (0, 1, 7, 20):
        above = steps.transData.transform((step, 0))[0]
        assert above == pytest.approx(loss.transData.transform((128 * step, 0))[0])
    assert above != pytest.approx(loss.transData.transform((64 * step, 0))[0])  # control


def test_tuning_is_drawn_over_steps(tmp_path):
    """Catches: tokens on the x axis of a tuning, whose steps differ in their number of tokens."""
    training = write_log(tmp_path / "training", losses_of([1, 2]))
    answers = {"event": "sft_eval", "step": 2, "token_acc": 0.1}
    tuning = write_log(tmp_path / "tuning", [*losses_of([1, 2]), answers])
    assert curve(page_of(tuning), "Held-out answers: tokens right", "") == [[2], [0.1]]
    assert panel(page_of(tuning, training), "Loss").get_xlabel() == "steps"
    assert panel(page_of(training), "Loss").get_xlabel() == "tokens"  # control


def test_later_evaluations_are_added(whole, tmp_path):
    """Catches: losses of other text, or scores of another benchmark, in the curves of a run."""
    folder = shutil.copytree(whole, tmp_path / "r")
    own = read_run(folder).rows
    score = own["benchmark"][-1]
    write_lines(folder / "evaluations.jsonl", [
        {"event": "eval", "step": 20, "val_loss": 99.0},
        {**score, "acc": 0.99},
        {**score, "name": "hellaswag"},
        {"event": "sample", "step": 20, "prompt": "p", "text": "later", "seed": 0},
    ])
    run = read_run(folder)
    assert run.rows["eval"] == own["eval"]
    assert run.rows["benchmark"] == own["benchmark"]
    assert "hellaswag (token, 6 questions), %" in plot_dynamics.summary(run)
    assert "“p” goes on with (seed 0):" in plot_dynamics.trajectory([run])


def test_losses_of_other_text_are_not_in_a_curve(tmp_path, capsys):
    """Catches: losses of two texts, or of two lengths of windows, in one curve of an imported
    run."""
    rows = [{"event": "eval", "step": step, "val_loss": loss, "data": data, "seq_len": length}
            for step, loss, data, length in [
                (0, 5.0, "a", 64), (8, 9.0, "b", 64), (8, 4.0, "a", 64), (16, 8.0, "a", 32),
                (16, 3.0, "a", 64)]]
    write_lines(tmp_path / "evaluations.jsonl", rows)
    assert curve(page_of(tmp_path), "Loss", "validation")[1] == [5.0, 4.0, 3.0]
    assert "2 losses of other text or windows" in capsys.readouterr().out
    write_lines(tmp_path / "evaluations.jsonl", rows[::2])
    page_of(tmp_path)
    assert "losses of other" not in capsys.readouterr().out  # control


def test_results_of_lm_eval_are_drawn(tmp_path, capsys):
    """Catches: a benchmark trajectory that is not drawn, or at another step; a broken file that
    stops the drawing."""
    tiny = write_log(tmp_path, losses_of([1, 16]))
    assert panel(page_of(tiny), "Accuracy on piqa") is None  # control
    broken = {"results": {"piqa": None}}
    for step in (4, 9, 16):
        good = {"results": {"piqa": {"acc,none": 0.1, "acc_norm,none": step / 100},
                            "sciq": {"acc,none": 0.5}},
                "n-samples": {"piqa": {"original": 9, "effective": 8}}}
        folder = tiny / f"lm_eval/step_{step}/hf__tiny"
        folder.mkdir(parents=True)
        results = folder / "results_2026-01-01T00-00-00.json"
        results.write_text(json.dumps(broken if step == 9 else good))
    run = read_run(tiny)
    assert "left out: not a result file of lm-eval" in messages(capsys)[-1]
    assert list(run.benchmarks) == ["piqa (lm-eval, 8 questions)", "sciq (lm-eval)"]
    found = curve(page_of(tiny), "Accuracy on piqa", "acc_norm")
    assert found == [[4 * 128, 16 * 128], [0.04, 0.16]]


def test_new_event_is_drawn_by_one_line_in_panels(tmp_path, monkeypatch):
    """Catches: a reader that drops keys it does not know, so that a new curve needs more edits;
    a panel of more curves than there are colours."""
    measured = {"event": "measured", "step": 10, "norm": 1.5}
    folder = write_log(tmp_path, [*losses_of([1, 10]), measured])
    assert panel(page_of(folder), "A new panel") is None  # control: not without the line
    new = ("A new panel", "L2", [("measured", "norm", "here"), *7 * [("measured", "norm", "")]])
    monkeypatch.setattr(plot_dynamics, "PANELS", [*plot_dynamics.PANELS, new])
    assert curve(page_of(folder), "A new panel", "here") == [[1280], [1.5]]


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
    """Catches: an unsorted or repeated step that is drawn twice, a stream under another name;
    --batch_tokens, meant for this log, that changes what another one says."""
    log = tmp_path / "log.txt"
    log.write_text(PLAIN_LOG)
    run = read_run(log)
    losses = [(row["step"], row["loss"]) for row in run.rows["train"]]
    assert losses == [(0, 10.95), (1, 9.5), (3, 7.0)]  # 2 is of a branch that was given up
    assert [row["val_loss"] for row in run.rows["eval"]] == [10.9, 7.5]
    assert run.rows["grad"] == [{"event": "grad", "step": 2, "grad": 3.0}]
    assert curve(Page([run], "linear"), "Accuracy on hellaswag", "acc_norm") == [[2], [0.2504]]
    broken, again = messages(capsys)
    assert "broken lines left out: 2 (line 9, 10)" in broken
    assert "its steps begin again; 1 lines before that" in again
    other = write_log(tmp_path / "other", losses_of([1, 20]))
    assert draw(log, other, "--out", tmp_path / "out", "--batch_tokens", 1000) == 0
    printed = capsys.readouterr().out
    assert "steps 3, tokens 3,000" in printed
    assert "other: steps 20, tokens 2,560" in printed


@pytest.mark.row(61)
def test_run_that_came_to_harm_says_so(tmp_path, capsys):
    """Catches: a run of NaN drawn as a healthy one, and the last good number as its state."""
    begin = losses_of(range(1, 6))
    end = {"event": "end", "step": 5, "reason": "diverged"}
    logs = [write_log(tmp_path / "well", begin),
            write_log(tmp_path / "nan", [*begin, *losses_of([6, 7, 8], loss=None)]),
            write_log(tmp_path / "diverged", [*begin, end])]
    assert names_on(page_of(*logs))[1] == "nan (8 steps, no loss from step 6 on)"
    assert draw(*logs, "--out", tmp_path / "out") == 0
    well, nan, diverged, _ = capsys.readouterr().out.splitlines()
    assert "note: no loss from step 6 on" in nan
    assert "loss 4.995 (at step 5)" in nan
    assert "diverged after step 5" in diverged
    assert "note" not in well and "(at step" not in well  # control


@pytest.mark.row(61)
def test_two_runs_in_one_log_are_not_one_curve(tmp_path, capsys):
    """Catches: the end of a first run behind a second that was stopped earlier."""
    first = losses_of(range(1, 9))
    for start, kept in ((1, 4), (3, 4), (9, 10)):
        second = losses_of(range(start, kept + 1), loss=1.0)
        run = read_run(write_log(tmp_path, [*first, *second]))
        assert run.rows["train"] == [*first[:start - 1], *second]
    assert len(messages(capsys)) == 2  # control: the third is one run


@pytest.mark.row(62)
def test_many_runs_fit_the_page(tmp_path, capsys):
    """Catches: a title that is wider than the page, legends that cover the curves, one folder
    without a log for which nothing is drawn."""
    logs = [write_log(tmp_path / f"a run with a long name and a number, {n:02d}, {'x' * 60}",
                      losses_of([1, 2])) for n in range(30)]
    page = page_of(*logs)
    page.figure.draw_without_rendering()
    width, height = page.figure.bbox.size
    legend, = page.figure.legends
    assert len({text.get_text() for text in legend.get_texts()}) == 30
    for thing in (page.figure._suptitle, legend):
        box = thing.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    assert not page_of(logs[0]).figure.legends  # control
    (tmp_path / "empty").mkdir()
    assert draw(logs[0], tmp_path / "empty", logs[1], "--out", tmp_path / "out") == 0
    assert "left out: " in messages(capsys)[-1]


@pytest.mark.row(62)
def test_figures_do_not_depend_on_the_users_settings(tmp_path):
    """Catches: text.usetex in a matplotlibrc, which ends in a traceback where there is no LaTeX;
    another look on another machine."""
    log = write_log(tmp_path, losses_of([1, 2]))
    drawn = []
    for settings in ({"text.usetex": True, "lines.linewidth": 9}, {}):
        with matplotlib.rc_context(settings):
            assert draw(log, "--out", tmp_path) == 0
        drawn.append((tmp_path / "dynamics.png").read_bytes())
    assert drawn[0] == drawn[1]


def test_live_and_broken_logs_are_drawn(whole, tmp_path, capsys):
    """Catches: a drawing that fails on a half-written line, or before the first training step."""
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    log = "\n".join([*lines[:2], "{}", "[" * 100_000, lines[-3][:25]])
    (tmp_path / "metrics.jsonl").write_text(log)
    assert draw(tmp_path, "--out", tmp_path) == 0  # the start and the first evaluation
    assert "broken lines left out: 3 (line 3, 4, 5)" in messages(capsys)[-1]


def test_what_cannot_be_drawn_is_refused(tmp_path, capsys):
    """Catches: a traceback, or an empty page, where the log has no number or the user mistyped a
    path or a number."""
    log = tmp_path / "r.jsonl"
    nan = '{"event": "train", "step": 1, "loss": null, "lr": "high"}\n'
    for text, arguments, message in [("\x00 some text\n", [log], "nothing to draw"),
                                     (nan, [log], "no number"),
                                     (PLAIN_LOG, [tmp_path], "no log"),
                                     (PLAIN_LOG, [log, "--batch_tokens", 0], "out of range")]:
        log.write_text(text)
        assert draw("--out", tmp_path / "out", *arguments) == 2
        last_line = messages(capsys)[-1]
        assert last_line.startswith("plot_dynamics.py: ")
        assert message in last_line
    assert not (tmp_path / "out").exists()


ODD = ['"loss": 1e999', '"tokens": "x", "loss": true', '"seconds": null', '"tokens": -20',
       '"n_choices": [4]', '"position_loss": [null, "x"]', '"step": 1' + "0" * 400,
       '"prompt": "\\ud800", "text": ["$x^{"]', '"name": "$x^{"', '"questions": [3, {}]',
       '"env": {"a": [1]}']


def test_odd_values_do_not_stop_the_drawing(tmp_path):
    """Catches: a value of another type, a huge one, or a $ or _ in a name, that ends in a
    traceback."""
    folder = write_log(tmp_path / "_a$x^{$b", losses_of([1, 2]))  # hidden, and a formula
    with open(folder / "metrics.jsonl", "a") as log:
        for step, odd in enumerate(ODD, 3):  # each at its own step: the last row of a step counts
            for event in ("train", "eval", "benchmark", "sample", "resume", "sft_eval",
                          "instructions"):
                log.write(f'{{"event": "{event}", "step": {step}, {odd}}}\n')
    other = write_log(tmp_path / "other", losses_of([1, 2]))
    assert draw(folder, other, "--out", tmp_path / "out") == 0
    assert names_on(page_of(folder, other))[0].startswith(r"a\$x^{\$b (")


def test_smoothing_keeps_a_straight_line():
    """Catches: a smoothed curve that lags behind, or ends above or below the values it shows."""
    x = np.arange(1.0, 400.0)
    smooth_x, smooth_y = plot_dynamics.smooth(x, 3 * x)
    assert np.allclose(smooth_y, 3 * smooth_x)
    assert np.array_equal(smooth_x[:5], x[:5])  # the first steps stay single
    assert len(smooth_x) < 90  # control: it does smooth


def test_resumes_and_changes_are_marked(tmp_path):
    """Catches: a jump in a curve whose cause, a resume or another machine, is not on the page."""
    resume = {"event": "resume", "step": 5, "env": {"threads": 1}}
    folder = write_log(tmp_path, [
        {**resume, "event": "start", "step": 0},
        *losses_of([5], tok_per_s=500),
        resume,
        {**resume, "restored_optimizer": False},
        {**resume, "env": {"threads": 64}},
        *losses_of([6], tok_per_s=1000)])
    assert read_run(folder).marks == [(5, "resume", "resume"),
                                      (5, "optimizer", "without optimizer state"),
                                      (5, "hardware", "threads 1 → 64")]
    speed = panel(page_of(folder), "Throughput")
    assert [line.get_xdata()[0] for line in speed.lines[-3:]] == [5 * 128] * 3
    texts = [" ".join(text.get_text().split()) for text in speed.texts]
    assert texts == ["without optimizer state: 500 → 1,000 tokens/s",
                     "threads 1 → 64: 500 → 1,000 tokens/s"]


def test_seconds_are_those_of_an_undisturbed_run(tmp_path):
    """Catches: a duration with the pause before a resume in it, or of a run that goes on."""
    resume = {"event": "resume", "step": 1}
    end = {"event": "end", "step": 1, "reason": "done", "seconds": 12.0}
    for name, more, seconds in (("live", [], None), ("done", [end], "12"),
                                ("resumed", [resume, end], None)):
        run = read_run(write_log(tmp_path / name, [*losses_of([1]), *more]))
        assert plot_dynamics.summary(run).get("seconds") == seconds


def test_several_runs_stay_apart(tmp_path, capsys):
    """Catches: two runs with the same name, of which one replaces the other or cannot be told."""
    logs = [write_log(tmp_path / name, losses_of([1, 2])) for name in ("a", "b", "c/a")]
    assert draw(*logs, logs[0], "--out", tmp_path / "out") == 0
    names = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [str(logs[0]), "b", str(logs[2]), "drawn"]
    assert names_on(page_of(*logs[:2])) == ["a (2 steps)", "b (2 steps)"]


@pytest.mark.slow
def test_long_logs_are_drawn_in_seconds(tmp_path):
    """Catches: a drawing that takes minutes at the end of a run of 50,000 steps."""
    noise = np.random.RandomState(0).rand(50_000)
    events = [{"event": "train", "step": i + 1, "tokens": 1000 * (i + 1), "loss": 3 + noise[i],
               "lr": 1e-3, "grad_norm": noise[i], "tok_per_s": 1e5 * noise[i]}
              for i in range(50_000)]
    log = write_log(tmp_path, events)
    start = time.perf_counter()
    assert draw(log, "--out", tmp_path) == 0
    assert time.perf_counter() - start < 20  # a few seconds, with room for a busy machine


def test_drawing_needs_no_torch(tmp_path):
    """Catches: an import that makes logs unreadable on a computer without PyTorch."""
    (tmp_path / "support").mkdir()
    for name in ("plot_dynamics.py", "support/runs.py", "support/flags.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    log = write_log(tmp_path / "r", losses_of([1, 2]))
    code = ("import sys; sys.modules['torch'] = None; "  # an import of it now fails
            "import plot_dynamics; plot_dynamics.main(sys.argv[1:]); "
            "import torch")
    command = [sys.executable, "-c", code, str(log), "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "drawn: " in result.stdout
    assert "import of torch halted" in result.stderr  # control: this one did fail
