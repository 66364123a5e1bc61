"""runs.py — how a script ends, and the folder of a run: its lock, its settings, its log."""
import contextlib
import functools
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

# -------------------------------------------------------------------------------------------------
# A mistake that the user can fix is one line on stderr and an exit code, never a traceback.

class UserError(Exception):
    """Says what is wrong, where, and what to do next. `code` is the script's exit code."""

    def __init__(self, message, code=2):
        super().__init__(" ".join(message.splitlines()))  # one line, whatever a file name holds
        self.code = code


# What to call when a script ends, with its exit code, or None before a traceback. A notebook may
# call main([…]) again in the same process, and must find locks and signal handlers as they were.
AT_END = []


def script(main):
    """Decorator for a script's `main(argv=None)`: whatever the user can fix ends in one line."""
    @functools.wraps(main)
    def wrapped(argv=None):
        open_closed_streams()
        if argv is not None:
            argv = [str(argument) for argument in argv]  # a notebook may give numbers and paths
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
        outer = len(AT_END)  # a script can call another one
        code = None
        try:
            code = main(argv)
            sys.stdout.flush()  # here, so that a reader who left is noticed here
            return code
        except BaseException as error:
            code, message = explain(error)
            if code is None:
                raise
            if message is not None:
                file = Path(main.__code__.co_filename)
                name = file.parent.name if file.name == "__main__.py" else file.name
                print(f"{name}: {message}", file=sys.stderr)
        finally:
            while len(AT_END) > outer:
                AT_END.pop()(code)
        sys.exit(code)
    return wrapped


def explain(error):
    """(exit code, message or None) of an error that the user can fix; (None, None) of another."""
    if isinstance(error, UserError):
        return error.code, str(error)
    if isinstance(error, BrokenPipeError):  # our reader left, as in `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, None
    if isinstance(error, KeyboardInterrupt):  # train.py and sft.py handle it while they train
        return 130, None
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        what = f"{where}{error.strerror or error}"
        return 2, f"{' '.join(what.splitlines())} — check path, permissions and disk"
    if is_out_of_memory(error):
        return 2, ("out of memory — use a smaller --micro_batch, a shorter --seq_len (sft.py: "
                   "--max_length) or a smaller model")
    if "BackendCompilerFailed" in class_names(error):
        return 2, f"torch.compile failed ({first_line_of(error)}) — give --no-compile"
    if isinstance(error, FloatingPointError):  # of sample_ids
        return 3, (f"{error}: its training has diverged — use an earlier --step, or try a lower "
                   f"--lr in another --run")
    if is_lost_process(error):
        return 2, (f"another process has ended ({first_line_of(error)}) — see its message, then "
                   f"run again with --resume")
    return None, None


def open_closed_streams():
    """Give a closed stdout or stderr, as in `python train.py >&-`, the null device: otherwise the
    next file that is opened gets its number, and with it what libraries print."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def is_out_of_memory(error):
    """PyTorch has a class of its own for a GPU; on a CPU, and when a library of CUDA lacks memory,
    it raises a plain RuntimeError."""
    names = class_names(error)
    texts = ("allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    is_told = any(text in str(error) for text in texts)
    return "OutOfMemoryError" in names or "MemoryError" in names or is_told


def is_lost_process(error):
    """Whether an exchange between processes failed. PyTorch has a class of its own for NCCL and the
    network; gloo raises a plain RuntimeError."""
    names = class_names(error)
    return "DistError" in names or ("RuntimeError" in names and "/gloo/" in str(error))


def class_names(error):
    """The names of its class and their bases: this file does without PyTorch, which has some."""
    return [kind.__name__ for kind in type(error).__mro__]


def quoted(path):
    """A path as it can be pasted into a shell."""
    return shlex.quote(str(path))


def first_line_of(error):
    return str(error).split("\n")[0][:150]


@functools.cache  # so it is said once
def warn(text):
    """Print a line on stderr, if it is open."""
    with contextlib.suppress(OSError):
        print(f"note: {text}", file=sys.stderr, flush=True)


def parse_json(text):
    """The value of JSON text that may be damaged. Raises ValueError, whatever is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("too deeply nested") from None


# -------------------------------------------------------------------------------------------------
# The folder

OURS = ("checkpoints", "metrics.jsonl", "evaluations.jsonl", "trajectory.md", "dynamics.png",
        "story.png", "lm_eval", "base.pt", "base.json")


def due(step, every, last):
    """True at steps 0, 1, 2, 4, 8 …, at multiples of `every` (0: none) and at the `last` one.

    The one rule for evaluating, sampling, saving, and keeping weights: early learning is fast."""
    power_of_two = step & (step - 1) == 0  # and 0
    return power_of_two or step == last or (every > 0 and step % every == 0)


def claim(run, resume, overwrite):
    """Make the run folder and hold it until the script ends. Raises UserError if another process
    holds it, or if it holds a run and neither --resume nor --overwrite was given."""
    run.mkdir(parents=True, exist_ok=True)
    held = hold(run)
    AT_END.append(lambda code: os.close(held))
    used = (run / "metrics.jsonl").exists() or (run / "checkpoints").exists()
    if used and not resume and not overwrite:
        raise UserError(f"{run} already holds a run — continue it with --resume, start over with "
                        f"--overwrite, or choose another --run")


def hold(run):
    """Lock a run folder, and delete what a killed process left unfinished in it; returns the lock.
    Raises UserError if another process holds it."""
    held = lock(run / ".lock", f"{run} is in use by another process — wait for it, or choose "
                               f"another --run")
    for leftover in [*run.glob(".tmp_*"), *run.glob("checkpoints/.tmp_*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    return held


def lock(path, message):
    """Lock a folder, or a file that is made if necessary. It is unlocked by os.close(), and however
    the process ends. Raises UserError with the message if another process holds it."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    try:
        import fcntl  # not on Windows
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(message) from None
    except (ImportError, OSError):
        print(f"warning: {path} cannot be locked here; do not let two processes write into it at "
              f"once", file=sys.stderr)
    return handle


def start_over(run):
    """Delete an earlier run. Its checkpoints are renamed aside first, and all else after them, in
    the order of OURS: what a kill leaves is never resumed by mistake (and see `note`)."""
    aside = Path(tempfile.mkdtemp(prefix=".tmp_old_", dir=run))
    for name in OURS:
        if (run / name).exists():
            os.rename(run / name, aside / name)
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():  # a network drive keeps a file that is open
        warn(f"{aside}: not removed; it takes room, and is tried again at the next start")


def holds_steps(run):
    """Whether the run folder shows that training has begun."""
    log = run / "metrics.jsonl"
    return any(run.glob("checkpoints/step_*")) or log.exists() and b'"train"' in log.read_bytes()


def is_finished(run, state, max_steps):
    """Whether nothing is left to do in a run. `state`, from which it would be resumed, must be that
    of the last step, and the log must end with "done". (A run that was stopped at its last step
    still lacks an evaluation.)"""
    if state is None or state["step"] != max_steps:
        return False
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    try:
        row = parse_json(lines[-1])
        return row["event"] == "end" and row["reason"] == "done"
    except (IndexError, ValueError, KeyError, TypeError):
        return False


def newest_run(root="runs", pretrained=False):
    """The run folder whose checkpoints changed last; pretrained: only runs of train.py.

    Raises UserError if there is none."""
    runs = [folder.parent for folder in Path(root).glob("*/checkpoints")]
    if pretrained:
        runs = [run for run in runs
                if not is_tuned(run) and not has_setting(run, "imported_from")]
    if not runs:
        raise UserError(f"no runs in {root} — train one first: python train.py")
    return max(runs, key=lambda run: (run / "checkpoints").stat().st_mtime)


def is_tuned(run):
    """Whether sft.py made the run; its settings have a base."""
    return has_setting(run, "base")


def has_setting(run, name):
    try:
        return name in settings_of(run)
    except UserError:
        return False


def is_argument(value):
    """Whether a saved value can come from a command line: a path could not be opened otherwise."""
    try:
        return b"\0" not in os.fsencode(str(value))
    except UnicodeEncodeError:  # half a character
        return False


HOW_TO_GET_A_RUN = ("train one: python train.py; or, of a Hugging Face folder: python "
                    "convert_hf.py import FOLDER RUN")

# The settings that other scripts use, and their types.
READ_BY_OTHERS = {"data": str | None, "seq_len": int, "preset": str | None, "base": str | None,
                  "benchmark": str | None, "benchmark_items": int | None, "system": str | None,
                  "sample_prompt": str | None, "fingerprint": list | None, "max_length": int | None}


def settings_of(run):
    """The settings that `run` was trained with, from its config.json. Raises UserError."""
    run = Path(run)
    if not (run / "config.json").exists() and not (run / "checkpoints").exists():
        raise UserError(f"{run}: no such run — {HOW_TO_GET_A_RUN}")
    try:
        settings = parse_json((run / "config.json").read_bytes())
        for name, kind in READ_BY_OTHERS.items():
            value = settings.get(name)
            in_range = not isinstance(value, int) or 1 <= value <= 2**40
            if not isinstance(value, kind) or not in_range or not is_argument(value):
                raise TypeError
        for row in settings.get("fingerprint") or []:  # [name, tokens, hash]
            if not isinstance(row, list) or not row:
                raise TypeError
        return settings
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"{run}/config.json is missing, damaged or not of a run — training with "
                        f"--resume writes it again; if it is no run, {HOW_TO_GET_A_RUN}") from None


def trained_window(settings, longest):
    """Tokens of the longest window in which a run with these settings was trained. longest: what
    its network takes."""
    if "base" in settings:  # sft.py
        return settings.get("max_length") or longest
    return min(settings["seq_len"], longest)


# -------------------------------------------------------------------------------------------------
# The log

class Log:
    """metrics.jsonl and the screen. Without a run folder it is silent, as on every rank but 0."""

    def __init__(self, run, length, max_steps):
        """Open the log and cut it back to `length`, what it was when the state was saved. Raises
        UserError if the log is shorter than `length`, or if no line ends there."""
        self.file = None
        self.max_steps = max_steps
        self.peak_rate = None  # tokens/s if all of the hardware's FLOPs were used, where known
        self.step_seconds = []  # of the last steps
        self.slow_steps = 0  # in a row; −1 after the remark about them
        self.last_line = 0.0
        self.opened = time.monotonic()
        if run is None:
            return
        self.file = open(run / "metrics.jsonl", "a+b", buffering=0)
        self.file.seek(0)
        size = os.fstat(self.file.fileno()).st_size
        kept = self.file.read(min(length, size))
        fits = kept.endswith(b"\n") if length > 0 else size == 0  # 0: a new run
        if len(kept) != length or not fits:
            raise UserError(f"{self.file.name} was changed since the state to resume was saved — "
                            f"restore it, or start over with --overwrite")
        self.file.truncate(length)

    def event(self, event, step, **fields):
        """Append one JSON line, unbuffered. Raises UserError with code 4 if the disk does not take
        the whole line; the next resume cuts off the rest."""
        if self.file is None:
            return
        line = json_line({"event": event, "step": step, **fields})
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

    def end(self, step, reason):
        """The last row of a run: "done", "stopped" or "diverged"."""
        self.event("end", step, reason=reason, seconds=60 * self.minutes())

    def minutes(self):
        """Since the log was opened."""
        return (time.monotonic() - self.opened) / 60

    def train(self, step, tokens, loss, lr, grad_norm, seconds, tokens_in_step, skipped,
              memory=None, update_rms=None):
        """Log one training step; print it if it is one of the first or the last, or every 2 s.
        memory: the peak of a GPU's, in bytes; None on a CPU. update_rms: None if not asked for."""
        rate = tokens_in_step / seconds
        row = {"tokens": tokens, "loss": loss, "lr": lr, "grad_norm": grad_norm,
               "dt_ms": 1000 * seconds, "tok_per_s": rate}
        if self.peak_rate is not None:
            row["mfu"] = rate / self.peak_rate  # model FLOPs utilization
        if memory is not None:
            row["peak_memory"] = memory
        if update_rms is not None:
            row["update_rms"] = update_rms
        if skipped:
            row["skipped"] = True
        self.event("train", step, **row)
        self.step_seconds.append(seconds)
        del self.step_seconds[:-1000]  # enough, and fast to sort
        self.say_if_slow(seconds)
        if len(self.step_seconds) == 20:
            self.say(f"  at this speed the training steps take {self.minutes_left(step):.1f} more "
                     f"minutes; to end sooner: --max_steps, or Ctrl-C, which saves")
        recent = time.monotonic() - self.last_line < 2
        if recent and 4 < step < self.max_steps and not skipped:
            return
        self.last_line = time.monotonic()
        remark = " | fp16 overflow, update skipped" if skipped else ""
        left = ""
        if len(self.step_seconds) > 1:  # the first step, which may compile, tells nothing
            left = f" | {self.minutes_left(step):.1f} min left"
        self.say(f"step {step:>6}/{self.max_steps} | loss {loss:.4f} | lr {lr:.2e} | "
                 f"norm {grad_norm:.2f} | {1000 * seconds:.0f} ms | {rate / 1000:.1f}k tok/s"
                 f"{left}{remark}")

    def fastest(self):
        """Seconds of a step, of the fastest tenth of the last 1,000. Other programs can slow a step
        down, nothing speeds it up; and the first ones are slow."""
        return sorted(self.step_seconds)[len(self.step_seconds) // 10]

    def minutes_left(self, step):
        """How long the rest of the steps takes if they are as fast as the fastest."""
        return (self.max_steps - step) * self.fastest() / 60

    def say_if_slow(self, seconds):
        """Say it, once, if 20 steps in a row take more than twice as long as the fastest."""
        if self.slow_steps < 0:
            return
        self.slow_steps = self.slow_steps + 1 if seconds > 2 * self.fastest() else 0
        if self.slow_steps == 20:
            self.slow_steps = -1
            times = sum(self.step_seconds[-20:]) / 20 / self.fastest()
            self.say(f"  the last 20 steps took {times:.1f} times as long as "
                     f"the fastest: other programs use this machine. What helps on a CPU: close "
                     f"them, or stop, and go on with OMP_WAIT_POLICY=PASSIVE before the command")

    def length(self):
        """Bytes written so far, made sure to be on the disk; 0 without a file. Raises UserError as
        `event` does."""
        if self.file is None:
            return 0
        try:
            os.fsync(self.file.fileno())
        except OSError as error:  # some file systems only now find that the disk is full
            raise UserError(f"{self.file.name}: not written ({error.strerror}) — make room, then "
                            f"run again with --resume", code=4) from None
        return os.fstat(self.file.fileno()).st_size

    def say(self, text):
        """Print, on the process that has the log."""
        if self.file is not None:
            print_anyway(text)


def visible(text):
    """What a model says, for a terminal: control codes as signs, since they could move the cursor
    or change what the terminal does. As it is where stdout is something else."""
    return text.translate(SIGNS) if sys.stdout.isatty() else text


# Pictures of the control codes but for tab and line feed; U+FFFD for those that have none.
SIGNS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
SIGNS[127] = 0x2421
SIGNS.update(dict.fromkeys(range(0x80, 0xa0), 0xfffd))


def print_anyway(text):
    """Print. A closed terminal, or `| head`, is no reason to stop training."""
    try:
        print(visible(text), flush=True)
    except RuntimeError:
        pass  # a signal came while another print waits for the terminal: say, after Ctrl-S
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def json_line(row):
    """A row of a log, in bytes. JSON has no NaN or infinity: they become null."""
    plain = json.loads(json.dumps(row), parse_constant=lambda name: None)
    return json.dumps(plain).encode() + b"\n"


def shown(value):
    """A setting as text; a list without its brackets."""
    if isinstance(value, list):
        return " + ".join(map(str, value)) or "nothing"
    return str(value)


def changes(before, now, ignored):
    """How settings differ, as texts. Of a file of code, of which they have a hash, only that it
    does. ignored: names that do not matter."""
    found = []
    for name, value in now.items():
        old = before.get(name, "(not recorded)")  # by older code
        if name in ignored or old == value:
            continue
        if name.endswith(".py") and name in before:
            found.append(f"{name} (edited)")
        else:
            found.append(f"{name} {shown(old)} → {shown(value)}")
    return found


def as_text(values):
    """{name: value} in a line."""
    return ", ".join(f"{name} {value!r}" for name, value in values.items())


def beginning(run):
    """The first line of the run's log, with the time at which the run began: it tells a run from
    another one in the same folder. None without a log."""
    try:
        with open(run / "metrics.jsonl", "rb") as log:
            return log.readline()
    except OSError:
        return None


def note(run, event, began):
    """Append an event to the run's evaluations.jsonl, which no resume ever cuts.

    began: the `beginning` of the log when the weights were read. Raises UserError if the run was
    started over since: the score is not that of the run that is there now."""
    row = json_line({**event, "time": time.time()})
    with open(run / "evaluations.jsonl", "a+b") as file:
        # In this order. start_over() moves this file away after the log: if the log is still that
        # of the old run, then the file that we have opened is so too.
        if beginning(run) != began:
            raise UserError(f"{run} was started over in the meantime, so this is not noted there — "
                            f"evaluate the new run")
        file.seek(0, os.SEEK_END)
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # half a row, left by a full disk
                row = b"\n" + row
        file.write(row)
