"""errors.py — a mistake that the user can mend is one line on stderr and an exit code, never a traceback."""
import functools
import os
import sys
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
        if sys.stdout:  # None where it was closed
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
