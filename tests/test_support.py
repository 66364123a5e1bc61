"""support/runs.py and support/flags.py: how a script ends, the run folder, its log, the flags."""
import errno
import json
import math
import os
import shlex
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from support import progress, runs
from support.flags import Parser, count, number, positive
from support.runs import Log, UserError, is_finished, newest_run, settings_of

# ---- how a script ends

CUDA = type("OutOfMemoryError", (RuntimeError,), {})  # as torch.cuda's, which needs a GPU
COMPILER = type("BackendCompilerFailed", (RuntimeError,), {})  # as torch.compile's


@pytest.mark.parametrize("error, code, message", [
    (UserError("disk full", code=4), 4, "test_support.py: disk full\n"),
    (PermissionError(13, "Permission denied", "/x"), 2, "test_support.py: /x: Permission denied"),
    (KeyboardInterrupt(), 130, ""),
    (MemoryError(), 2, "test_support.py: out of memory"),
    (CUDA("CUDA out of memory"), 2, "test_support.py: out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "test_support.py: out of mem"),
    (COMPILER("no compiler\n\nSet TORCH_LOGS"), 2, "test_support.py: torch.compile failed (no "),
    (RuntimeError("[/p/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed"), 2,
     "test_support.py: another process has ended ([/p/third_party"),
    (RuntimeError("shapes differ"), None, ""),  # our own mistake: control
])
def test_what_the_user_can_fix_ends_in_one_line(capsys, error, code, message):
    """Catches: a traceback, or exit code 0, after a mistake of the user; a fault of the code that
    is reported as the user's."""
    @runs.script
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit if code else type(error)) as ended:
        main([])
    assert getattr(ended.value, "code", None) == code
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == bool(message)


def test_a_reader_that_leaves_ends_the_script_quietly():
    """Catches: a traceback from `python sample.py | head`, when the text was still in the buffer as
    the script ended."""
    code = "from support import runs; runs.script(lambda argv: print(input()))()"
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write("text\n")
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(20) == 0


def test_log_that_the_disk_does_not_take_is_code_4(tmp_path, monkeypatch):
    """Catches: a full quota, which a network drive tells at the fsync, as a mistake of the user."""
    log = Log(tmp_path, 0, max_steps=9)
    assert log.length() == 0  # control

    def full(handle):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="metrics.jsonl: not written .Disk quota") as found:
        log.length()
    assert found.value.code == 4


# ---- the run folder

def test_starting_over_deletes_the_run_alone(tmp_path):
    """Catches: a file of the old run in the new one, a file that is not ours deleted."""
    (tmp_path / "checkpoints/step_00000005").mkdir(parents=True)
    for name in (*runs.OURS[1:], "notes.txt"):
        (tmp_path / name).write_text(name)
    runs.start_over(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


def make_run(root, name, changed):
    (root / name / "checkpoints").mkdir(parents=True)
    os.utime(root / name / "checkpoints", (changed, changed))
    (root / name / "config.json").write_text('{"data": "d", "seq_len": 16}')
    return root / name


def test_newest_run_is_the_one_that_changed_last(tmp_path):
    """Catches: the run with the last name, or a folder without a checkpoint; one that train.py did
    not make, for sft.py."""
    with pytest.raises(UserError, match="no runs in .*python train.py"):
        newest_run(tmp_path)
    make_run(tmp_path, "b", changed=100)
    newest = make_run(tmp_path, "a", changed=200)
    (tmp_path / "c").mkdir()
    assert newest_run(tmp_path) == newest
    for setting in ("base", "imported_from"):
        other = make_run(tmp_path, setting, changed=300)
        (other / "config.json").write_text(json.dumps({"data": "d", "seq_len": 16, setting: "x"}))
        assert newest_run(tmp_path, pretrained=True) == newest
    assert newest_run(tmp_path).name != "a"  # control


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"data": "d"}', b"[" * 100_000])
def test_broken_settings_are_refused(tmp_path, content):
    """Catches: a traceback from a damaged config.json."""
    run = make_run(tmp_path, "a", changed=1)
    assert settings_of(run) == {"data": "d", "seq_len": 16}  # control
    (run / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json is missing, damaged"):
        settings_of(run)
    with pytest.raises(UserError, match="no such run"):
        settings_of(tmp_path)


@pytest.mark.parametrize("log, finished", [
    ('{"event": "train"}\n{"event": "end", "reason": "done"}\n', True),
    ('{"event": "end", "reason": "done"}\n{"event": "resume"}\n', False),
    ('{"event": "end", "reason": "stopped"}\n', False),
    ('', False)])
def test_finished_means_that_the_last_row_says_done(tmp_path, log, finished):
    """Catches: a stopped run that no resume continues."""
    (tmp_path / "metrics.jsonl").write_text(log)
    assert is_finished(tmp_path, {"step": 6}, max_steps=6) == finished
    assert not is_finished(tmp_path, {"step": 5}, max_steps=6)


# ---- the log

def test_train_row_has_speed_and_utilization(tmp_path, capsys):
    """Catches: milliseconds that are seconds, utilization of another peak, a NaN in the log, which
    JSON does not have; every line once for each process."""
    for folder in (None, tmp_path):  # None: every process but the first
        assert capsys.readouterr().out == ""
        log = Log(folder, 0, max_steps=9)
        log.peak_rate = 64.0
        log.train(1, 8, math.nan, 0.1, 1.0, seconds=0.5, tokens_in_step=8, skipped=False)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "event": "train", "step": 1, "tokens": 8, "loss": None, "lr": 0.1, "grad_norm": 1.0,
        "dt_ms": 500, "tok_per_s": 16, "mfu": 0.25}
    assert "500 ms" in capsys.readouterr().out  # control


# ---- flags

@pytest.mark.parametrize("kind, good, bad", [
    (count, "1", "0"),
    (positive, "1.5", "nan"),
    (positive, "2", "inf"),
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
    with pytest.raises(UserError, match="unrecognized arguments: --max 3"):
        parser.parse_args(["--max", "3"])


@pytest.mark.row(69)
def test_log_files_have_no_bars(monkeypatch, capsys):
    """Catches: thousands of states of a bar in the file that a cluster keeps; a long wait without
    a sign of life."""
    monkeypatch.setattr(progress, "MINUTE", 0.1)
    for _ in progress.tqdm(range(10), desc="long"):
        time.sleep(0.03)
    printed = capsys.readouterr().err
    assert 2 <= printed.count("\n") <= 5
    assert "\nlong: 100%" in printed
    assert "\r" not in printed
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
