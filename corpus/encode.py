"""encode.py — texts into token ids, on all cores, in order."""
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial

import numpy as np

from corpus.textfiles import PIECE_SIZE
from support.runs import UserError, first_line_of, warn

worker_tokenizer = None  # of this process, if it is a worker


def start_worker(make_tokenizer):
    """Prepare a worker process: its tokenizer, and that it ends when this process does."""
    global worker_tokenizer
    worker_tokenizer = make_tokenizer()
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def as_worker():
    """Within it a process that starts ignores Ctrl-C, which is for its parent, and does not run the
    user's script again: that may be a notebook, standard input, or a file without the line `if
    __name__ == "__main__":`."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    can_block = hasattr(signal, "pthread_sigmask")  # not on Windows
    if can_block:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def usable_cores():
    """The cores that this process may use: fewer than the machine has in a container or a job."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def encode(text, starts, tokenizer=None):
    """The ids of a piece, (n,) uint16, after end-of-text if a document begins with it."""
    tokenizer = tokenizer or worker_tokenizer
    ids = tokenizer.encode_array(text)
    if starts:
        return np.concatenate((np.array([tokenizer.eot], dtype=np.uint16), ids))
    return ids


def encode_in_worker(pieces):
    return [encode(text, starts) for text, starts in pieces]


def start_workers(tokenizer):
    """A pool of processes, one for each core; None where the system has no means for it, or one
    core."""
    cores = usable_cores()
    if cores == 1:
        return None
    context = multiprocessing.get_context("spawn")  # a fork would take our locks along
    make_tokenizer = partial(type(tokenizer), tokenizer.vocab_size)
    try:
        return ProcessPoolExecutor(cores, context, start_worker, (make_tokenizer,))
    except (ImportError, NotImplementedError, OSError) as error:  # no semaphores
        warn(f"no other processes here ({first_line_of(error)}), so one encodes")
        return None


def encode_all(batches, tokenizer, parallel):
    """Yield (items, ids of each) for all batches, in order; ids as from `encode`.

    batches: lists of (item, text, starts). parallel: in processes, one for each core. (Threads are
    not enough: on two cores they were 1.6 times as fast as one, two processes 1.9 times.)"""
    workers = start_workers(tokenizer) if parallel else None
    if workers is None:
        for batch in batches:
            items = [item for item, _, _ in batch]
            yield items, [encode(text, starts, tokenizer) for _, text, starts in batch]
        return
    # Enough for a second, in which a shard is written, and so few that they fit in memory.
    most = max(128, 4 * usable_cores())
    try:
        running = deque()  # (items, future), oldest first
        for batch in batches:
            items = [item for item, _, _ in batch]
            pieces = [(text, starts) for _, text, starts in batch]
            with as_worker():
                running.append((items, workers.submit(encode_in_worker, pieces)))
            if len(running) > most:
                items, future = running.popleft()
                yield items, future.result()
        for items, future in running:
            yield items, future.result()
    except BrokenExecutor:
        raise UserError("a process that encodes was killed, perhaps for lack of memory — close "
                        "other programs, and run the same command again") from None
    finally:
        workers.shutdown(cancel_futures=True)


def batched(pieces, size=PIECE_SIZE // 4):
    """Yield the pieces (item, text, starts) in lists of about `size` characters."""
    batch = []
    waiting = 0
    for piece in pieces:
        batch.append(piece)
        waiting += len(piece[1])
        if waiting >= size:
            yield batch
            batch = []
            waiting = 0
    if batch:
        yield batch
