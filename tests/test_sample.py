"""sample.py: continuations, the trajectory of a run, and the chat with a tuned model."""
import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import sample
from conftest import exit_code, messages, rows
from data import Tokenizer
from model import Llama
from support import runs
from support.chat import encode_chat
from support.runs import UserError

GPT2 = Tokenizer()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# -------------------------------------------------------------------------------------------------
# Continuations

def test_streamed_characters_are_whole():
    """Catches: a character of two tokens that is printed as two broken ones."""
    tokenizer = Tokenizer(300)
    first, second = tokenizer.encode("é")

    class Model(torch.nn.Linear):
        def generate(self, *args):
            return iter(torch.tensor([[first], [second], [tokenizer.eot]]))

    args = SimpleNamespace(temperature=1, top_k=None, top_p=None)
    pieces = sample.stream(Model(1, 1), tokenizer, [1], 9, args, None)
    assert list(pieces) == ["", "é", ""]
    assert tokenizer.decode([first]) == "\ufffd"  # control: piece by piece it would break


def continuation(whole, capsys, *flags):
    """What sample.py prints about a prompt that holds a special token's name."""
    argv = [whole, "--prompt", "Zürich <|endoftext|>", "--max_new_tokens", 40, *flags]
    assert not exit_code(sample.main, argv)
    return capsys.readouterr().out


def test_same_seed_gives_the_same_text(whole, capsys):
    """Catches: a seed that is not used, samples that are all the same, a prompt that is changed."""
    text = continuation(whole, capsys, "--samples", 2)
    assert text.startswith("Zürich <|endoftext|>")
    first, second = text.split("\n---\n")
    assert first != second.rstrip("\n")
    assert continuation(whole, capsys, "--samples", 2, "--seed", 0) == text
    assert continuation(whole, capsys, "--samples", 2, "--seed", 1) != text  # control


@pytest.mark.row(39)
@pytest.mark.parametrize("prompt, note", [
    ("", ""),
    ("long " * 100, "the model reads the last 64"),
    ("\udcff", ""),  # a byte that is not UTF-8
], ids=["empty", "longer than the window", "not UTF-8"])
def test_any_prompt_is_continued(whole, capsys, prompt, note):
    """Catches: a traceback for a prompt that nobody thought of."""
    argv = [whole, "--prompt", prompt, "--max_new_tokens", "3"]
    assert not exit_code(sample.main, argv)
    out, err = capsys.readouterr()
    assert out.startswith(prompt.replace("\udcff", "?"))
    assert note in err
    assert (err == "") == (note == "")  # control: no note without a reason


@pytest.mark.parametrize("flags, why", [
    (["--step", 7], "no checkpoint of step 7"),
    (["--temperature", -1], "out of range"),
    (["--top_p", 0], "out of range"),
    (["--system", "S."], "--system is for --chat"),
    (["--chat", "--prompt", "x"], "--chat reads questions"),
    (["--chat", "--samples", 2], "--chat reads questions"),
    (["--chat", "--trajectory"], "--chat reads questions"),
    (["--trajectory", "--step", 8], "one sample at every step"),
    (["--trajectory", "--samples", 2], "one sample at every step"),
])
def test_mistake_in_the_flags_is_one_line(whole, capsys, flags, why):
    """Catches: a traceback, or a flag that is accepted and then ignored."""
    assert exit_code(sample.main, [whole, *flags]) == 2
    line, = messages(capsys)
    assert why in line


# -------------------------------------------------------------------------------------------------
# The trajectory

def samples(run):
    """The samples that sample.py has appended to a run's evaluations.jsonl."""
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_trajectory_is_what_the_run_itself_sampled(whole, tmp_path, capsys):
    """Catches: the same checkpoint for every step, other random numbers or another prompt than
    those of the run's own samples, a damaged checkpoint that ends it."""
    run = tmp_path / "r"
    shutil.copytree(whole, run)
    (run / "checkpoints/step_00000004/model.pt").write_bytes(b"?")
    assert not exit_code(sample.main, [run, "--trajectory"])
    assert "step_00000004 is damaged" in capsys.readouterr().err
    found = {row["step"]: row["text"] for row in samples(run)}
    own = dict(rows(run, "sample", ("step", "text")))
    del own[4]
    assert found == own
    assert list(found) == [0, 1, 2, 8, 16, 20]
    assert len(set(found.values())) > 3  # control: other weights, other words
    for row in samples(run):
        assert row["prompt"] == "The"
        assert row["seed"] == 0


@pytest.fixture
def autocast(monkeypatch):
    """Whether autocast was on, in each computation of logits."""
    seen = []
    logits = Llama.logits

    def watched(model, hidden):
        seen.append(torch.is_autocast_enabled("cpu"))
        return logits(model, hidden)
    monkeypatch.setattr(Llama, "logits", watched)
    return seen


@pytest.mark.parametrize("flags", [["--trajectory"], ["--prompt", "a"], ["--chat"]])
def test_dtype_is_used_wherever_text_is_made(tuned, tmp_path, monkeypatch, autocast, flags):
    """Catches: a --dtype without effect in one of the three ways to use sample.py, or that a
    trajectory does not tell."""
    run = tmp_path / "r"
    shutil.copytree(tuned, run)
    for dtype in ("bf16", "fp32"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a?\n"))
        assert not exit_code(sample.main, [run, *flags, "--dtype", dtype, "--max_new_tokens", 4])
        assert set(autocast) == {dtype == "bf16"}  # fp32: the control
        autocast.clear()
    if flags == ["--trajectory"]:
        noted = [row["dtype"] for row in samples(run)]
        half = len(noted) // 2
        assert noted == ["bf16"] * half + ["fp32"] * half


def test_trajectory_depends_on_the_seed(whole, tmp_path):
    """Catches: a seed that is noted beside the samples and not used."""
    texts = {}
    for seed in (0, 1):
        run = tmp_path / str(seed)
        shutil.copytree(whole, run)
        assert not exit_code(sample.main, [run, "--trajectory", "--seed", seed])
        texts[seed] = [row["text"] for row in samples(run)]
        assert {row["seed"] for row in samples(run)} == {seed}
    assert texts[0] != texts[1]


@pytest.mark.row(64)
def test_text_longer_than_the_windows_of_training_is_said(whole, capsys):
    """Catches: text behind the windows of training, of 16 tokens, without a word; by default none
    is behind them."""
    tokenizer = checkpoint.load_model(whole)[1]
    for flags, said in (([], False), (["--max_new_tokens", 40], True)):
        assert not exit_code(sample.main, [whole, "--prompt", "a b", "--top_k", 1, *flags])
        out, err = capsys.readouterr()
        assert ("trained in windows of 16 tokens" in err) == said
        assert (len(tokenizer.encode(out)) > 17) == said


@pytest.mark.row(70)
def test_control_codes_are_signs_on_a_terminal(monkeypatch):
    """Catches: a model that moves the cursor of the terminal; text that is changed in a file."""
    text = "a\x1b[2J\x07\x7f\x9b\n\té"
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: False))
    assert runs.visible(text) == text
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert runs.visible(text) == "a␛[2J␇␡\ufffd\n\té"


def test_same_seed_and_prompt_give_the_same_text(whole, capsys):
    """Catches: a text that depends on the prompts before it."""
    argv = [whole, "--max_new_tokens", 9]
    texts = []
    for prompts in (["b"], ["a", "b"]):
        flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
        assert not exit_code(sample.main, [*argv, *flags])
        texts.append(capsys.readouterr().out.split("---\n")[-1])
    assert texts[0] == texts[1]


# -------------------------------------------------------------------------------------------------
# Chat

@pytest.fixture
def talk(monkeypatch, capsys):
    """A function that gives lines to sample.py --chat; it returns (code, lines, stderr)."""
    def talk(run, lines, *flags):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        argv = [run, "--chat", "--temperature", 0, "--max_new_tokens", 6, *flags]
        code = exit_code(sample.main, argv)  # None, as a script's main returns, is success
        out, err = capsys.readouterr()
        return code or 0, out.split("\n")[:-1], err

    return talk


@pytest.fixture
def answer(tuned):
    """A function that gives the likeliest answer of 6 tokens to a conversation."""
    model, tokenizer, _ = checkpoint.load_model(tuned)

    def answer(*chat, system="S."):
        ids, _ = encode_chat(tokenizer, chat, system)
        new = model.generate(torch.tensor([ids]), 6, temperature=0, eot=tokenizer.eot)
        ids = [int(i) for i in new]
        return tokenizer.decode([i for i in ids if i != tokenizer.eot]).lstrip()

    return answer


def test_chat_remembers(tuned, talk, answer):
    """Catches: a second question without the first, or an answer that is not the model's."""
    first = answer(user("a?"))
    second = answer(user("a?"), assistant(first), user("b?"))
    assert talk(tuned, b"a?\nb?\n") == (0, [first, second], "")
    assert second != answer(user("b?"))  # control


def test_chat_commands(tuned, talk, answer):
    """Catches: /reset that forgets nothing, /exit that goes on, a blank line that is answered, an
    unknown command that is put to the model."""
    first = answer(user("a?"))
    second = answer(user("b?"))
    code, lines, _ = talk(tuned, b"a?\n\n/reset\nb?\n/exit\na?")
    assert code == 0
    assert lines == [first, second]
    code, lines, err = talk(tuned, b"/what\na?")
    assert lines == [first]
    assert "unknown command /what" in err


@pytest.mark.row(70)
def test_question_of_several_lines(tuned, talk, answer):
    """Catches: each line answered by itself."""
    assert talk(tuned, b"a?\\\nb?\n")[1] == [answer(user("a?\nb?"))]
    assert len(talk(tuned, b"a?\nb?\n")[1]) == 2  # control


def test_chat_takes_the_system_prompt_of_the_tuning(tuned, whole, talk, answer):
    """Catches: a model that is asked with another beginning than it was tuned with, or --system
    that is not used; a model that was never tuned and gets no note."""
    asked = b"a?"
    assert talk(tuned, asked)[1] == [answer(user("a?"))]
    assert talk(tuned, asked, "--system", "T.")[1] == [answer(user("a?"), system="T.")]
    assert "was never tuned" in talk(whole, b"")[2]
    assert "was never tuned" not in talk(tuned, b"")[2]  # control


@pytest.mark.row(39)
def test_chat_survives_bad_questions(tuned, talk, answer):
    """Catches: a chat that ends, or forgets, at a question that is too long or not UTF-8."""
    first = answer(user("a?"))
    second = answer(user("a?"), assistant(first), user("b?"))
    code, lines, err = talk(tuned, b"\xff\n/reset\na?\na?" + b"y" * 70 + b"\nb?")
    assert code == 0
    assert lines[1:] == [first, second]
    assert "ask a shorter one" in err


def test_chat_with_closed_input_is_one_line(tuned, monkeypatch, capsys):
    """Catches: a traceback when standard input is closed."""
    monkeypatch.setattr(sys, "stdin", None)
    assert exit_code(sample.main, [tuned, "--chat"]) == 2
    assert "standard input, which is closed" in messages(capsys)[-1]


@pytest.fixture
def asked(monkeypatch):
    """[(ids, most), …]: what the model is given to continue. It answers "x" each time."""
    calls = []

    def stream(model, tokenizer, ids, most, *args):
        calls.append((ids, most))
        return ["x"]

    monkeypatch.setattr(sample, "stream", stream)
    return calls


@pytest.mark.parametrize("most, room", [(6, 58), (200, 48)])
def test_answer_has_room(tuned, talk, asked, most, room):
    """Catches: a question that leaves fewer than `most` tokens for the answer, or than a quarter of
    the window of 64; a question that is refused although it fits."""
    questions = b"".join(b"y" * n + b"\n/reset\n" for n in range(1, 70))
    code, _, err = talk(tuned, questions, "--max_new_tokens", most)
    assert code == 0
    assert max(len(ids) for ids, _ in asked) == room
    for ids, limit in asked:
        assert limit == min(most, 64 - len(ids))
    refused = err.count(f"room for {room} — ask a shorter one")
    assert len(asked) + refused == 69
    assert refused > 0  # control


def test_system_prompt_without_room_is_one_line(tuned, talk):
    """Catches: a chat that starts although no question can fit."""
    code, lines, err = talk(tuned, b"a?", "--system", "long " * 30)
    assert code == 2
    assert lines == []
    assert "give a shorter --system" in err


def chat_in(window):
    """A Chat in a window of so many tokens, of which one is kept for the answer."""
    model = SimpleNamespace(config=SimpleNamespace(max_seq_len=window))
    return sample.Chat(model, GPT2, "S.", SimpleNamespace(max_new_tokens=1), None)


def test_history_is_cut_between_turns(asked):
    """Catches: a history cut within a turn, or more of it dropped than needed."""
    history = []
    for n in range(8):
        history += [user(f"question {n}"), assistant(f"answer {n}")]
    everything = [*history, user("question 8")]
    ids, _ = encode_chat(GPT2, everything, "S.")
    numbers = set()
    for window in range(12, len(ids) + 2):
        chat = chat_in(window)
        chat.messages = history
        list(chat.ask("question 8"))
        kept = chat.messages[:-1]  # without the new answer
        numbers.add(len(kept))
        assert kept == everything[-len(kept):]
        assert kept[0]["role"] == "user"
        assert asked[-1][0] == encode_chat(GPT2, kept, "S.")[0]
        assert len(asked[-1][0]) < window
        more = everything[-len(kept) - 2:]
        assert kept == everything or len(encode_chat(GPT2, more, "S.")[0]) >= window
    assert numbers == set(range(1, 18, 2))  # control: every cut occurs


@pytest.mark.row(39)
def test_long_question_forgets_nothing(asked):
    """Catches: a history that is gone after a question that was refused."""
    chat = chat_in(40)
    list(chat.ask("one"))
    before = list(chat.messages)
    with pytest.raises(UserError, match="ask a shorter one"):
        list(chat.ask("long " * 60))
    assert chat.messages == before == [user("one"), assistant("x")]
    list(chat.ask("two"))
    assert len(chat.messages) == 4  # control
