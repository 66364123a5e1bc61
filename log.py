"""log.py — what a run writes down, one JSON object per line: metrics.jsonl while it trains, evaluations.jsonl afterwards."""
import json
import os
import shutil
import sys
import time

from errors import UserError


class Log:
    """metrics.jsonl and the screen. Only rank 0 has either; on the others all this is silent."""

    def __init__(self, run, log_bytes, is_main):
        """Cut the log back to `log_bytes`, its length when the checkpoint was written. From 0, all else of a run goes too."""
        self.file = None
        if is_main:
            if log_bytes == 0:
                shutil.rmtree(run / "checkpoints", ignore_errors=True)
                (run / "evaluations.jsonl").unlink(missing_ok=True)
            self.file = open(run / "metrics.jsonl", "ab", buffering=0)
            if self.file.tell() < log_bytes:
                print(f"warning: rows are missing from {self.file.name}", file=sys.stderr)
            self.file.truncate(min(self.file.tell(), log_bytes))

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
        if self.file:
            print(text, flush=True)


def note(run, *events):
    """Append events to the run's evaluations.jsonl, which no resume ever cuts."""
    with open(run / "evaluations.jsonl", "a") as file:
        for event in events:
            file.write(json.dumps({**event, "time": time.time()}) + "\n")
