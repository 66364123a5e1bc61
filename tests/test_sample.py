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


def continuations(whole, capsys, prompts, *flags):
    """What sample.py prints, sample by sample."""
    argv = [whole, "--max_new_tokens", 20, *flags]
    for prompt in prompts:
        argv += ["--prompt", prompt]
    assert not exit_code(sample.main, argv)
    return capsys.readouterr().out.removesuffix("\n").split("\n---\n")


def test_same_seed_gives_the_same_text(whole, capsys):
    """Catches: a seed that is not used, samples that are all the same, a prompt that is changed; a
    text that depends on the prompts before it."""
    prompt = "Zürich <|endoftext|>"
    first, second = continuations(whole, capsys, [prompt], "--samples", 2)
    assert first.startswith(prompt)
    assert first != second
    assert continuations(whole, capsys, ["a", prompt])[1] == first
    assert continuations(whole, capsys, [prompt], "--seed", 1)[0] != first  # control


@pytest.mark.row(39)
def test_any_prompt_is_continued(whole, capsys):
    """Catches: a traceback for a prompt that is empty, longer than the window, or not UTF-8; a
    prompt that is cut without a word."""
    notes = {"": False, "long " * 100: True, "\udcff": False}
    for prompt, is_cut in notes.items():
        assert not exit_code(sample.main, [whole, "--prompt", prompt, "--max_new_tokens", 3])
        out, err = capsys.readouterr()
        assert out.startswith(prompt.replace("\udcff", "?"))
        assert ("the model reads the last 64" in err) == is_cut


@pytest.mark.row(64)
def test_text_longer_than_the_windows_of_training_is_said(whole, capsys):
    """Catches: text behind the windows of training, of 16 tokens, without a word; by default none
    is behind them."""
    tokenizer = Tokenizer(300)
    for flags, said in (([], False), (["--max_new_tokens", 40], True)):
        assert not exit_code(sample.main, [whole, "--prompt", "a b", "--top_k", 1, *flags])
        out, err = capsys.readouterr()
        assert ("trained in windows of 16 tokens" in err) == said
        assert (len(tokenizer.encode(out)) > 17) == said


@pytest.mark.row(70)
def test_control_codes_are_signs_on_a_terminal(monkeypatch):
    """Catches: a model that moves the cursor of the terminal; text that is changed in a file."""
    text = "a\x1b[2J\x07\x7f\x9b\n\té"
    for is_terminal, shown in ((False, text), (True, "a␛[2J␇␡\ufffd\n\té")):
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: is_terminal))
        assert runs.visible(text) == shown


@pytest.mark.parametrize("flags, why", [
    (["--step", 7], "no checkpoint of step 7"),
    (["--top_p", 0], "out of range"),
    (["--system", "S."], "--system is for --chat"),
    (["--chat", "--prompt", "x"], "--chat reads questions"),
    (["--trajectory", "--step", 8], "one sample at every step"),
    (["--chat"], "standard input, which is closed"),
])
def test_mistake_in_the_flags_is_one_line(whole, capsys, monkeypatch, flags, why):
    """Catches: a traceback, or a flag that is accepted and then ignored."""
    monkeypatch.setattr(sys, "stdin", None)
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
    those of the run's own samples, a damaged checkpoint that ends it; a seed that is noted and not
    used."""
    run = shutil.copytree(whole, tmp_path / "r")
    (run / "checkpoints/step_00000004/model.pt").write_bytes(b"?")
    assert not exit_code(sample.main, [run, "--trajectory"])
    assert "step_00000004 is damaged" in capsys.readouterr().err
    found = [(row["step"], row["prompt"], row["text"]) for row in samples(run)]
    own = rows(run, "sample", ("step", "prompt", "text"))
    assert found == [row for row in own if row[0] != 4]
    assert len(found) == 6
    assert len({text for _, _, text in found}) > 3  # control: other weights, other words
    argv = [run, "--trajectory", "--seed", 1, "--max_new_tokens", 9]
    assert not exit_code(sample.main, argv)
    other = samples(run)[-1]
    assert other["seed"] == 1
    assert not found[-1][2].startswith(other["text"])


@pytest.mark.parametrize("flags", [["--trajectory"], ["--prompt", "a"],
                                   ["--chat", "--system", "S."]])
def test_dtype_is_used_wherever_text_is_made(whole, tmp_path, monkeypatch, flags):
    """Catches: a --dtype without effect in one of the three ways to use sample.py, or that a
    trajectory does not tell."""
    seen = []  # whether autocast was on, in each computation of logits
    logits = Llama.logits

    def watched(model, hidden):
        seen.append(torch.is_autocast_enabled("cpu"))
        return logits(model, hidden)

    monkeypatch.setattr(Llama, "logits", watched)
    run = shutil.copytree(whole, tmp_path / "r")
    for dtype in ("bf16", "fp32"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a?\n"))
        assert not exit_code(sample.main, [run, *flags, "--dtype", dtype, "--max_new_tokens", 4])
        assert set(seen) == {dtype == "bf16"}  # fp32: the control
        seen.clear()
        if flags == ["--trajectory"]:
            assert samples(run)[-1]["dtype"] == dtype


# -------------------------------------------------------------------------------------------------
# Chat

@pytest.fixture
def talk(monkeypatch, capsys):
    """A function that gives lines to sample.py --chat; it returns (code, lines, stderr). The code
    of success is None, as its main returns."""
    def talk(run, lines, *flags):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        argv = [run, "--chat", "--temperature", 0, "--max_new_tokens", 6, *flags]
        code = exit_code(sample.main, argv)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return talk


@pytest.fixture
def answer(tuned):
    """A function that gives the likeliest answer of 6 tokens to a conversation."""
    model, tokenizer, _ = checkpoint.load_model(tuned)

    def answer(*chat, system="S."):
        ids, _ = encode_chat(tokenizer, chat, system)
        new = model.generate(torch.tensor([ids]), 6, temperature=0, eot=tokenizer.eot)
        ids = [int(i) for i in new if i != tokenizer.eot]
        return tokenizer.decode(ids).lstrip()

    return answer


@pytest.mark.row(39)
def test_chat_remembers(tuned, talk, answer):
    """Catches: a second question without the first, or an answer that is not the model's; a chat
    that ends, or forgets, at a question that is too long or not UTF-8."""
    first = answer(user("a?"))
    second = answer(user("a?"), assistant(first), user("b?"))
    assert talk(tuned, b"a?\nb?\n") == (None, [first, second], "")
    assert second != answer(user("b?"))  # control
    code, lines, err = talk(tuned, b"\xff\n/reset\na?\na?" + b"y" * 70 + b"\nb?")
    assert (code, lines[1:]) == (None, [first, second])
    assert "ask a shorter one" in err


@pytest.mark.row(70)
def test_chat_commands(tuned, talk, answer):
    """Catches: /reset that forgets nothing, /exit that goes on, a blank line that is answered, an
    unknown command that is put to the model; the lines of one question answered one by one."""
    code, lines, err = talk(tuned, b"a?\n\n/reset\n/what\nb?\\\nc?\n/exit\na?")
    assert (code, lines) == (None, [answer(user("a?")), answer(user("b?\nc?"))])
    assert "unknown command /what" in err


def test_chat_takes_the_system_prompt_of_the_tuning(tuned, whole, talk, answer):
    """Catches: a model that is asked with another beginning than it was tuned with, or --system
    that is not used; one that was never tuned and gets no note; a chat in which no question
    can fit."""
    assert talk(tuned, b"a?") == (None, [answer(user("a?"))], "")
    assert talk(tuned, b"a?", "--system", "T.")[1] == [answer(user("a?"), system="T.")]
    assert "was not tuned by sft.py" in talk(whole, b"")[2]
    code, lines, err = talk(tuned, b"a?", "--system", "long " * 30)
    assert (code, lines) == (2, [])
    assert "give a shorter --system" in err


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
def test_answer_has_room(whole, talk, asked, most, room):
    """Catches: a question that leaves fewer than `most` tokens for the answer, or than a quarter of
    the window of 64; a question that is refused although it fits."""
    questions = b"".join(b"y" * n + b"\n/reset\n" for n in range(1, 70))
    _, _, err = talk(whole, questions, "--max_new_tokens", most, "--system", "S.")
    assert max(len(ids) for ids, _ in asked) == room
    for ids, limit in asked:
        assert limit == min(most, 64 - len(ids))
    refused = err.count(f"room for {room} — ask a shorter one")
    assert refused > 0  # control
    assert len(asked) + refused == 69


def test_history_is_cut_between_turns(asked):
    """Catches: a history cut within a turn, or more of it dropped than needed."""
    tokenizer = Tokenizer()
    everything = []
    for n in range(5):
        everything += [user(f"question {n}"), assistant(f"answer {n}")]
    everything.append(user("question 5"))

    def length(turns):
        return len(encode_chat(tokenizer, turns, "S.")[0])

    numbers = set()
    for window in range(12, length(everything) + 2):
        model = SimpleNamespace(config=SimpleNamespace(max_seq_len=window))
        args = SimpleNamespace(max_new_tokens=1)  # so one token of the window is for the answer
        chat = sample.Chat(model, tokenizer, "S.", args, None)
        chat.messages = everything[:-1]
        list(chat.ask("question 5"))
        fitting = [n for n in range(1, 12, 2) if length(everything[-n:]) < window]
        kept = everything[-fitting[-1]:]
        assert asked[-1][0] == encode_chat(tokenizer, kept, "S.")[0]
        numbers.add(len(kept))
    assert numbers == set(range(1, 12, 2))  # control: every cut occurs
