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
from support.chat import (IGNORE, SYSTEM, Batches, Examples, chat_pieces, encode_chat, hold_out,
                          messages_of, most_frequent_answer, read_instructions)
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
    """Catches: another template than the one FastChat renders, a space or an end-of-text apart."""
    ids, is_answer = encode_chat(GPT2, TALK)
    assert GPT2.decode(ids) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: Hi there "
        "ASSISTANT: Hello.<|endoftext|>USER: Why? ASSISTANT: No idea.\nSorry<|endoftext|>")
    assert ids.count(GPT2.eot) == 2
    assert len(ids) == len(is_answer)


def test_mask_covers_answers_and_their_end():
    """Catches: a mask off by one token, or an end-of-text that is not learned."""
    ids, is_answer = encode_chat(GPT2, TALK)
    answers = [i for i, answer in zip(ids, is_answer) if answer]
    first = GPT2.encode(" Hello.")
    second = GPT2.encode(" No idea.\nSorry")
    assert answers == [*first, GPT2.eot, *second, GPT2.eot]


def test_prompt_is_the_beginning_of_the_example():
    """Catches: a question that is asked in other tokens than those it was learned in."""
    ids, _ = encode_chat(GPT2, TALK)
    prompt, is_answer = encode_chat(GPT2, TALK[:1])
    assert prompt == ids[:len(prompt)]
    assert not any(is_answer)
    assert GPT2.decode(prompt).endswith("USER: Hi there ASSISTANT:")
    with_a_space, _ = encode_chat(GPT2, [user("Hi there ")])
    assert with_a_space != prompt  # control


def test_system_prompt_begins_the_conversation():
    """Catches: a system prompt that is not used, or that wins over the one in the row."""
    own = {"role": "system", "content": "Be long."}
    assert chat_pieces([user("a")], "Be brief.") == [("Be brief. USER: a ASSISTANT:", False)]
    assert chat_pieces([own, user("a")], "Be brief.") == [("Be long. USER: a ASSISTANT:", False)]
    assert chat_pieces([user("a")], "") == [("USER: a ASSISTANT:", False)]
    once = chat_pieces(TALK, "S.")
    assert [text.count("S. ") for text, _ in once] == [1, 0, 0, 0]


def test_endoftext_in_a_text_is_plain_text():
    """Catches: a question or an answer that ends its turn by the letters "<|endoftext|>"."""
    ids, is_answer = encode_chat(GPT2, [user("<|endoftext|>"), assistant("<|endoftext|> x")])
    assert ids.count(GPT2.eot) == 1
    assert ids[-1] == GPT2.eot
    assert is_answer[-1]


def test_alpaca_input_follows_the_instruction():
    """Catches: an "input" that is lost, or an empty one that leaves a line break."""
    def question(**row):
        return messages_of({"instruction": "Add.", "output": "3", **row})[0]["content"]

    assert question(input="1 2") == "Add.\n1 2"
    assert question(input="") == "Add."
    assert question(input=None) == "Add."
    assert question() == "Add."


# -------------------------------------------------------------------------------------------------
# Rows of tokens

def test_targets_are_the_next_tokens_of_answers(examples):
    """Catches: a target beside the next token, a question that counts, padding that counts."""
    rows = np.array([0, 17, 30, 5])  # of different lengths; row 30 has two answers
    inputs, targets = examples.read(rows)
    assert inputs.shape == targets.shape
    assert inputs.shape[1] % 32 == 0
    for place, row in enumerate(rows):
        ids, is_answer = encode_chat(Tokenizer(300), examples.chats[row], "S.")
        padding = inputs.shape[1] - (len(ids) - 1)
        wanted = np.where(is_answer[1:], ids[1:], IGNORE).tolist()
        assert inputs[place].tolist() == ids[:-1] + [0] * padding
        assert targets[place].tolist() == wanted + [IGNORE] * padding
        assert wanted != [IGNORE] * len(wanted)  # control


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
    examples = Examples([[*chat, *chat]], LETTERS, "", len(ids) + 3)
    assert examples.cut == 1
    assert examples.whole == [False]
    assert examples.lengths.tolist() == [len(ids) - 1]
    assert examples.targets.tolist() == [sum(is_answer)]
    complete = Examples([[*chat, *chat]], LETTERS, "", 200)
    assert complete.targets.tolist() == [2 * sum(is_answer)]  # control


def test_skipped_rows_do_not_shift_the_others():
    """Catches: tokens and lengths of one row beside the conversation of another."""
    long = [user("long " * 20), assistant("a")]
    short = [user("b"), assistant("c")]
    examples = Examples([long, short], LETTERS, "", 40)
    assert examples.skipped == 1
    assert examples.chats == [short]
    assert LETTERS.decode(examples.ids[0].tolist()).startswith("USER: b ASSISTANT: c")


# -------------------------------------------------------------------------------------------------
# Held out, and batches

def conversation(question, answer="Yes."):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def different(n):
    return [conversation(f"Is it {i}?") for i in range(n)]


def test_split_decides_what_is_held_out():
    """Catches: rows of a "split" that are trained on all the same, or held out without reason."""
    training, held_out = hold_out(different(5), ["train", "val", None, "test", ""], 0.5, seed=0)
    assert training.tolist() == [0, 2, 4]
    assert held_out.tolist() == [1, 3]


def test_without_split_a_random_share_is_held_out():
    """Catches: a share of the wrong size, a row on both sides, a draw that ignores the seed."""
    chats = different(50)
    training, held_out = hold_out(chats, [None] * 50, 0.1, seed=0)
    assert len(held_out) == 5
    assert sorted([*training, *held_out]) == list(range(50))
    assert hold_out(chats, [None] * 50, 0.1, seed=0)[1].tolist() == held_out.tolist()
    assert hold_out(chats, [None] * 50, 0.1, seed=1)[1].tolist() != held_out.tolist()  # control


@pytest.mark.parametrize("n, share, sizes", [
    (1, 0.5, [1, 0]),    # the only row is trained on
    (2, 0.01, [1, 1]),   # at least one of two
    (9, 0, [9, 0]),
    (3, 0.9, [1, 2]),    # at least one is trained on
])
def test_few_rows_are_still_divided(n, share, sizes):
    """Catches: nothing left to train on, or nothing to score."""
    parts = hold_out(different(n), [None] * n, share, seed=0)
    assert [len(part) for part in parts] == sizes


@pytest.mark.row(43)
def test_repeated_rows_are_on_one_side():
    """Catches: rows that are scored and trained on, as copies, or as copies but for white space or
    the system prompt."""
    chats = different(20) * 3
    training, held_out = hold_out(chats, [None] * 60, 0.2, seed=0)
    assert sorted(row % 20 for row in [*training, *held_out]) == list(range(20))
    assert len(held_out) == 4

    system = {"role": "system", "content": "S."}
    chats = [conversation("A  b?\n"), conversation("C?"), [system, *conversation("A b?")],
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
    """Catches: a row that is left out or comes twice, a batch that is too large."""
    for epoch in (0, 1):
        batches = epoch_of(examples, epoch, seed=3)
        assert sorted(sum(batches, [])) == list(range(len(examples)))
        assert {len(batch) for batch in batches} <= {3, 4}


def test_batches_follow_from_seed_and_step(examples):
    """Catches: an order that depends on what was read before, so that a resume reads other rows."""
    first = epoch_of(examples, 0, seed=3)
    assert first == epoch_of(examples, 0, seed=3)
    assert first != epoch_of(examples, 1, seed=3)  # control: another epoch
    assert first != epoch_of(examples, 0, seed=4)  # control: another seed
    batches = Batches(examples, 4, seed=3)
    batches.of_step(20)
    assert batches.of_step(2).tolist() == first[2]


def test_batches_come_in_random_order(examples):
    """Catches: batches sorted by length, so that an epoch begins with all the short answers."""
    costs = [examples.padded[batch].mean() for batch in epoch_of(examples, 0, seed=3)]
    assert costs != sorted(costs)
    assert costs != sorted(costs, reverse=True)


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


def tokens_of(examples, parts):
    """The number of tokens of these micro-batches, with their padding."""
    return sum(examples.read(part)[0].size for part in parts)


def test_batches_are_90_percent_useful():
    """Catches: long rows beside short ones, so that most of a batch is padding."""
    rows = alpaca_like(3000)
    assert 750 < len(json.dumps(rows)) / len(rows) < 870
    examples = Examples([messages_of(row) for row in rows], GPT2, SYSTEM, 1024)
    batches = Batches(examples, 128, seed=0)
    parts = []
    for step in range(batches.per_epoch):
        batch = batches.of_step(step)
        parts += [batch[start:start + 8] for start in range(0, len(batch), 8)]
    text = examples.lengths.sum()
    assert batches.useful(8) >= 0.9
    assert batches.useful(8) == pytest.approx(text / tokens_of(examples, parts))
    mixed = np.array_split(np.random.RandomState(0).permutation(3000), 375)
    assert text / tokens_of(examples, mixed) < 0.6  # control: batches of any lengths


@pytest.mark.slow
def test_50000_rows_are_read_in_seconds(tmp_path):
    """Catches: a step per row that is so slow that a file of 50,000 rows takes minutes."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(alpaca_like(50_000)))
    start = time.monotonic()
    chats, _, _, _ = read_instructions(file)
    examples = Examples(chats, GPT2, SYSTEM, 1024)
    batches = Batches(examples, 128, seed=0)
    for step in range(batches.per_epoch):
        for part in np.array_split(batches.of_step(step), 16):
            examples.read(part)
    seconds = time.monotonic() - start
    print(f"{len(examples)} rows, {examples.lengths.sum():,} tokens in {seconds:.1f} s; "
          f"{batches.useful(8):.1%} are not padding")
    assert seconds < 20
    assert batches.useful(8) >= 0.9


def test_most_frequent_answer():
    """Catches: questions that are counted as answers, or a share of the rows."""
    yes = [user("no"), assistant("yes"), user("no"), assistant("no")]
    assert most_frequent_answer([yes, yes[:2]]) == ("yes", 2 / 3)


# -------------------------------------------------------------------------------------------------
# Bad files

GOOD = {"instruction": "a?", "output": "b"}
GOOD_LINE = json.dumps(GOOD)

NOT_JSON = {
    "half a row": ('{"instruction": "a?", "output"', "not valid JSON"),
    "too deep": ('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", "too deeply nested"),
    "a long number": ('{"instruction": "a", "output": ' + "9" * 5000 + "}", "not valid JSON"),
}
NOT_A_CHAT = {
    "a list": ("[1]", "not a JSON object"),
    "a number": ("7", "not a JSON object"),
    "no output": ('{"instruction": "a?"}', '"output" is missing (or give "messages")'),
    "unknown": ('{"q": 1}', '"instruction" is missing (or give "messages")'),
    "empty answer": ('{"instruction": "a?", "output": " "}', "an answer is empty"),
    "empty question": ('{"instruction": "", "output": "b"}', "a question is empty"),
    "answer 3": ('{"instruction": "a?", "output": 3}', "an answer must be a string"),
    "question list": ('{"instruction": ["a"], "output": "b"}', '"input" must be strings'),
    "NaN": ('{"instruction": "a", "input": NaN, "output": "b"}', '"input" must be strings'),
    "false": ('{"instruction": "a", "input": false, "output": "b"}', '"input" must be strings'),
    "surrogate": ('{"instruction": "a", "output": "\\ud800"}', "a lone surrogate"),
    "messages text": ('{"messages": "hi"}', '"messages" must be a list of'),
    "no messages": ('{"messages": []}', '"messages" must be a list of'),
    "no role": ('{"messages": [{"content": "a"}]}', '"messages" must be a list of'),
    "role bot": ('{"messages": [{"role": "bot", "content": "a"}]}', "the roles must be"),
    "role list": ('{"messages": [{"role": ["user"], "content": "a"}]}', "the roles must be"),
    "no answer": (json.dumps({"messages": [user("a")]}), "ending with an answer"),
    "two questions": (json.dumps({"messages": [user("a"), user("b")]}), "in turn"),
    "question 3": (json.dumps({"messages": [user(3), assistant("b")]}),
                   "a question must be a string"),
    "split list": ('{"instruction": "a?", "output": "b", "split": ["val"]}',
                   '"split" must be a string'),
    "a giant": (json.dumps({**GOOD, "output": "b" * 1_000_001}),
                "an answer has 1,000,001 characters, more than 1,000,000"),
}


def refusal(file):
    """The message with which a file is refused."""
    with pytest.raises(UserError) as error:
        read_instructions(file)
    assert error.value.code == 2
    return str(error.value)


@pytest.mark.row(27)
@pytest.mark.parametrize("line, why", (NOT_JSON | NOT_A_CHAT).values(),
                         ids=(NOT_JSON | NOT_A_CHAT).keys())
def test_bad_line_is_named_with_its_reason(tmp_path, line, why):
    """Catches: a traceback, a message without the line, a row that is left out silently."""
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{GOOD_LINE}\n\n{line}\n{GOOD_LINE}\n")
    message = refusal(file)
    assert f"{file}, line 3: " in message
    assert why in message
    assert "--skip_bad" in message
    chats, splits, bad, _ = read_instructions(file, skip_bad=True)
    assert bad == 1
    assert chats == [messages_of(GOOD)] * 2  # control: the others are read
    assert splits == [None, None]
    file.write_text(line)
    with pytest.raises(UserError, match="all 1 rows are bad"):
        read_instructions(file, skip_bad=True)


@pytest.mark.row(27)
@pytest.mark.parametrize("row, why", NOT_A_CHAT.values(), ids=NOT_A_CHAT.keys())
def test_bad_row_of_an_array_is_named_by_its_index(tmp_path, row, why):
    """Catches: a message that does not tell which row of an array it is about."""
    file = tmp_path / "rows.json"
    file.write_text(f"[{GOOD_LINE},\n{row}]")
    message = refusal(file)
    assert f"{file}, row 1: " in message
    assert why in message
    assert read_instructions(file, skip_bad=True)[2] == 1
    file.write_text(f"[{GOOD_LINE},\n{GOOD_LINE}]")
    assert read_instructions(file)[2] == 0  # control


LATIN = b'{"instruction": "\xff", "output": "b"}'  # not UTF-8


@pytest.mark.row(27)
@pytest.mark.parametrize("content, place, why", [
    (GOOD_LINE.encode() + b"\n" + LATIN, ", line 2: ", "not valid UTF-8"),
    (b"[" + GOOD_LINE.encode() + b",\n" + LATIN + b"]", ": ", "not valid UTF-8 (line 2)"),
    (b"[" + GOOD_LINE.encode() + b",\n{]", ": ", "line 2"),
    (b"[" + GOOD_LINE.encode(), ": ", "not valid JSON"),
    (json.dumps({"data": [GOOD]}, indent=1).encode(), ", line 1: ", "not valid JSON"),
    ("[1]".encode("utf-16"), ", line 1: ", "not valid UTF-8"),
    (b"", ": ", "no conversation in it"),
    (b"[]", ": ", "no conversation in it"),
    (b"\n \n", ": ", "no conversation in it"),
], ids=["bytes in a line", "bytes in an array", "broken array",
        "half an array", "object over lines", "UTF-16", "empty", "empty array", "blank"])
def test_bad_file_is_named_with_its_reason(tmp_path, content, place, why):
    """Catches: a traceback of json, a message without file and line, a run without rows."""
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    message = refusal(file)
    assert message.startswith(f"{file}{place}")
    assert why in message
    file.write_bytes(GOOD_LINE.encode())
    assert read_instructions(file)[0] == [messages_of(GOOD)]  # control


PACKED = {
    "plain": lambda content: content,
    "byte-order mark": lambda content: b"\xef\xbb\xbf" + content,
    "gzip": gzip.compress,
    "Windows": lambda content: content.replace(b"\n", b"\r\n"),
}


@pytest.mark.row(67)
@pytest.mark.parametrize("pack", PACKED)
@pytest.mark.parametrize("is_array", [True, False], ids=["array", "lines"])
def test_every_reader_reads_alike(tmp_path, pack, is_array):
    """Catches: a byte-order mark, gzip or line ends that one reader takes and another refuses."""
    question = {"ctx": "a", "endings": ["b", "c"], "label": 1, "text": "words", **GOOD}
    rows = [question, {**question, "text": None}]
    text = json.dumps(rows, indent=1)
    if not is_array:
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
    file = tmp_path / "rows.json"
    file.write_bytes(PACKED[pack](text.encode()))
    assert read_instructions(file)[0] == [messages_of(GOOD)] * 2
    assert Benchmark(file, GPT2, 64).labels.tolist() == [1, 1]
    assert list(textfiles.read_pieces(file, None)) == [("words", True)]
    (first, found, share), = tables.read_rows(file, ("text",))
    assert (first, [row for _, row in found], share) == (0, [{"text": "words"}, {}], 1)


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
    row = {**GOOD, "system": "Be brief.", "history": [["c?", "d"], ["e?", "f"]]}
    assert messages_of(row) == [system("Be brief."), user("c?"), assistant("d"), user("e?"),
                                assistant("f"), user("a?"), assistant("b")]
    row = {"messages": [user("a?"), assistant("b")], "system": "Be brief."}
    assert messages_of(row) == [system("Be brief."), user("a?"), assistant("b")]
    for bad, why in ((dict(history=[["c?"]]), "a list of .question, answer."),
                     (dict(history="c?"), "a list of .question, answer."),
                     (dict(history=[["c?", 3]]), "an answer must be a string"),
                     (dict(system=3), "the system prompt must be a string"),
                     (dict(messages=[system("A."), *row["messages"]], system="B."), "beside")):
        with pytest.raises(ValueError, match=why):
            messages_of({**GOOD, **bad})


@pytest.mark.row(56)
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False, "weight": None}])
def test_answers_that_do_not_count_are_read_and_not_learned(mark):
    """Catches: an answer that is marked as not to be learned, and is a target all the same."""
    marked = {"messages": [user("a?"), {**assistant("b"), **mark}, user("c?"), assistant("d")]}
    plain = {"messages": [user("a?"), assistant("b"), user("c?"), assistant("d")]}
    ids, counts = encode_chat(GPT2, messages_of(marked), "S.")
    whole, learned = encode_chat(GPT2, messages_of(plain), "S.")
    assert ids == whole
    assert sum(learned) == 4  # control: two tokens in each answer
    assert np.flatnonzero(counts).tolist() == np.flatnonzero(learned).tolist()[2:]
    with pytest.raises(ValueError, match="a mark of a message .* must be 0 or 1"):
        messages_of({"messages": [user("a?"), {**assistant("b"), "weight": "0"}]})


@pytest.mark.row(56, 58)
def test_fields_that_are_not_read_are_counted(tmp_path):
    """Catches: a null that hides good fields; tool calls that are left out without a word."""
    call = {**assistant("b"), "tool_calls": [1], "name": None}
    rows = [{**GOOD, "messages": None, "id": 7, "history": None, "system": None, "input": None},
            {"messages": [user("a?"), call], "instruction": None, "output": "x", "id": 8}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    chats, _, bad, unread = read_instructions(file)
    assert chats == [messages_of(GOOD)] * 2
    assert bad == 0
    assert unread == {"id": 2, "messages.tool_calls": 1, "output": 1}
    file.write_text(json.dumps([GOOD]))
    assert read_instructions(file)[3] == {}  # control


@pytest.mark.row(27)
def test_array_and_lines_give_the_same_rows(tmp_path):
    """Catches: a form of the file in which a row, or its "split", is lost."""
    rows = [GOOD, {**GOOD, "split": "val"}, {"messages": TALK}]
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows))
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_instructions(array)
    assert found == read_instructions(lines)
    assert found == ([messages_of(GOOD), messages_of(GOOD), TALK], [None, "val", None], 0, {})
