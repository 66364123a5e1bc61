"""What is drawn is what the logs say: numbers of the page and of the table against the lines of the log."""
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import plot_dynamics
from conftest import messages, rows

ROOT = Path(__file__).parent.parent
DRAW = plot_dynamics.main  # conftest replaces the one that train.py calls


def draw(*arguments):
    try:
        return DRAW([str(a) for a in arguments])
    except SystemExit as error:
        return error.code


def lines_of(page, title, label):
    """(x, y) of the line with that label in the panel whose title starts so."""
    axes = next(axes for axes in page.figure.axes if axes.get_title().startswith(title))
    return next(line.get_data() for line in axes.lines if line.get_label().startswith(label))


def test_the_run_drew_itself(whole):
    assert (whole / "dynamics.png").read_bytes()[:4] == b"\x89PNG" and "| 20 |" in (whole / "trajectory.md").read_text()


def test_a_curve_or_a_row_is_not_the_logs(whole, tmp_path):
    assert draw(whole, "--out", tmp_path) == 0
    page = plot_dynamics.Page([plot_dynamics.read_run(whole)], "log")
    assert [axes.get_title().split(":")[0].split(",")[0].split(" ")[0] for axes in page.figure.axes] == [
        "Loss", "Bits", "Accuracy", "Context", "Loss", "Samples", "Learning", "Gradient", "Throughput"]
    for title, label, event, key in (("Loss", "validation", "eval", "val_loss"), ("Accuracy", "acc_pmi", "benchmark", "acc_pmi")):
        x, y = lines_of(page, title, label)
        wanted = np.array(rows(whole, event, ("step", key)))
        assert np.array_equal(x, wanted[:, 0] * 128) and np.array_equal(y, wanted[:, 1])
    other = lines_of(page, "Accuracy", "acc_norm")[1]
    assert not np.array_equal(other, rows(whole, "benchmark", ("acc",)))  # control
    table = (tmp_path / "trajectory.md").read_text()
    text, loss = rows(whole, "sample", ("text",))[-1][0], rows(whole, "eval", ("val_loss",))[-1][0]
    assert f"| 20 | 2,560 | {loss:.4f} |" in table and plot_dynamics.escape(text) in table


def test_a_foreign_log_is_read_as_it_is_not(whole, tmp_path, capsys):
    log = tmp_path / "log.txt"
    log.write_text("0 val 10.9\n0 train 10.95\n1 train 9.0\n2 train 8.0\n1 train 9.5\n2 val 7.5\n2 hella 0.2504\n2 grad 3.0\n"
                   "what is this\n3 train\n\n3 train 7.0")
    run = plot_dynamics.read_run(log, batch_tokens=1000)
    assert [(row["step"], row["loss"]) for row in run.train] == [(0, 10.95), (1, 9.5), (2, 8.0), (3, 7.0)]  # of two lines the last
    assert [row["val_loss"] for row in run.eval] == [10.9, 7.5] and next(iter(run.benchmarks.values()))[0]["acc_norm"] == 0.2504
    assert "2 broken lines left out (line 9, 10)" in messages(capsys)[-1]
    assert draw(log, "--out", tmp_path / "out", "--batch_tokens", 1000) == 0 and (tmp_path / "out/dynamics.png").stat().st_size > 10_000
    x, y = lines_of(plot_dynamics.Page([run], "linear"), "Accuracy", "acc_norm")
    assert x.tolist() == [2000] and y.tolist() == [0.2504]
    x, _ = lines_of(plot_dynamics.Page([plot_dynamics.read_run(log)], "linear"), "Accuracy", "acc_norm")
    assert x.tolist() == [2]  # nobody said how many tokens a step has
    assert draw(log, whole, "--out", tmp_path / "out", "--batch_tokens", 1000) == 0  # one without speeds, first
    assert "whole: steps 20, tokens 2,560" in capsys.readouterr().out  # a log that says how many is believed


def test_a_live_or_broken_log_stops_the_drawing(whole, tmp_path, capsys):
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "r").mkdir()
    (tmp_path / "r/metrics.jsonl").write_text("\n".join(lines[:20] + ["{}", "[]", '{"event": "train", "step": "x"}'] + lines[20:-3]) + "\n" + lines[-3][:25])
    assert draw(tmp_path / "r", "--out", tmp_path / "out") == 0
    assert "4 broken lines left out (line 21, 22, 23, " in messages(capsys)[-1]
    (tmp_path / "r/metrics.jsonl").write_text(lines[0] + "\n" + '{"event": "train", "step": 1, "loss": null, "lr": "high"}\n')
    assert draw(tmp_path / "r", "--out", tmp_path / "out") == 2 and "no number" in messages(capsys)[-1]
    (tmp_path / "r/metrics.jsonl").write_text("".join(line + "\n" for line in lines[:2]))
    assert draw(tmp_path / "r", "--out", tmp_path / "out") == 0  # the first evaluation is all there is yet
    for content, message in (("", "nothing to draw"), ("\x00\xff\n", "nothing to draw")):
        (tmp_path / "r/metrics.jsonl").write_text(content)
        assert draw(tmp_path / "r") == 2 and message in messages(capsys)[-1]
    for arguments, message in (([tmp_path / "none"], "no such file"), ([tmp_path], "no metrics.jsonl"),
                               ([whole, "--out", whole / "metrics.jsonl"], "check the path"), ([whole, "--batch_tokens", 0], "out of range")):
        assert draw(*arguments) == 2 and message in messages(capsys)[-1]


ODD = ['"loss": 1e999', '"loss": 1' + "0" * 400, '"tokens": "x", "loss": true', '"seconds": null', '"n_choices": [4]', '"position_loss": 3.0', '"step": -1',
       '"step": true', '"step": 1' + "0" * 400, '"prompt": "\\ud800", "text": ["$x^{"]', '"name": "$x^{"', '"question": 3, "heldout_loss": "x"', '"questions": [3, {}]', '"questions": null']


def test_an_odd_event_stops_the_drawing(whole, tmp_path):
    folder = tmp_path / "_a$x^{$b"  # as a name in a figure: hidden, and a formula
    folder.mkdir()
    odd_ones = [f'{{"event": "{event}", "step": 20, {odd}}}' for odd in ODD
                for event in ("train", "eval", "benchmark", "sample", "end", "resume", "sft_eval", "instructions")]
    (folder / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text() + "\n".join(odd_ones) + "\n" + "[" * 100_000 + "\n")
    assert draw(folder, "--out", tmp_path / "out") == 0 and draw(folder, whole, "--out", tmp_path / "out") == 0


def test_smoothing_moves_a_straight_line():
    line = np.arange(1.0, 400.0)
    assert np.allclose(plot_dynamics.smooth(line), line)
    assert not np.allclose(plot_dynamics.smooth(line**2), line**2)  # control: it does smooth


def test_a_resume_or_another_machine_leaves_no_mark(whole, tmp_path, capsys):
    events = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    start = events[0]
    for at, fields in ((25, {}), (30, {"restored_optimizer": False}), (32, {"env": {**start["env"], "threads": 64}, "restored_optimizer": True})):
        step = next(e["step"] for e in reversed(events[:at]) if e["event"] == "train")
        events.insert(at, {**start, "event": "resume", "step": step, "restored_optimizer": True, **fields})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    run = plot_dynamics.read_run(tmp_path)
    threads = start["env"]["threads"]
    assert [mark[1:] for mark in run.marks] == [("resume", "resume"), ("optimizer", "without optimizer state"), ("hardware", f"threads {threads} → 64")]
    vertical = lambda run: [line.get_xdata()[0] for line in plot_dynamics.Page([run], "log").figure.axes[0].lines if len(set(line.get_xdata())) == 1]
    assert vertical(run) == [128 * step for step, _, _ in run.marks]
    assert vertical(plot_dynamics.read_run(whole)) == []  # control
    assert re.search(r"64: [\d,]+ → [\d,]+ tokens/s", plot_dynamics.speed_change(run, *run.marks[2][::2]))


def test_several_runs_take_each_others_place(whole, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(whole / "metrics.jsonl", tmp_path / name)
    (tmp_path / "c").mkdir()
    shutil.copytree(tmp_path / "a", tmp_path / "c/a")
    shutil.copy(whole / "metrics.jsonl", tmp_path / "c/other.jsonl")
    assert draw(tmp_path / "a", tmp_path / "b", tmp_path / "c/other.jsonl", whole, tmp_path / "c/a", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: steps 20" in printed for name in ("b", "other", "whole", tmp_path / "a", tmp_path / "c/a"))
    page = plot_dynamics.Page([plot_dynamics.read_run(tmp_path / name) for name in ("a", "b")], "log")
    assert [text.get_text() for text in page.figure.axes[0].get_legend().get_texts()] == ["a", "b"]


@pytest.mark.slow
def test_long_logs_take_minutes(tmp_path):
    noise = np.random.RandomState(0).rand(50_000)
    (tmp_path / "long.jsonl").write_text("".join(
        json.dumps({"event": "train", "step": i + 1, "tokens": 1000 * (i + 1), "loss": 3 + noise[i], "lr": 1e-3, "grad_norm": noise[i],
                    "dt_ms": 10.0, "tok_per_s": 1e5 * noise[i]}) + "\n" for i in range(50_000)))
    for name in "0123456789":
        (tmp_path / f"{name}.jsonl").write_text("".join((tmp_path / "long.jsonl").read_text().splitlines(True)[:5000]))
    for logs in (["long.jsonl"], [f"{name}.jsonl" for name in "0123456789"]):
        start = time.perf_counter()
        assert draw(*(tmp_path / log for log in logs), "--out", tmp_path) == 0
        assert time.perf_counter() - start < 20  # a few seconds, with room for a busy machine


def test_it_needs_torch_or_a_file_of_ours(whole, tmp_path):
    shutil.copy(ROOT / "plot_dynamics.py", tmp_path)
    code = ("import sys, plot_dynamics as p; p.main(sys.argv[1:]); "
            f"assert 'torch' not in sys.modules and not [m for m in sys.modules.values() if str(getattr(m, '__file__', '')).startswith({str(ROOT) + '/'!r})]")
    subprocess.run([sys.executable, "-c", code, str(whole), "--out", str(tmp_path)], check=True, cwd=tmp_path, capture_output=True)
