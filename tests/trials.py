"""Forks runs of train.py and sft.py, each with a fault of its own: started by test_faults.py, talks JSON lines.

A fork after a multi-threaded torch operation hangs, so this process makes none: it imports, forks and waits. A request is
{"script", "argv", "fault", "kill_after"}; the answer {"code", "operations", "stderr"}: the exit code (negative: the signal), the
number of file operations that the child made, what it said.

Faults, all counted from where the child starts:
  ["kill", n]          SIGKILL in place of the n-th operation; of a write, after half of it
  ["full", n]          from the n-th write into a checkpoint on, the disk is full
  ["log full", n]      the n-th write to the log writes half a line, then the disk is full
  ["limit", bytes]     the system refuses files longer than that
  ["signal", where, step, name]   the signal arrives in a "step", an "evaluate" or a "save" at that step
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
import torch._dynamo  # as evaluation does: here once, not in every child

import checkpoint
import conftest
import evaluate
import plot_dynamics
import sft
import train

WRITES = 20  # torch.save writes a file in a hundred pieces: each 20th counts as an operation


class Watched:
    """A file that is written to under supervision."""

    def __init__(self, file, name, faults):
        self.file, self.name, self.faults, self.writes = file, name, faults, 0

    def write(self, data):
        data = data if isinstance(data, str) else bytes(data)
        if self.faults.full(self.name):
            self.file.write(data[:len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.writes % WRITES == 0:
            self.faults.operation(lambda: (self.file.write(data[:len(data) // 2]), self.file.flush()))
        self.writes += 1
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


class Faults:
    """Counts file operations by wrapping what makes them, and strikes at its moment."""

    def __init__(self, script, kind=None, *how):
        self.observer = sft.Examiner if script is sft else train.Observer
        self.kind, self.how, self.count, self.written = kind, how, 0, {"log full": 0, "full": 0}

    def install(self):
        self.open = builtins.open
        builtins.open = self.watched_open
        for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, self.counted(getattr(os, name)))
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.how[0], resource.RLIM_INFINITY))
        if self.kind == "signal":
            where, step, name = self.how
            owner, method, at = {"step": (train.Llama, "forward", None), "evaluate": (self.observer, "evaluate", 1),
                                 "save": (checkpoint, "save", 1)}[where]
            original, calls = getattr(owner, method), [0]

            def struck(*args, **kwargs):
                calls[0] += at is None and kwargs.get("reduction") == "sum"
                # a step of the tests is two micro-batches
                if (args[at] == step) if at is not None else calls[0] == 2 * step:
                    calls[0] += 1
                    os.kill(os.getpid(), getattr(signal, name))
                return original(*args, **kwargs)
            setattr(owner, method, struck)

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

    def full(self, name):
        kind = "log full" if name.endswith("metrics.jsonl") else "full" if "checkpoints" in name else None
        if kind:
            self.written[kind] += 1
        return kind is not None and self.kind == kind and self.written[kind] >= self.how[0]


def trial(script, argv, fault, stderr, counted):
    """The child: never returns."""
    for number in (1, 2):
        os.dup2(os.open(stderr if number == 2 else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    faults = Faults(script, *fault)
    faults.install()
    try:
        code = script.main(argv)
    except SystemExit as error:
        code = error.code
    os.write(counted, str(faults.count).encode())
    os._exit(code)


def serve():
    torch.set_num_threads(1)
    train.PRESETS["test"], train.BY_PRESET["test"] = conftest.TEST, {}
    plot_dynamics.main = lambda argv: 0
    sft.Examiner.LONGEST = 4
    evaluate.continue_prompt = functools.partial(evaluate.continue_prompt, max_new_tokens=4)  # the time goes into what is tested
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        stderr = request["stderr"]
        child = os.fork()
        if not child:
            trial({"train": train, "sft": sft}[request["script"]], request["argv"], request.get("fault") or [], stderr, writing)
        os.close(writing)
        end = time.monotonic() + (request.get("kill_after") or math.inf)
        while not (waited := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.001)
        counted = os.read(reading, 20)
        os.close(reading)
        print(json.dumps({"code": os.waitstatus_to_exitcode(waited[1]), "operations": int(counted or 0),
                          "stderr": Path(stderr).read_text()}), flush=True)


if __name__ == "__main__":
    serve()
