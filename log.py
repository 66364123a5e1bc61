"""log.py — what a run writes down, one JSON object per line: metrics.jsonl while it trains, evaluations.jsonl afterwards."""
import json
import math
import os
import sys
import time

from errors import UserError


class Log:
    """metrics.jsonl and the screen. Only rank 0 has either; on the others all this is silent."""

    def __init__(self, run, step, log_bytes, is_main):
        """Cut the log back to `log_bytes`, its length when the checkpoint of `step` was written. Where someone has changed
        it since, say so, and keep the whole rows up to that step."""
        self.file = None
        if is_main:
            self.file = open(run / "metrics.jsonl", "a+b", buffering=0)
            self.file.seek(0)
            kept = self.file.read(log_bytes)
            if len(kept) < log_bytes or kept and kept[-1:] != b"\n":
                print(f"warning: {self.file.name} is not as it was when step {step} was saved; its rows up to there are kept", file=sys.stderr)
                self.file.seek(0)
                kept = b"".join(line for line in self.file.read().splitlines(True) if step_of(line) <= step)
                self.file.truncate(0)
                self.file.write(kept)
            self.file.truncate(len(kept))

    def event(self, event, step, **fields):
        """One JSON line, out of our hands at once. JSON has no NaN: it becomes null. Raises UserError with exit code 4 if
        the disk does not take it whole; what it took of it is cut off by the next resume."""
        if self.file:
            row = json.loads(json.dumps({"event": event, "step": step, **fields}), parse_constant=lambda name: None)
            line = json.dumps(row).encode() + b"\n"
            try:
                whole, why = self.file.write(line) == len(line), "disk full"
            except OSError as error:
                whole, why = False, error.strerror
            if not whole:
                raise UserError(f"{self.file.name}: not written at step {step} ({why}) — make room, then run again with --resume", code=4)

    def length(self):
        """Bytes written so far, made sure to be on the disk."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def say(self, text):
        """Print. A screen that is gone (a closed terminal, `| head`) is no reason to stop training."""
        if self.file:
            try:
                print(text, flush=True)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def step_of(line):
    """The step of a log's line; infinite if it is none."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def note(run, *events):
    """Append events to the run's evaluations.jsonl, which no resume ever cuts."""
    with open(run / "evaluations.jsonl", "a") as file:
        for event in events:
            file.write(json.dumps({**event, "time": time.time()}) + "\n")
