"""chat.py — conversations: the template, instruction files, rows of tokens, batches.

A file is JSON (one array) or JSON lines. Each row is a conversation, in Alpaca's form or as
messages:

    {"instruction": "Name a color.", "input": "", "output": "Red.", "split": "train",
     "system": "You paint.", "history": [["Hello.", "Hi."], …]}
    {"messages": [{"role": "user", "content": "Name a color."},
                  {"role": "assistant", "content": "Red."}, …]}

In Alpaca's form only "instruction" and "output" are needed. "history" are earlier questions and
answers. A message with "weight": 0 (or "train", "training" or "loss": false) is read, and not
learned.
"""
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

from support.files import sha256_of
from support.progress import tqdm
from support.rows import read_json_rows
from support.runs import UserError

# -------------------------------------------------------------------------------------------------
# The template of Vicuna 1.1, as FastChat renders it:
#     SYSTEM USER: question ASSISTANT: answer<eot>USER: question ASSISTANT: answer<eot>

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


def chat_pieces(messages, system=SYSTEM):
    """A conversation as pieces [(text, is_answer), …], to be encoded one by one.

    messages: [{"role", "content"}, …], "user" and "assistant" in turn, a "system" may come first.
    If the last one is a question, the text ends with "ASSISTANT:", without a space: the space is
    part of the first token of the answer."""
    if messages[0]["role"] == "system":
        system = messages[0]["content"]
        messages = messages[1:]
    pieces = []
    before = f"{system} " if system else ""
    for message in messages:
        if message["role"] == "user":
            pieces.append((f"{before}USER: {message['content']} ASSISTANT:", False))
            before = ""
        else:
            pieces.append((f" {message['content']}", True))
    return pieces


def encode_chat(tokenizer, messages, system=SYSTEM):
    """(ids, counts): the tokens of a conversation, and for each whether it is to be learned: those
    of an answer are, with the end-of-text after it, unless its message has "counts": False. All
    text is plain: "<|endoftext|>" in a question or an answer ends nothing."""
    marks = [message.get("counts", True) for message in messages if message["role"] != "system"]
    ids = []
    counts = []
    for (text, is_answer), mark in zip(chat_pieces(messages, system), marks):
        piece = tokenizer.encode(text)
        if is_answer:
            piece.append(tokenizer.eot)
        ids += piece
        counts += [is_answer and mark] * len(piece)
    return ids, counts


# The same in Jinja, for the programs that read a Hugging Face folder. SYSTEM stands for the system
# prompt as a string. There is nothing to add for an answer: " ASSISTANT:" belongs to the question.
JINJA = """\
{%- set ns = namespace(before=SYSTEM) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.before = message['content'] + ' ' if message['content'] else '' -%}
{%- elif message['role'] == 'user' -%}
{{- ns.before + 'USER: ' + message['content'] + ' ASSISTANT:' -}}
{%- set ns.before = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] + eos_token -}}
{%- else -%}
{{- raise_exception('the roles are system, user and assistant') -}}
{%- endif -%}
{%- endfor -%}
"""


def jinja_template(system):
    """The template as text, with a default system prompt."""
    before = f"{system} " if system else ""
    return JINJA.replace("SYSTEM", json.dumps(before, ensure_ascii=False))


def system_of(template):
    """The system prompt of a template that `jinja_template` made; None of another one."""
    start, end = JINJA.split("SYSTEM")
    if not template.startswith(start) or not template.endswith(end):
        return None
    try:
        before = json.loads(template[len(start):-len(end)])
    except ValueError:
        return None
    return before.removesuffix(" ")


# -------------------------------------------------------------------------------------------------
# Instruction files

LONGEST = 1_000_000  # characters of one text; a longer one is a broken file, not an example
BESIDE_MESSAGES = ("messages", "system", "split")  # what is read of a row that has messages
FIELDS = ("instruction", "input", "output", "history", *BESIDE_MESSAGES)
MARKS = ("weight", "train", "training", "loss")  # of a message: 0 or false if it is not learned


def read_instructions(path, skip_bad=False):
    """(chats, splits, bad, unread): the conversations of a file, the "split" of each or None, how
    many rows are bad, and a Counter of the fields that are not read.

    Raises UserError naming line or index of the first bad row, unless skip_bad; also if nothing is
    left."""
    chats = []
    splits = []
    bad = 0
    unread = Counter()
    for place, row, _ in read_json_rows(path):
        try:
            messages = messages_of(row)
        except ValueError as why:
            if not skip_bad:
                raise UserError(f"{place}: {why} — fix the row, or leave out all bad rows with "
                                f"--skip_bad") from None
            bad += 1
            continue
        chats.append(messages)
        splits.append(row.get("split"))
        unread.update(unread_in(row))
    if not chats:
        reason = f", all {bad} rows are bad" if bad else ""
        raise UserError(f"{path}: no conversation in it{reason} — give a file of instructions and "
                        f"answers")
    return chats, splits, bad, unread


def unread_in(row):
    """The names of what `messages_of` does not read of a row. (null is as if it were absent.)"""
    read = FIELDS if row.get("messages") is None else BESIDE_MESSAGES
    names = {name for name, value in row.items() if value is not None and name not in read}
    for message in row.get("messages") or []:
        names |= {f"messages.{name}" for name, value in message.items()
                  if value is not None and name not in ("role", "content", *MARKS)}
    return names


def messages_of(row):
    """The conversation in a row. Raises ValueError telling why a row is not one."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    row = {name: value for name, value in row.items() if value is not None}
    if not isinstance(row.get("split", ""), str):
        raise ValueError('"split" must be a string')
    messages = read_messages(row["messages"]) if "messages" in row else read_alpaca(row)
    if row.get("system", "") != "":  # "" is how tables say that a row has none
        messages.insert(0, {"role": "system", "content": row["system"]})
    turns = [message["role"] for message in messages]
    if turns[0] == "system":
        turns = turns[1:]
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError('the roles must be "user" and "assistant" in turn (a "system" may come '
                         'first, or be a field of its own), ending with an answer')
    for message in messages:
        check_text(message)
    return messages


def read_messages(found):
    """The list under "messages", reduced to role and content, and "counts": False if it has one of
    the MARKS."""
    is_list = isinstance(found, list) and found and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in found)
    if not is_list:
        raise ValueError('"messages" must be a list of {"role", "content"}')
    messages = []
    for message in found:
        messages.append({"role": message["role"], "content": message["content"]})
        marks = [message[name] for name in MARKS if message.get(name) is not None]
        if any(mark not in (0, 1) for mark in marks):  # True and False are 1 and 0
            raise ValueError(f"a mark of a message ({', '.join(MARKS)}) must be 0 or 1")
        if 0 in marks:
            messages[-1]["counts"] = False
    return messages


def read_alpaca(row):
    """Alpaca's form as messages: the "input", if there is one, is a second line of the question."""
    for name in ("instruction", "output"):
        if name not in row:
            raise ValueError(f'"{name}" is missing (or give "messages")')
    question = row["instruction"]
    context = row.get("input", "")
    if not isinstance(question, str) or not isinstance(context, str):
        raise ValueError('"instruction" and "input" must be strings')
    if question.strip() and context.strip():
        question = f"{question}\n{context}"
    history = row.get("history", [])
    is_list = isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 for turn in history)
    if not is_list:
        raise ValueError('"history" must be a list of [question, answer]')
    messages = []
    for asked, answer in [*history, [question, row["output"]]]:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    return messages


NAMES = {"user": "a question", "assistant": "an answer", "system": "the system prompt"}


def check_text(message):
    """Raise ValueError unless the content of a message is a text that can be trained on."""
    name = NAMES[message["role"]]
    text = message["content"]
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string")
    if not text.strip() and message["role"] != "system":
        raise ValueError(f"{name} is empty")
    if len(text) > LONGEST:
        raise ValueError(f"{name} has {len(text):,} characters, more than {LONGEST:,}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} contains half a character (a lone surrogate)") from None


def hold_out(chats, splits, share, seed):
    """(rows to train on, rows held out), as two arrays of row numbers.

    If any row has a "split", all but "train" are held out; otherwise a random share, at least one
    of two or more rows. What is scored must not be trained on: of rows that repeat a conversation
    only one remains, a held-out one if there is one; and no row is trained on that begins like a
    held-out one and goes on, or that a held-out one goes on from."""
    held = np.array([(split or "train").strip().lower() != "train" for split in splits])
    words = [words_of(messages) for messages in chats]
    order = np.argsort(~held, kind="stable")              # held-out rows first
    first = {words[row]: row for row in reversed(order)}  # of those that repeat, the first one
    rows = np.sort(list(first.values()))
    if any(splits):
        is_held = held[rows]
    else:
        count = min(len(rows) - 1, max(1, round(share * len(rows)))) if share > 0 else 0
        drawn = np.random.RandomState(seed).permutation(len(rows))[:count]
        is_held = np.isin(np.arange(len(rows)), drawn)
    held_out = rows[is_held]
    scored = {words[row] for row in held_out}  # the held-out conversations
    begun = set()                              # these, and how they begin
    for row in held_out:
        begun.update(beginnings(words[row]))
    training = [row for row in rows[~is_held]
                if words[row] not in begun and scored.isdisjoint(beginnings(words[row]))]
    return np.array(training, dtype=int), held_out


def beginnings(words):
    """A conversation after one answer, after two, and so on."""
    return [words[:n] for n in range(2, len(words) + 1, 2)]


def words_of(messages):
    """The questions and answers of a conversation, whatever the white space in them."""
    return tuple(" ".join(message["content"].split()) for message in messages
                 if message["role"] != "system")


def file_fingerprint(path):
    """What the file is, for the checkpoint: [bytes, SHA-256]. Its name does not matter."""
    return [Path(path).stat().st_size, sha256_of(path)]


def most_frequent_answer(chats):
    """(the answer that occurs most often, its share of all answers)."""
    answers = Counter()
    for messages in chats:
        answers.update(m["content"] for m in messages if m["role"] == "assistant")
    answer, n = answers.most_common(1)[0]
    return answer, n / answers.total()


# -------------------------------------------------------------------------------------------------
# Tokens

IGNORE = -100  # a target that does not count, as in model.py
MULTIPLE = 32  # rows are padded to a multiple of this, so that few shapes occur


class Examples:
    """Conversations as rows of tokens. A row reads all its tokens but the last and predicts all but
    the first; those that belong to an answer count.

    A row longer than max_length is cut if at least one token of an answer remains; otherwise it is
    skipped. `cut` and `skipped` are their numbers. For each row, `chats` has its conversation,
    `whole` whether it was not cut, `lengths` the tokens that it reads, `targets` those that
    count, `padded` the tokens that it reads with its padding."""

    def __init__(self, chats, tokenizer, system, max_length, progress=False):
        self.max_length = max_length
        self.skipped = 0
        self.chats = []
        self.whole = []
        self.ids = []
        self.counts = []
        for messages in tqdm(chats, desc="tokenizing", disable=not progress, leave=False):
            ids, counts = encode_chat(tokenizer, messages, system)
            fits = len(ids) <= max_length + 1  # the last token is predicted, not read
            counts = np.array(counts[:max_length + 1])
            counted = np.flatnonzero(counts)
            if len(counted) == 0:
                self.skipped += 1
                continue
            end = counted[-1] + 1  # a question after the last answer would be read for nothing
            self.chats.append(messages)
            self.whole.append(fits)
            self.ids.append(np.array(ids[:end]))
            self.counts.append(counts[:end])
        self.cut = self.whole.count(False)
        self.lengths = np.array([len(ids) - 1 for ids in self.ids], dtype=int)
        self.targets = np.array([row[1:].sum() for row in self.counts], dtype=int)
        padded = np.ceil(self.lengths / MULTIPLE).astype(int) * MULTIPLE
        self.padded = np.minimum(padded, max_length)

    def __len__(self):
        return len(self.ids)

    def read(self, rows):
        """(inputs, targets) of these rows, both (len(rows), T) int64; T is that of the longest.

        Padding is on the right, where causal attention never looks. It is known by its place, not
        by its id. Its targets, like those that belong to questions, are −100."""
        T = self.padded[rows].max()
        inputs = np.zeros((len(rows), T), dtype=np.int64)
        targets = np.full((len(rows), T), IGNORE, dtype=np.int64)
        for place, row in enumerate(rows):
            n = self.lengths[row]
            ids = self.ids[row]
            inputs[place, :n] = ids[:-1]
            targets[place, :n] = np.where(self.counts[row][1:], ids[1:], IGNORE)
        return inputs, targets


class Batches:
    """The rows of each step: a pure function of the seed and the step.

    In an epoch each row is read once. A batch holds rows of similar length; all batches have the
    same number of rows, up to one, and at most batch_size; they come in random order."""

    def __init__(self, examples, batch_size, seed):
        self.examples = examples
        self.seed = seed
        self.per_epoch = math.ceil(len(examples) / batch_size)
        self.epoch = None  # whose batches are in memory
        self.batches = []

    def of_step(self, step):
        """The rows that the update from `step` to step + 1 learns from."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.batches = self.of_epoch(epoch)
            self.epoch = epoch
        return self.batches[place]

    def of_epoch(self, epoch):
        # The stream of RandomState is frozen by NumPy's compatibility policy.
        random = np.random.RandomState([self.seed, epoch])
        order = random.permutation(len(self.examples))
        # Sorted by the padded length: rows that cost the same stay in random order.
        order = order[np.argsort(self.examples.padded[order], kind="stable")]
        batches = np.array_split(order, self.per_epoch)
        return [batches[i] for i in random.permutation(self.per_epoch)]

    def useful(self, micro_batch):
        """The share of the tokens in the first epoch's micro-batches that are not padding."""
        tokens = 0
        for batch in self.of_epoch(0):
            for start in range(0, len(batch), micro_batch):
                rows = batch[start:start + micro_batch]
                tokens += len(rows) * self.examples.padded[rows].max()
        return self.examples.lengths.sum() / tokens
