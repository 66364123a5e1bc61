"""runs.py — how a script ends, and the folder of a run: its lock, its settings, its log."""
import functools
import json
import os
import shutil
import sys
import time
from pathlib import Path


# -------------------------------------------------------------------------------------------------
# A mistake that the user can fix is one line on stderr and an exit code, never a traceback.

class UserError(Exception):
    """Says what is wrong, where, and what to do next. `code` is the script's exit code."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def script(main):
    """Decorator for a script's `main(argv=None)`: whatever the user can fix ends in one line."""
    @functools.wraps(main)
    def wrapped(argv=None):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
        try:
            code = main(argv)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, so that a reader who left is noticed here
            return code
        except UserError as error:
            message, code = str(error), error.code
        except BrokenPipeError:  # the reader of our output left, as in `python sample.py | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except KeyboardInterrupt:  # train.py and sft.py, which have something to save, handle it
            sys.exit(130)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            message = f"{where}{error.strerror or error} — check path, permissions and disk"
            code = 2
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            message = ("out of memory — use a smaller --micro_batch, a shorter --seq_len (sft.py: "
                       "--max_length) or a smaller model")
            code = 2
        print(f"{Path(main.__code__.co_filename).name}: {message}", file=sys.stderr)
        sys.exit(code)
    return wrapped


def is_out_of_memory(error):
    """PyTorch has a class of its own for a GPU; on a CPU it raises a plain RuntimeError."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return "OutOfMemoryError" in names or "MemoryError" in names or "allocate memory" in str(error)


# -------------------------------------------------------------------------------------------------
# The folder

OURS = ("checkpoints", "metrics.jsonl", "evaluations.jsonl", "trajectory.md", "dynamics.png",
        "base.pt", "base.json")


def due(step, every, last):
    """True at steps 0, 1, 2, 4, 8 …, at multiples of `every` (0: none) and at the `last` one.

    The one rule for evaluating, sampling, saving, and keeping weights: early learning is fast."""
    power_of_two = step & (step - 1) == 0  # and 0
    return power_of_two or step == last or (every > 0 and step % every == 0)


def claim(run, resume, overwrite):
    """Make the run folder and lock it; returns the lock, an open file to be held until the end.

    Deletes nothing but what a killed process left unfinished. Raises UserError if another process
    holds the folder, or if it holds a run and neither --resume nor --overwrite was given."""
    run.mkdir(parents=True, exist_ok=True)
    lock = hold(run)
    used = (run / "metrics.jsonl").exists() or (run / "checkpoints").exists()
    if used and not resume and not overwrite:
        raise UserError(f"{run} already holds a run — continue it with --resume, start over with "
                        f"--overwrite, or choose another --run")
    return lock


def hold(run):
    """Lock the run folder for this process; the system unlocks it however the process ends."""
    lock = open(run / ".lock", "w")
    try:
        import fcntl  # not on Windows
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run} is in use by another process — wait for it, or choose another "
                        f"--run") from None
    except (ImportError, OSError):
        print(f"warning: {run} cannot be locked here; do not train into it twice at once",
              file=sys.stderr)
    for leftover in [*run.glob(".tmp_*"), *run.glob("checkpoints/.tmp_*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    return lock


def start_over(run):
    """Delete an earlier run. Its checkpoints are renamed aside first, and all else after them: what
    a kill leaves is never resumed by mistake."""
    aside = run / ".tmp_old"
    aside.mkdir()
    for name in OURS:
        if (run / name).exists():
            os.rename(run / name, aside / name)
    shutil.rmtree(aside)


def holds_steps(run):
    """Whether the run folder shows that training has begun."""
    log = run / "metrics.jsonl"
    return any(run.glob("checkpoints/*")) or log.exists() and b'"train"' in log.read_bytes()


def is_finished(run):
    """Whether the last row of the log says that the run was completed."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    try:
        last = json.loads(lines[-1])
        return last["event"] == "end" and last["reason"] == "done"
    except (IndexError, ValueError, KeyError, TypeError):
        return False


def newest_run(root="runs", pretrained=False):
    """The run folder whose checkpoints changed last; pretrained: only runs of train.py.

    Raises UserError if there is none."""
    runs = [folder.parent for folder in Path(root).glob("*/checkpoints")]
    if pretrained:
        runs = [run for run in runs if not is_tuned(run)]
    if not runs:
        raise UserError(f"no runs in {root} — train one first: python train.py")
    return max(runs, key=lambda run: (run / "checkpoints").stat().st_mtime)


def is_tuned(run):
    """Whether sft.py made the run; its settings have a base."""
    try:
        return "base" in settings_of(run)
    except UserError:
        return False


def settings_of(run):
    """The settings that `run` was trained with, from its config.json. Raises UserError."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"{run}: no such run — train it first: python train.py --run {run}")
    try:
        settings = json.loads((run / "config.json").read_text())
        if not isinstance(settings["data"], str) or not isinstance(settings["seq_len"], int):
            raise TypeError
        return settings
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{run}/config.json is missing or damaged — training with --resume writes "
                        f"it again") from None


# -------------------------------------------------------------------------------------------------
# The log

class Log:
    """metrics.jsonl and the screen. Without a run folder it is silent, as on every rank but 0."""

    def __init__(self, run, length, max_steps, peak_rate=None):
        """Open the log and cut it back to `length`, what it was when the resumed state was saved.

        peak_rate: tokens per second if all of the hardware's FLOPs were used, where it is known.
        Raises UserError if the log is shorter than `length`, or was edited."""
        self.file = None
        self.max_steps = max_steps
        self.peak_rate = peak_rate
        self.step_seconds = []
        self.last_line = 0.0
        if run is None:
            return
        self.file = open(run / "metrics.jsonl", "a+b", buffering=0)
        self.file.seek(0)
        kept = self.file.read(length)
        is_whole = len(kept) == length and kept[-1:] in (b"", b"\n")
        if not is_whole:
            raise UserError(f"{self.file.name} was changed since the state to resume was saved — "
                            f"restore it, or start over with --overwrite")
        self.file.truncate(length)

    def event(self, event, step, **fields):
        """Append one JSON line, unbuffered. JSON has no NaN or infinity: they become null.

        Raises UserError with code 4 if the disk does not take the whole line; the next resume
        cuts off the rest."""
        if self.file is None:
            return
        row = json.dumps({"event": event, "step": step, **fields})
        row = json.loads(row, parse_constant=lambda name: None)
        line = json.dumps(row).encode() + b"\n"
        try:
            written = self.file.write(line)
            reason = "disk full"
        except OSError as error:
            written = 0
            reason = error.strerror
        if written < len(line):
            raise UserError(f"{self.file.name}: not written at step {step} ({reason}) — make room, "
                            f"then run again with --resume", code=4)

    def start(self, step, state, settings, env, reset_optimizer):
        """The first row of a run, or of a resume from `state`."""
        event = "start" if state is None else "resume"
        restored = state is not None and not reset_optimizer
        self.event(event, step, time=time.time(), config=settings, env=env,
                   restored_optimizer=restored)

    def train(self, step, tokens, loss, lr, grad_norm, seconds, tokens_in_step, skipped):
        """Log one training step; print it if it is one of the first or the last, or every 2 s."""
        rate = tokens_in_step / seconds
        row = {"tokens": tokens, "loss": loss, "lr": lr, "grad_norm": grad_norm,
               "dt_ms": 1000 * seconds, "tok_per_s": rate}
        if self.peak_rate is not None:
            row["mfu"] = rate / self.peak_rate  # model FLOPs utilization
        if skipped:
            row["skipped"] = True
        self.event("train", step, **row)
        self.step_seconds.append(seconds)
        if len(self.step_seconds) == 20:
            self.say(f"  at this speed the training steps take {self.minutes_left(step):.1f} more "
                     f"minutes; to end sooner: --max_steps, or Ctrl-C, which saves")
        recent = time.monotonic() - self.last_line < 2
        if recent and 4 < step < self.max_steps and not skipped:
            return
        self.last_line = time.monotonic()
        remark = " | fp16 overflow, update skipped" if skipped else ""
        self.say(f"step {step:>6}/{self.max_steps} | loss {loss:.4f} | lr {lr:.2e} | "
                 f"norm {grad_norm:.2f} | {1000 * seconds:.0f} ms | {rate / 1000:.1f}k tok/s | "
                 f"{self.minutes_left(step):.1f} min left{remark}")

    def minutes_left(self, step):
        """How long the rest of the steps takes if it goes as fast as the fastest tenth so far.
        Other programs can slow a step down, nothing speeds it up; and the first ones are slow."""
        fast = sorted(self.step_seconds)[len(self.step_seconds) // 10]
        return (self.max_steps - step) * fast / 60

    def length(self):
        """Bytes written so far, made sure to be on the disk."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def say(self, text):
        """Print. A closed terminal, or `| head`, is no reason to stop training."""
        if self.file is None:
            return
        try:
            print(text, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(run, event):
    """Append an event to the run's evaluations.jsonl, which no resume ever cuts."""
    with open(run / "evaluations.jsonl", "a") as file:
        file.write(json.dumps({**event, "time": time.time()}) + "\n")
