"""progress.py — tqdm's bars; in a log file a line a minute in their place."""
import sys

import tqdm as library

MINUTE = 60  # seconds


class Lines:
    """Standard error, with a new line for each state of a bar."""

    def write(self, text):
        text = text.strip()
        if text:
            sys.stderr.write(f"{text}\n")

    def flush(self):
        sys.stderr.flush()


def tqdm(*args, **options):
    """tqdm's bar, with its arguments. Where standard error is not a terminal it shows nothing in
    the first minute, and then a line in each: a file keeps what a terminal would overwrite."""
    if not sys.stderr.isatty():
        options = {"file": Lines(), "delay": MINUTE, "mininterval": MINUTE, "maxinterval": MINUTE,
                   **options}
    return library.tqdm(*args, **options)
