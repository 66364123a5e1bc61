"""support/chat.py: the template, instruction files, rows of tokens, batches."""
import gzip
import json
import os
import threading
import time

import numpy as np
import pytest

from conftest import INSTRUCTIONS
from corpus import tables, textfiles
from data import Tokenizer
from evaluate import Benchmark
from support.chat import (
    IGNORE,
    SYSTEM,
    Batches,
    Examples,
    encode_chat,
    hold_out,
    messages_of,
    most_frequent_answer,
    read_instructions,
)
from support.runs import UserError

GPT2 = Tokenizer()
LETTERS = Tokenizer(257)  # one token a byte


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


@pytest.fixture(scope="module")
def examples():
    chats = [messages_of(row) for row in INSTRUCTIONS]
    return Examples(chats, Tokenizer(300), "S.", 64)


# -------------------------------------------------------------------------------------------------
# The template

TALK = [user("Hi there"), assistant("Hello."), user("Why?"), assistant("No idea.\nSorry")]


def test_chat_template_is_vicuna():
    """Catches: another template than the one FastChat renders, a space or an end-of-text apart; a
    mask off by one token, or an end-of-text that is not learned; a question that is asked in other
    tokens than those it was learned in."""
    ids, is_answer = encode_chat(GPT2, TALK)
    assert GPT2.decode(ids) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: Hi there "
        "ASSISTANT: Hello.<|endoftext|>USER: Why? ASSISTANT: No idea.\nSorry<|endoftext|>")
    answers = [i for i, answer in zip(ids, is_answer) if answer]
    first = GPT2.encode(" Hello.")
    second = GPT2.encode(" No idea.\nSorry")
    assert answers == [*first, GPT2.eot, *second, GPT2.eot]
    prompt, is_answer = encode_chat(GPT2, TALK[:1])
    assert prompt == ids[:len(prompt)]
    assert not any(is_answer)


def test_alpaca_input_follows_the_instruction():
    """Catches: an "input" that is lost, or an empty one that leaves a line break."""
    def question(**row):
        return messages_of({"instruction": "Add.", "output": "3", **row})[0]["content"]

    assert question(input="1 2") == "Add.\n1 2"
    assert question(input="") == question() == "Add."


# -------------------------------------------------------------------------------------------------
# Rows of tokens

def test_long_row_is_cut_or_skipped_and_counted():
    """Catches: a row that loses its whole answer and is still counted as read, or is lost without
    being counted."""
    chat = [user("abc"), assistant("defghi")]
    ids, is_answer = encode_chat(LETTERS, chat, "")
    first = is_answer.index(True)  # a window of that many tokens predicts it
    for window in range(first - 2, len(ids) + 2):
        fits = window >= first
        whole = window >= len(ids) - 1  # the last token is predicted, not read
        examples = Examples([chat], LETTERS, "", window)
        assert len(examples) == fits
        assert examples.skipped == (not fits)
        assert examples.cut == (fits and not whole)
        if fits:
            inputs, targets = examples.read(np.array([0]))
            assert inputs.shape[1] <= window
            assert (targets != IGNORE).sum() == min(window, len(ids) - 1) - first + 1


def test_question_after_the_last_answer_is_not_read():
    """Catches: a row cut within its second question that still costs the tokens of it."""
    chat = [user("abc"), assistant("defghi")]
    ids, is_answer = encode_chat(LETTERS, chat, "")
    for window, answers in ((len(ids) + 3, 1), (200, 2)):
        examples = Examples([[*chat, *chat]], LETTERS, "", window)
        assert examples.whole == [answers == 2]
        assert examples.lengths.tolist() == [answers * len(ids) - 1]
        assert examples.targets.tolist() == [answers * sum(is_answer)]


# -------------------------------------------------------------------------------------------------
# Held out, and batches

def conversation(question, answer="Yes."):
    return [user(question), assistant(answer)]


def different(n):
    return [conversation(f"Is it {i}?") for i in range(n)]


def test_split_decides_what_is_held_out():
    """Catches: rows of a "split" that are trained on all the same, or held out without reason."""
    training, held_out = hold_out(different(5), ["train", "val", None, "test", ""], 0.5, seed=0)
    assert training.tolist() == [0, 2, 4]
    assert held_out.tolist() == [1, 3]


def test_without_split_a_random_share_is_held_out():
    """Catches: a share of the wrong size, a row on both sides, a draw that ignores the seed;
    nothing left to train on, or nothing to score."""
    chats = different(50)
    training, held_out = hold_out(chats, [None] * 50, 0.1, seed=0)
    assert len(held_out) == 5
    assert sorted([*training, *held_out]) == list(range(50))
    assert hold_out(chats, [None] * 50, 0.1, seed=1)[1].tolist() != held_out.tolist()  # control
    for n, share, expected in ((1, 0.5, 0), (2, 0.01, 1), (3, 0.9, 2)):
        training, held_out = hold_out(different(n), [None] * n, share, seed=0)
        assert len(held_out) == expected
        assert len(training) == n - expected


@pytest.mark.row(43)
def test_repeated_rows_are_on_one_side():
    """Catches: rows that are scored and trained on, as copies, or as copies but for white space or
    the system prompt."""
    chats = different(20) * 3
    training, held_out = hold_out(chats, [None] * 60, 0.2, seed=0)
    assert sorted(row % 20 for row in [*training, *held_out]) == list(range(20))
    assert len(held_out) == 4

    chats = [conversation("A  b?\n"), conversation("C?"), [system("S."), *conversation("A b?")],
             conversation("A b?", "No.")]
    training, held_out = hold_out(chats, ["train", None, "test", "train"], 0.2, seed=0)
    assert held_out.tolist() == [2]  # it stays what it was before the copy
    assert training.tolist() == [1, 3]  # control: another answer is another row

    more = [*conversation("A?"), *conversation("And?")]
    chats = [conversation("A?"), more, conversation("B?"), [*more, *conversation("So?")]]
    training, held_out = hold_out(chats, ["train", "val", "train", " Train"], 0.2, seed=0)
    assert held_out.tolist() == [1]
    assert training.tolist() == [2]  # not how the conversation begins, nor how it goes on


def epoch_of(examples, epoch, seed):
    """The batches of an epoch, as lists of rows."""
    batches = Batches(examples, 4, seed)
    first = epoch * batches.per_epoch
    return [batches.of_step(step).tolist() for step in range(first, first + batches.per_epoch)]


def test_each_epoch_reads_each_row_once(examples):
    """Catches: a row that is left out or comes twice, a batch that is too large; batches sorted by
    length, so that an epoch begins with all the short answers; an order that depends on what was
    read before, so that a resume reads other rows."""
    found = epoch_of(examples, 1, seed=3)
    assert sorted(sum(found, [])) == list(range(len(examples)))
    assert {len(batch) for batch in found} <= {3, 4}
    costs = [examples.padded[batch].mean() for batch in found]
    assert costs != sorted(costs)
    assert costs != sorted(costs, reverse=True)
    batches = Batches(examples, 4, seed=3)
    batches.of_step(20)
    assert batches.of_step(batches.per_epoch + 2).tolist() == found[2]
    assert found != epoch_of(examples, 0, seed=3)  # control: another epoch
    assert found != epoch_of(examples, 1, seed=4)  # control: another seed


WORDS = ("the of a and to is in that for as with return value array function list element number "
         "text model token").split()


def alpaca_like(n):
    """n rows as long as those of alpaca-cleaned: 51,760 rows in 42 MB of JSON, 811 bytes a row."""
    draw = np.random.RandomState(0)

    def text(length):
        return " ".join(WORDS[i] for i in draw.randint(0, len(WORDS), length))

    rows = []
    for i in range(n):
        context = text(15) if i % 3 == 0 else ""
        length = max(3, int(draw.lognormal(4.6, 0.8)))
        rows.append({"instruction": text(12), "input": context, "output": text(length)})
    return rows


@pytest.mark.parametrize("n", [3000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_batches_are_90_percent_useful(tmp_path, n):
    """Catches: long rows beside short ones, so that most of a batch is padding; a step per row that
    is so slow that a file of 50,000 rows takes minutes."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(alpaca_like(n)))
    start = time.monotonic()
    chats, _, _, _ = read_instructions(file)
    examples = Examples(chats, GPT2, SYSTEM, 1024)
    batches = Batches(examples, 128, seed=0)
    tokens = 0  # read, with the padding
    for step in range(batches.per_epoch):
        batch = batches.of_step(step)
        for first in range(0, len(batch), 8):
            tokens += examples.read(batch[first:first + 8])[0].size
    seconds = time.monotonic() - start
    text = examples.lengths.sum()
    print(f"{len(examples)} rows, {text:,} tokens in {seconds:.1f} s; "
          f"{batches.useful(8):.1%} are not padding")
    assert seconds < 30
    assert batches.useful(8) >= 0.9
    assert batches.useful(8) == pytest.approx(text / tokens)
    mixed = np.random.RandomState(0).permutation(n).reshape(-1, 8)
    tokens = sum(examples.read(rows)[0].size for rows in mixed)
    assert text / tokens < 0.6  # control: batches of any lengths


def test_most_frequent_answer():
    """Catches: questions that are counted as answers, or a share of the rows."""
    yes = [user("no"), assistant("yes"), user("no"), assistant("no")]
    assert most_frequent_answer([yes, yes[:2]]) == ("yes", 2 / 3)


# -------------------------------------------------------------------------------------------------
# Bad files

GOOD = {"instruction": "a?", "output": "b"}
GOOD_LINE = json.dumps(GOOD)

BAD_ROWS = {
    '{"instruction": "a?", "output"': "not valid JSON",
    '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}": "too deeply nested",
    '{"instruction": "a", "output": ' + "9" * 5000 + "}": "not valid JSON",
    "[1]": "not a JSON object",
    '{"instruction": "a?"}': '"output" is missing (or give "messages")',
    '{"instruction": "a?", "output": " "}': "an answer is empty",
    '{"instruction": "", "output": "b"}': "a question is empty",
    '{"instruction": "a?", "output": 3}': "an answer must be a string",
    '{"instruction": "a", "input": NaN, "output": "b"}': '"input" must be strings',
    '{"instruction": "a", "output": "\\ud800"}': "a lone surrogate",
    '{"messages": []}': '"messages" must be a list of',
    '{"messages": [{"content": "a"}]}': '"messages" must be a list of',
    '{"messages": [{"role": ["user"], "content": "a"}]}': "the roles must be",
    json.dumps({"messages": [user("a")]}): "ending with an answer",
    json.dumps({**GOOD, "split": ["val"]}): '"split" must be a string',
    json.dumps({**GOOD, "output": "b" * 1_000_001}): "has 1,000,001 characters",
    json.dumps({**GOOD, "history": [["c?"]]}): "a list of [question, answer]",
    json.dumps({**GOOD, "system": 3}): "the system prompt must be a string",
    json.dumps({"messages": [system("A."), *TALK], "system": "B."}): "the roles must be",
    json.dumps({"messages": [user("a?"), {**assistant("b"), "weight": "0"}]}): "must be 0 or 1",
}


def refusal(file):
    """The message with which a file is refused."""
    with pytest.raises(UserError) as error:
        read_instructions(file)
    assert error.value.code == 2
    return str(error.value)


@pytest.mark.row(27)
@pytest.mark.parametrize("row", BAD_ROWS, ids=BAD_ROWS.values())
def test_bad_row_is_refused_with_its_reason(tmp_path, row):
    """Catches: a traceback, a message without the line, a row that is left out silently."""
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{GOOD_LINE}\n\n{row}\n{GOOD_LINE}\n")
    message = refusal(file)
    assert f"{file}, line 3: " in message
    assert BAD_ROWS[row] in message
    assert "--skip_bad" in message
    chats, splits, bad, _ = read_instructions(file, skip_bad=True)
    assert bad == 1
    assert chats == [messages_of(GOOD)] * 2  # control: the others are read
    assert splits == [None, None]


LATIN = b'{"instruction": "\xff", "output": "b"}'  # not UTF-8
BAD_FILES = {
    GOOD_LINE.encode() + b"\n" + LATIN: ", line 2: not valid UTF-8",
    b"[" + GOOD_LINE.encode() + b",\n" + LATIN + b"]": ": not valid UTF-8 (line 2)",
    b"[" + GOOD_LINE.encode(): ": not valid JSON",
    b"[" + GOOD_LINE.encode() + b", {}]": ', row 1: "instruction" is missing',
    json.dumps({"data": [GOOD]}, indent=1).encode(): ", line 1: not valid JSON",
    b"\n \n": ": no conversation in it",
}


@pytest.mark.row(27)
def test_bad_file_is_refused_with_its_reason(tmp_path):
    """Catches: a traceback of json, a message without the place, a run without rows."""
    file = tmp_path / "rows.json"
    for content, why in BAD_FILES.items():
        file.write_bytes(content)
        assert refusal(file).startswith(f"{file}{why}")
    file.write_text("{}")
    with pytest.raises(UserError, match="all 1 rows are bad"):
        read_instructions(file, skip_bad=True)


PACKED = {
    "plain": lambda content: content,
    "byte-order mark": lambda content: b"\xef\xbb\xbf" + content,
    "gzip": gzip.compress,
    "Windows": lambda content: content.replace(b"\n", b"\r\n"),
}


@pytest.mark.row(27, 67)
@pytest.mark.parametrize("pack", PACKED)
def test_every_reader_reads_alike(tmp_path, pack):
    """Catches: a byte-order mark, gzip or line ends that one reader takes and another refuses; a
    form of the file in which a row, or its "split", is lost."""
    row = {"ctx": "a", "endings": ["b", "c"], "label": 1, "text": "words", **GOOD}
    rows = [row, {**row, "text": None, "split": "val"}]
    file = tmp_path / "rows.json"
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    for text in (lines, json.dumps(rows, indent=1)):
        file.write_bytes(PACKED[pack](text.encode()))
        chats, splits, _, _ = read_instructions(file)
        assert chats == [messages_of(GOOD)] * 2
        assert splits == [None, "val"]
        assert Benchmark(file, GPT2, 64).labels.tolist() == [1, 1]
        assert list(textfiles.read_pieces(file, None)) == [("words", True)]
        (_, found, _), = tables.read_rows(file, ("text",))
        assert [row for _, row in found] == [{"text": "words"}, {}]


@pytest.mark.row(67)
def test_questions_from_a_pipe(tmp_path):
    """Catches: a reader that opens a file twice, and so loses the beginning of a pipe."""
    pipe = tmp_path / "rows"
    os.mkfifo(pipe)
    row = json.dumps({"ctx": "a", "endings": ["b", "c"], "label": 1})
    writer = threading.Thread(target=pipe.write_text, args=(f"{row}\n" * 3,), daemon=True)
    writer.start()
    assert Benchmark(pipe, GPT2, 64).labels.tolist() == [1, 1, 1]


@pytest.mark.row(56)
def test_row_has_its_own_system_prompt_and_history():
    """Catches: a conversation that is trained on without its beginning."""
    row = {**GOOD, "system": "S.", "history": [["c?", "d"], ["e?", "f"]]}
    assert messages_of(row) == [system("S."), user("c?"), assistant("d"), user("e?"),
                                assistant("f"), user("a?"), assistant("b")]


@pytest.mark.row(56)
@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False, "weight": None}])
def test_answers_that_do_not_count_are_read_and_not_learned(mark):
    """Catches: an answer that is marked as not to be learned, and is a target all the same."""
    marked = [TALK[0], {**TALK[1], **mark}, *TALK[2:]]
    ids, counts = encode_chat(GPT2, messages_of({"messages": marked}))
    whole, learned = encode_chat(GPT2, TALK)
    assert ids == whole
    second = len(encode_chat(GPT2, TALK[:2])[0])
    assert counts == [False] * second + learned[second:]
    assert any(learned[:second])  # control


@pytest.mark.row(56, 58)
def test_fields_that_are_not_read_are_counted(tmp_path):
    """Catches: a null that hides good fields; tool calls that are left out without a word."""
    call = {**assistant("b"), "tool_calls": [1], "name": None}
    rows = [{**GOOD, "messages": None, "id": 7, "history": None, "system": None, "input": None},
            {"messages": [user("a?"), call], "instruction": None, "output": "x", "id": 8}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    chats, _, _, unread = read_instructions(file)
    assert chats == [messages_of(GOOD)] * 2
    assert unread == {"id": 2, "messages.tool_calls": 1, "output": 1}
