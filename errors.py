"""errors.py — a mistake that the user can mend is one line on stderr and an exit code, never a traceback."""
import functools
import os
import sys
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Says what is wrong, where, and what to do next. `code` is the exit code of the script (2: bad usage or data)."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def script(main):
    """Decorator for a script's `main(argv=None)`: a UserError, or a file that the system refuses, ends in one line."""
    @functools.wraps(main)
    def wrapped(argv=None):
        name = Path(sys.modules[main.__module__].__file__).name
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows fewer characters than the model shows "?"
        try:
            return main(argv)
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            sys.exit(error.code)
        except BrokenPipeError:  # the reader of our output left, as in `python sample.py | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except KeyboardInterrupt:  # where nothing is lost by it; train.py, which has a state to save, catches its own
            sys.exit(130)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""  # a full disk comes without a name
            print(f"{name}: {where}{error.strerror or error} — check the path, its permissions and the disk", file=sys.stderr)
            sys.exit(2)
    return wrapped


@contextmanager
def memory_advice(settings, accumulation):
    """Turn "out of memory" into the next smaller micro-batch that still divides the step."""
    import torch
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; on the CPU it is a plain one
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        B = settings["micro_batch"]
        advice = [f"--micro_batch {n}" for n in range(B - 1, 0, -1) if B * accumulation % n == 0] + ["a smaller --preset or --seq_len"]
        raise UserError(f"out of memory with micro_batch {B} x seq_len {settings['seq_len']} — use {advice[0]}") from None
