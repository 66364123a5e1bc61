"""instructions.py — questions and answers in memory: instruction files, checked; as tokens; in batches of similar length.

Files are JSON (one array) or JSON lines, with a conversation a row, in Alpaca's form or as messages:

    {"instruction": "Name a colour.", "input": "", "output": "Red.", "split": "train"}         "input" and "split" may be left out
    {"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}, …]}
"""
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import encode_chat
from errors import UserError


# ---------------------------------------------------------------------------------------------------------------------
# Files

LONGEST = 1_000_000  # characters in one text; more is no example but a broken file
IGNORE = -100        # a target that is not counted, as in model.py
MULTIPLE = 32        # rows are padded to a multiple of this, so that few shapes occur and matrices divide well


def messages_of(row):
    """The conversation in a row of a file. Raises ValueError, in a few words, for what is none."""
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            raise ValueError('"messages" is no list of {"role", "content"}')
        messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    else:
        missing = [name for name in ("instruction", "output") if name not in row]
        if missing:
            raise ValueError(f'"{missing[0]}" is missing' if len(missing) == 1 else 'neither "messages" nor "instruction" and "output"')
        question, more = row["instruction"], "" if row.get("input") is None else row["input"]
        if not isinstance(question, str) or not isinstance(more, str):
            raise ValueError('"instruction" or "input" is no text')
        if not question.strip():
            raise ValueError('"instruction" is empty')
        messages = [{"role": "user", "content": f"{question}\n{more}" if more.strip() else question}, {"role": "assistant", "content": row["output"]}]
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns or len(turns) % 2 or [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError('its roles are not "user" and "assistant" in turn (after an optional "system"), ending with an answer')
    for message in messages:
        text, what = message["content"], {"assistant": "an answer", "user": "a question", "system": "the system prompt"}[message["role"]]
        if not isinstance(text, str):
            raise ValueError(f"{what} is no text")
        if not text.strip() and what != "the system prompt":
            raise ValueError(f"{what} is empty")
        if len(text) > LONGEST:
            raise ValueError(f"{what} has {len(text):,} characters, more than {LONGEST:,}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{what} holds half a character (a lone surrogate)") from None
    return messages


def read_rows(path):
    """Yields (place, row) for each row of the file, place being "FILE:LINE" or "FILE, row INDEX" (from 0); where a line does
    not read as JSON the row is the ValueError. Raises UserError where an array does not read, or where the file is one object."""
    data, mend = Path(path).read_bytes(), "mend it (--skip_bad cannot help: the file is one JSON array)"
    if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        if is_one_object(data):
            raise UserError(f"{path}:1: one JSON object over several lines — give an array of rows, or a row on each line")
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                try:
                    row = read_json(line)
                except ValueError as why:
                    row = why
                yield f"{path}:{number}", row
        return
    try:
        rows = read_json(data)
    except ValueError as why:
        raise UserError(f"{path}{why.args[1] if len(why.args) > 1 else ''}: {why.args[0]} — {mend}") from None
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def read_json(data):
    """What the bytes say. Raises ValueError(why, ":LINE")."""
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError("starts with a byte-order mark, save it as UTF-8 without one", ":1")
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8", f":{data[:error.start].count(10) + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} at column {error.colno})", f":{error.lineno}") from None
    except (ValueError, RecursionError):
        raise ValueError("no JSON that can be read (too deep, or with a number too long)", "") from None


def is_one_object(data):
    """Whether the bytes are a single JSON object, written over several lines."""
    try:
        return b"\n" in data.strip() and isinstance(read_json(data), dict)
    except ValueError:
        return False


def read_instructions(path, skip_bad=False):
    """(chats, splits, bad): the conversations of a file, for each its "split" or None, and how many rows are bad.
    Raises UserError with file and line or index at the first bad row, unless skip_bad; and where nothing is left."""
    chats, splits, bad = [], [], 0
    for place, row in read_rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            messages, split = messages_of(row), row.get("split")
            if not isinstance(split, str | None):
                raise ValueError('"split" is no text')
            chats.append(messages)
            splits.append(split)
        except ValueError as why:
            if not skip_bad:
                raise UserError(f"{place}: {why.args[0]} — mend the row, or leave out all bad ones with --skip_bad") from None
            bad += 1
    if not chats:
        raise UserError(f"{path}: no conversation in it{f', all {bad} rows are bad' if bad else ''} — give a file of instructions and answers")
    return chats, splits, bad


def hold_out(splits, share, seed):
    """(rows to train on, rows to hold out): as their "split" says if any row has one, else a random share of them, at least
    one of two or more."""
    if any(splits):
        held = np.array([bool(split) and split != "train" for split in splits])
        return np.flatnonzero(~held), np.flatnonzero(held)
    n = len(splits)
    held = min(n - 1, max(1, round(share * n))) if share else 0
    order = np.random.RandomState(seed).permutation(n)
    return np.sort(order[held:]), np.sort(order[:held])


def file_mark(path):
    """What the file is, for the checkpoint: [bytes, SHA-256]. It may go by another name."""
    data = Path(path).read_bytes()
    return [len(data), hashlib.sha256(data).hexdigest()]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

class Examples:
    """Conversations as rows of tokens. A row reads all its tokens but the last and predicts all but the first; counted are
    those that belong to an answer.

    A row longer than max_length is cut where that leaves of an answer at least one token, else skipped: `cut`, `skipped` say
    how many; `kept` says which conversations the rows are; `whole` which rows were not cut."""

    def __init__(self, chats, tokenizer, system, max_length, progress=False):
        self.max_length, self.cut, self.skipped = max_length, 0, 0
        self.ids, self.is_answer, self.kept, self.whole = [], [], [], []
        for number, messages in enumerate(tqdm(chats, desc="tokenizing", disable=None if progress else True, leave=False)):
            ids, is_answer = encode_chat(tokenizer, messages, system)
            is_answer = np.array(is_answer[:max_length + 1])
            counted = np.flatnonzero(is_answer)
            if not len(counted):
                self.skipped += 1
                continue
            end = counted[-1] + 1  # a question after the last answer would be read for nothing
            self.cut += len(ids) > max_length + 1
            self.whole.append(len(ids) <= max_length + 1)
            self.ids.append(np.array(ids[:end], dtype=np.uint16))
            self.is_answer.append(is_answer[:end])
            self.kept.append(number)
        self.lengths = np.array([len(ids) - 1 for ids in self.ids], dtype=int)              # tokens read, per row
        self.targets = np.array([row[1:].sum() for row in self.is_answer], dtype=int)       # targets counted, per row
        self.padded = np.minimum(-(-self.lengths // MULTIPLE) * MULTIPLE, max_length)

    def __len__(self):
        return len(self.ids)

    def read(self, rows):
        """tokens and targets of these rows, both (len(rows), T) int64: T is the longest of them, rounded up to a multiple of 32.
        Padding is on the right, where causal attention never looks, and it is known by its place, not by its id: its targets,
        like those that belong to questions, are −100."""
        T = self.padded[rows].max()
        tokens, targets = np.zeros((len(rows), T), dtype=np.int64), np.full((len(rows), T), IGNORE, dtype=np.int64)
        for place, row in enumerate(rows):
            n, ids = self.lengths[row], self.ids[row].astype(np.int64)
            tokens[place, :n] = ids[:-1]
            targets[place, :n] = np.where(self.is_answer[row][1:], ids[1:], IGNORE)
        return tokens, targets


class Batches:
    """The rows of each step: a pure function of the seed and the step. In an epoch each row comes once; a batch holds rows of
    similar length, as many as batch_size or one less; and the batches come in random order."""

    def __init__(self, examples, batch_size, seed):
        self.examples, self.seed = examples, seed
        self.per_epoch = -(-len(examples) // batch_size)

    @functools.lru_cache(maxsize=2)
    def _epoch(self, epoch):
        random = np.random.RandomState([self.seed, epoch])  # its stream is frozen by NumPy's compatibility policy
        order = random.permutation(len(self.examples))
        # Sorted by the padded length and not by the length: rows that cost the same stay in random order.
        order = order[np.argsort(self.examples.padded[order], kind="stable")]
        batches = np.array_split(order, self.per_epoch)
        return [batches[i] for i in random.permutation(self.per_epoch)]

    def of_step(self, step):
        """Rows that the update from `step` to step + 1 learns from."""
        epoch, place = divmod(step, self.per_epoch)
        return self._epoch(epoch)[place]

    def useful(self, micro_batch):
        """Share of the tokens of the first epoch's micro-batches that is no padding."""
        cost = sum(len(rows) * self.examples.padded[rows].max() for batch in self._epoch(0)
                   for rows in (batch[i:i + micro_batch] for i in range(0, len(batch), micro_batch)))
        return self.examples.lengths.sum() / cost
