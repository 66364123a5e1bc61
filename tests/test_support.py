"""support/runs.py and support/flags.py: how a script ends, the run folder, its log, the flags."""
import json
import os
import shlex
import subprocess
import sys
import time

import pytest

from conftest import ROOT, exit_code
from support import progress, runs
from support.flags import Parser, count, count_or_0, number, positive, seed, text
from support.runs import Log, UserError, hold, is_finished, newest_run, settings_of


def child(code):
    """Run Python code in a process with buffered output, as from a shell."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                            env={**os.environ, "PYTHONUNBUFFERED": ""}, **pipes)


# ---- how a script ends

CUDA = type("OutOfMemoryError", (RuntimeError,), {})  # as torch.cuda's, which needs a GPU
COMPILER = type("BackendCompilerFailed", (RuntimeError,), {})  # as torch.compile's


@pytest.mark.parametrize("error, code, message", [
    (UserError("no data — prepare it"), 2, "test_support.py: no data — prepare it\n"),
    (UserError("disk full", code=4), 4, "test_support.py: disk full\n"),
    (PermissionError(13, "Permission denied", "/x"), 2, "test_support.py: /x: Permission denied"),
    (OSError("odd"), 2, "test_support.py: odd — check"),
    (KeyboardInterrupt(), 130, ""),
    (MemoryError(), 2, "test_support.py: out of memory — use a smaller --micro_batch"),
    (CUDA("CUDA out of memory"), 2, "test_support.py: out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "test_support.py: out of mem"),
    (COMPILER("no compiler\n\nSet TORCH_LOGS"), 2, "test_support.py: torch.compile failed (no "),
    (RuntimeError("[/p/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed"), 2,
     "test_support.py: another process has ended ([/p/third_party"),
])
def test_what_the_user_can_fix_ends_in_one_line(capsys, error, code, message):
    """Catches: a traceback, or exit code 0, after a mistake of the user."""
    @runs.script
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == bool(message)


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("shapes differ")])
def test_our_own_mistakes_keep_their_traceback(error):
    """Catches: a fault of the code that is reported as the user's."""
    @runs.script
    def main(argv=None):
        if argv:
            raise error
        return 7

    with pytest.raises(type(error)):
        main(["x"])
    assert main() == 7  # control


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_ends_the_script_quietly(lines):
    """Catches: a traceback from `python sample.py | head`, also when the text was still in the
    buffer as the script ended."""
    process = child(f"from support.runs import script\n"
                    f"@script\n"
                    f"def main(argv):\n"
                    f"    input()\n"
                    f"    print({lines} * 'text\\n')\n"
                    f"main()\n")
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(20) == 0


# ---- the run folder

def test_a_run_folder_is_held_by_one_process(tmp_path):
    """Catches: two processes in one log; a folder that stays locked after a kill."""
    process = child(f"from pathlib import Path; from support.runs import hold\n"
                    f"lock = hold(Path({str(tmp_path)!r}))\n"
                    f"print('held', flush=True)\n"
                    f"input()\n")
    process.stdout.readline()
    with pytest.raises(UserError, match="in use by another process"):
        hold(tmp_path)
    process.kill()
    process.wait()
    os.close(hold(tmp_path))  # control


def claimed(run, resume=False, overwrite=False):
    """The exit code of a script that claims the folder and ends."""
    @runs.script
    def main(argv):
        runs.claim(run, resume, overwrite)
        return 0
    return exit_code(main, [])


def test_claim_protects_a_used_folder(tmp_path, capsys):
    """Catches: a run that is continued or deleted without a flag that says so."""
    run = tmp_path / "new/run"
    assert claimed(run) == 0  # control: an unused folder is made
    (run / "checkpoints/.tmp_step_00000005").mkdir(parents=True)
    (run / ".tmp_old").mkdir()
    (run / "metrics.jsonl").write_text("a\n")
    assert claimed(run) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert claimed(run, resume=True) == 0
    assert claimed(run, overwrite=True) == 0
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    assert left == [".lock", "checkpoints", "metrics.jsonl"]  # without what a kill left


def test_starting_over_deletes_the_run_alone(tmp_path, monkeypatch):
    """Catches: a file of the old run in the new one, a file that is not ours deleted, half a run
    after a kill."""
    (tmp_path / "checkpoints/step_00000005").mkdir(parents=True)
    for name in ("metrics.jsonl", "evaluations.jsonl", "trajectory.md", "dynamics.png", "base.pt",
                 "base.json", "notes.txt"):
        (tmp_path / name).write_text(name)

    def killed(path, ignore_errors):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.shutil, "rmtree", killed)
        runs.start_over(tmp_path)
    aside, notes = sorted(os.listdir(tmp_path))
    assert (aside[:9], notes) == (".tmp_old_", "notes.txt")
    os.close(hold(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".lock", "notes.txt"]
    runs.start_over(tmp_path)  # nothing to delete


def make_run(root, name, changed, **settings):
    (root / name / "checkpoints").mkdir(parents=True)
    os.utime(root / name / "checkpoints", (changed, changed))
    settings = {"data": "d", "seq_len": 16, **settings}
    (root / name / "config.json").write_text(json.dumps(settings))
    return root / name


def test_newest_run_is_the_one_that_changed_last(tmp_path):
    """Catches: the run with the last name; a tuned run as the base of a tuning."""
    with pytest.raises(UserError, match="no runs in .*python train.py"):
        newest_run(tmp_path)
    make_run(tmp_path, "b", changed=100)
    newest = make_run(tmp_path, "a", changed=200)
    (tmp_path / "c").mkdir()  # without a checkpoint
    assert newest_run(tmp_path) == newest
    tuned = make_run(tmp_path, "tuned", changed=300, base="runs/a")
    assert newest_run(tmp_path, pretrained=True) == newest
    assert newest_run(tmp_path) == tuned  # control


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"data": 1, "seq_len": 16}',
                                     b'{"data": "d"}', b"[" * 100_000])
def test_broken_settings_are_refused(tmp_path, content):
    """Catches: a traceback from a damaged config.json."""
    run = make_run(tmp_path, "a", changed=1)
    assert settings_of(run) == {"data": "d", "seq_len": 16}  # control
    (run / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json is missing or damaged"):
        settings_of(run)
    with pytest.raises(UserError, match="no such run"):
        settings_of(tmp_path / "absent")


@pytest.mark.parametrize("log, finished", [
    ('{"event": "train"}\n{"event": "end", "reason": "done"}\n', True),
    ('{"event": "end", "reason": "done"}\n{"event": "resume"}\n', False),
    ('{"event": "end", "reason": "stopped"}\n', False),
    ('{"event": "end", "reason": "done"', False),
    ('[]\n', False),
    ('', False)])
def test_finished_means_that_the_last_row_says_done(tmp_path, log, finished):
    """Catches: a stopped run that no resume continues."""
    (tmp_path / "metrics.jsonl").write_text(log)
    assert is_finished(tmp_path, {"step": 6}, last=6) == finished
    assert not is_finished(tmp_path, {"step": 5}, last=6)
    assert not is_finished(tmp_path, None, last=6)


# ---- the log

def log_rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_log_is_cut_to_what_the_state_knows(tmp_path):
    """Catches: steps that stand in the log twice, or a line that a kill left half written."""
    log = Log(tmp_path, 0, max_steps=9)
    log.event("a", 1)
    length = log.length()
    log.event("b", 2)
    log.file.write(b'{"ev')
    again = Log(tmp_path, length, max_steps=9)
    again.event("c", 2, loss=float("nan"), rates=[float("inf"), 1.5])
    rows = log_rows(tmp_path)
    assert rows[1] == {"event": "c", "step": 2, "loss": None, "rates": [None, 1.5]}
    assert len(rows) == 2
    for wrong in (length - 1, 10**6):
        with pytest.raises(UserError, match="was changed since"):
            Log(tmp_path, wrong, max_steps=9)
    assert log_rows(tmp_path) == rows  # control: a refused log stays as it is


def test_full_disk_stops_the_log(tmp_path, monkeypatch):
    """Catches: rows that are lost without a word."""
    class Full:
        name = "metrics.jsonl"

        def write(self, line):
            return len(line) // 2

    log = Log(tmp_path, 0, max_steps=9)
    log.event("a", 1)  # control
    log.file = Full()
    with pytest.raises(UserError, match="not written at step 2") as error:
        log.event("b", 2)
    assert error.value.code == 4


def test_other_processes_log_nothing(capsys):
    """Catches: every line once for each process."""
    log = Log(None, 0, max_steps=9)
    log.event("a", 1)
    log.train(1, 8, 2.0, 0.1, 1.0, seconds=1, tokens_in_step=8, skipped=False)
    log.say("text")
    assert capsys.readouterr().out == ""


def test_train_row_has_speed_and_utilization(tmp_path, capsys):
    """Catches: milliseconds that are seconds, utilization of another peak, a skipped update that
    looks like any other."""
    log = Log(tmp_path, 0, max_steps=9, peak_rate=64.0)
    log.train(1, 8, 2.0, 0.1, 1.0, seconds=0.5, tokens_in_step=8, skipped=False)
    log.train(2, 16, 2.0, 0.1, 1.0, seconds=0.5, tokens_in_step=8, skipped=True)
    first, second = log_rows(tmp_path)
    assert first == {"event": "train", "step": 1, "tokens": 8, "loss": 2.0, "lr": 0.1,
                     "grad_norm": 1.0, "dt_ms": 500, "tok_per_s": 16, "mfu": 0.25}
    assert second == {**first, "step": 2, "tokens": 16, "skipped": True}
    lines = capsys.readouterr().out.splitlines()
    assert "update skipped" in lines[1]
    assert "update skipped" not in lines[0]  # control


def test_notes_are_appended(tmp_path):
    """Catches: an evaluation that deletes the one before it."""
    runs.note(tmp_path, {"event": "eval", "step": 1}, began=None)
    runs.note(tmp_path, {"event": "eval", "step": 2}, began=None)
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert json.loads(lines[0])["time"] > 1.7e9


# ---- flags

@pytest.mark.parametrize("kind, good, bad", [
    (count, "1", "0"),
    (count, "1099511627776", "1099511627777"),
    (count_or_0, "0", "-1"),
    (positive, "1e-9", "0"),
    (positive, "1.5", "nan"),
    (positive, "2", "inf"),
    (seed, "4294967295", "4294967296"),
    (number(int, 2, 9), "9", "10"),
    (number(int, 2, 9), "3", "3.5")])
def test_a_number_outside_its_range_is_refused(kind, good, bad):
    """Catches: NaN, infinity or a negative number as a setting."""
    parser = Parser()
    parser.add_argument("--n", type=kind)
    assert parser.parse_args(["--n", good]).n == float(good)  # control
    with pytest.raises(UserError, match=f"--n: .*{bad}.* see --help"):
        parser.parse_args(["--n", bad])


def test_a_flag_is_never_abbreviated():
    """Catches: --max for --max_steps, until another flag begins like it."""
    parser = Parser()
    parser.add_argument("--max_steps", type=count)
    assert parser.parse_args(["--max_steps", "3"]).max_steps == 3  # control
    with pytest.raises(UserError, match="unrecognized arguments: --max 3 — see --help"):
        parser.parse_args(["--max", "3"])


def test_help_shows_each_default():
    """Catches: a default that is hidden because it is 0; "default: None" for a flag without."""
    parser = Parser()
    parser.add_argument("--every", default=7, help="every")
    parser.add_argument("--zero", default=0, help="zero")
    parser.add_argument("--none", help="none")
    parser.add_argument("--switch", action="store_true", help="switch")
    shown = parser.format_help()
    assert "every (default: 7)" in shown
    assert "zero (default: 0)" in shown
    assert shown.count("default: ") == 2  # control


def test_text_is_valid_utf8():
    """Catches: a traceback from command-line bytes that are not text, which arrive as lone
    surrogates."""
    assert text("a\udcffb") == "a?b"
    assert text("Zürich 🤖") == "Zürich 🤖"  # control


@pytest.mark.row(69)
def test_log_files_have_no_bars(monkeypatch, capsys):
    """Catches: thousands of states of a bar in the file that a cluster keeps; a long wait without
    a sign of life."""
    monkeypatch.setattr(progress, "MINUTE", 0.2)
    for _ in progress.tqdm(range(10), desc="long"):
        time.sleep(0.05)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5
    assert lines[-1].startswith("long: 100%")
    assert not any("\r" in line for line in lines)
    list(progress.tqdm(range(10), desc="short"))
    assert capsys.readouterr().err == ""  # done before the first line is due
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(progress.tqdm(range(10), desc="short"))
    assert "\r" in capsys.readouterr().err  # control: a terminal has its bar


@pytest.mark.row(65)
def test_clone_with_windows_line_ends_is_the_same(tmp_path):
    """Catches: a merge table whose hash a clone has changed."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    clone = ["git", "-c", "core.autocrlf=true", "clone", "-q", str(ROOT), str(tmp_path / "clone")]
    subprocess.run(clone, check=True)
    for name in ("support/gpt2.tiktoken", "train.py", "reproduce.sh"):
        assert b"\r\n" not in (tmp_path / "clone" / name).read_bytes()


@pytest.mark.row(68)
def test_commands_can_be_pasted():
    """Catches: a path with a blank or a quote that the shell cuts."""
    for path in ("runs/tiny", "runs/my run", "runs/a'b", "$HOME"):
        assert shlex.split(f"python sample.py {runs.quoted(path)}")[2] == path
