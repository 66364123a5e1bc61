"""Forks runs of train.py and sft.py, each with a fault of its own. The fixture `server` starts it
and talks to it in JSON lines.

A fork after a multi-threaded torch operation hangs, so this process performs none: it imports,
forks and waits. A request is {"script", "argv", "fault", "kill_after", "stderr"}. The answer is
{"code", "operations", "stderr"}: the exit code (negative: the signal), the number of file
operations that the child performed, and its error messages.

Faults, counted from where the child starts:
  ["kill", n]          SIGKILL in place of the n-th operation; of a write, after half of it
  ["full", n]          from the n-th write into a checkpoint on, the disk is full
  ["log full", n]      the n-th write to the log writes half a line, then the disk is full
  ["limit", bytes]     the system refuses files longer than that
  ["signal", where, step, name, …]   the signals arrive in a "step", an "evaluate" (before it), a
                       "benchmark" (after the evaluation's row), a "sample" or a "save"
"""
import builtins
import errno
import functools
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import torch
import torch._dynamo  # noqa: F401  as evaluation imports it: here once, not in every child

import checkpoint
import conftest
import evaluate
import plot_dynamics
import sft
import train

WRITES = 20  # torch.save writes a file in a hundred pieces: each 20th counts as an operation


class Watched:
    """A file whose writes are counted and may fail."""

    def __init__(self, file, name, faults):
        self.file = file
        self.name = name
        self.faults = faults
        self.writes = 0

    def write(self, data):
        if not isinstance(data, str):
            data = bytes(data)
        if self.faults.is_full(self.name):
            self.write_half(data)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.writes % WRITES == 0:
            self.faults.operation(lambda: self.write_half(data))
        self.writes += 1
        return self.file.write(data)

    def write_half(self, data):
        self.file.write(data[:len(data) // 2])
        self.file.flush()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


class Faults:
    """Counts file operations by wrapping the functions that perform them, and strikes in time."""

    def __init__(self, script, kind=None, *how):
        self.observer = sft.AnswerObserver if script is sft else train.Observer
        self.kind = kind
        self.how = how
        self.count = 0
        self.written = {"log full": 0, "full": 0}

    def install(self):
        self.open = builtins.open
        builtins.open = self.watched_open
        for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "link"):
            setattr(os, name, self.counted(getattr(os, name)))
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.how[0], resource.RLIM_INFINITY))
        if self.kind == "signal":
            self.install_signal(*self.how)

    def install_signal(self, where, step, *names):
        def send():
            for name in names:
                os.kill(os.getpid(), getattr(signal, name))
        if where == "step":
            self.strike_in_forward(2 * step, send)  # a step of the tests has two micro-batches
        if where in ("evaluate", "sample"):
            self.strike_before(self.observer, where, step, send)
        if where == "benchmark":
            module = sys.modules[self.observer.__module__]
            self.strike_before(module, "log_benchmark", step, send)
        if where == "save":
            original = checkpoint.save

            def save_struck(run, state, *keep):
                if state["step"] == step:
                    send()
                return original(run, state, *keep)
            checkpoint.save = save_struck

    def strike_before(self, owner, name, step, send):
        """Strike when owner.name(…, step, log) is called."""
        original = getattr(owner, name)

        def struck(*args):
            if args[-2] == step:
                send()
            return original(*args)
        setattr(owner, name, struck)

    def strike_in_forward(self, number, send):
        original = train.Llama.forward
        calls = []

        def struck(*args, **kwargs):
            if kwargs.get("reduction") == "sum":  # a forward of training
                calls.append(1)
                if len(calls) == number:
                    send()
            return original(*args, **kwargs)
        train.Llama.forward = struck

    def watched_open(self, path, mode="r", *args, **kwargs):
        if "r" in mode or not isinstance(path, (str, os.PathLike)):
            return self.open(path, mode, *args, **kwargs)
        self.operation()
        return Watched(self.open(path, mode, *args, **kwargs), str(path), self)

    def counted(self, function):
        def call(*args, **kwargs):
            self.operation()
            return function(*args, **kwargs)
        return call

    def operation(self, half=lambda: None):
        self.count += 1
        if self.kind == "kill" and self.count == self.how[0]:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def is_full(self, name):
        kind = None
        if name.endswith("metrics.jsonl"):
            kind = "log full"
        elif "checkpoints" in name:
            kind = "full"
        if kind is None:
            return False
        self.written[kind] += 1
        return self.kind == kind and self.written[kind] >= self.how[0]


def child(request, counted):
    """Run the trial in the forked process; never returns."""
    stdout = os.open(os.devnull, os.O_WRONLY)
    stderr = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    script = {"train": train, "sft": sft}[request["script"]]
    faults = Faults(script, *request["fault"])
    faults.install()
    code = conftest.exit_code(script.main, request["argv"])
    os.write(counted, str(faults.count).encode())
    os._exit(code)


def trial(request):
    """Fork the child, wait for it, kill it if it is time; returns the answer."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(request, writing)
    os.close(writing)
    end = time.monotonic() + (request["kill_after"] or math.inf)
    status = wait(pid, end)
    operations = os.read(reading, 20)
    os.close(reading)
    return {"code": os.waitstatus_to_exitcode(status), "operations": int(operations or 0),
            "stderr": Path(request["stderr"]).read_text()}


def wait(pid, end):
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def serve():
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would the trials
    train.PRESETS["test"] = conftest.TEST
    train.BY_PRESET["test"] = conftest.TEST_SETTINGS
    # Short texts and no figure: the time goes into what is tested.
    plot_dynamics.main = lambda argv: 0
    sft.AnswerObserver.LONGEST = 4
    evaluate.continue_prompt = functools.partial(evaluate.continue_prompt, max_new_tokens=4)
    for line in sys.stdin:
        print(json.dumps(trial(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
