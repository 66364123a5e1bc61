"""encode.py — texts into token ids, on all cores, in order."""
import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial

import numpy as np

from corpus.textfiles import PIECE_SIZE
from support.runs import UserError

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
def interrupts_held_back():
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode(text, starts, tokenizer=None):
    """The ids of a piece, (n,) uint16, after end-of-text if a document begins with it."""
    tokenizer = tokenizer or worker_tokenizer
    ids = tokenizer.encode_array(text)
    if starts:
        return np.concatenate((np.array([tokenizer.eot], dtype=np.uint16), ids))
    return ids


def encode_in_worker(pieces):
    return [encode(text, starts) for text, starts in pieces]


def encode_all(batches, tokenizer, parallel):
    """Yield (items, ids of each) for all batches, in order; ids as from `encode`.

    batches: lists of (item, text, starts). parallel: in processes, one for each core. (Threads are
    not enough: on two cores they were 1.6 times as fast as one, two processes 1.9 times.)"""
    if not parallel:
        for batch in batches:
            items = [item for item, _, _ in batch]
            yield items, [encode(text, starts, tokenizer) for _, text, starts in batch]
        return
    cores = os.cpu_count()
    # Enough for a second, in which a shard is written, and so few that they fit in memory.
    most = max(128, 4 * cores)
    context = multiprocessing.get_context("spawn")  # a fork would take our locks along
    make_tokenizer = partial(type(tokenizer), tokenizer.vocab_size)
    workers = ProcessPoolExecutor(cores, context, start_worker, (make_tokenizer,))
    try:
        running = deque()  # (items, future), oldest first
        for batch in batches:
            items = [item for item, _, _ in batch]
            pieces = [(text, starts) for _, text, starts in batch]
            with interrupts_held_back():  # a new process inherits this: a Ctrl-C is for this one
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
