"""prepare_data.py: the corpus of docstrings (built once), its leaks, its quizzes; your own text; kills and bad input."""
import copy
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import prepare_data
import pydocs
from data import DataFolder, Tokenizer
from prepare_data import main
from pydocs import build_corpus, prose, public_name, source_files

STORY = "".join(f"Line {i}: the quick brown fox met {i * i} lazy dogs.\n" for i in range(400))


def documents_of(folder, split):
    """The documents of a split as texts: what a reader of the shards sees."""
    data = DataFolder(folder)
    ids = np.concatenate([shard.tokens for shard in getattr(data, split)])
    assert ids[0] == data.tokenizer.eot
    return [data.tokenizer.decode(part[1:].tolist()) for part in np.split(ids, np.flatnonzero(ids == data.tokenizer.eot))[1:]]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def fails(capsys, *argv):
    """Run the script on bad input; its one line on stderr."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in argv])
    lines = [line for line in re.split("[\r\n]", capsys.readouterr().err) if "prepare_data.py: " in line]
    assert exit_.value.code == 2 and len(lines) == 1
    return lines[0]


# ---- pydocs

@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The real corpus, read once and written in the three qualities: {quality: folder}."""
    root, documents = tmp_path_factory.mktemp("corpus"), build_corpus()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "build_corpus", lambda: copy.deepcopy(documents))
        for quality in ("prose", "raw", "shuffled"):
            main(["pydocs", "--quality", quality, "--out", str(root / quality)])
    return {quality: root / quality for quality in ("prose", "raw", "shuffled")}


def leaks(val, train):
    """Validation texts that share a sentence or 13 words in a row with training. Shares no code with prepare_data."""
    def words(text):
        return [w for w in re.split(r"[^0-9a-z_]+", text.lower()) if w]

    def shared(text):
        body = text.partition("\n")[2]  # the first line is a name
        found = {tuple(words(sentence)) for line in body.split("\n") for sentence in re.split(r"(?<=[.!?])\s+", line)} - {()}
        for run in map(words, body.split("\n")):
            found |= {tuple(run[i:i + 13]) for i in range(len(run) - 12)}
        return found
    known = set().union(*map(shared, train))
    return [text for text in val if shared(text) & known]


@pytest.mark.parametrize("quality", ["prose", "raw", "shuffled"])
def test_validation_text_leaks_into_training(corpus, quality):
    val, train = documents_of(corpus[quality], "val"), documents_of(corpus[quality], "train")
    assert leaks(val, train) == []
    sentence = "Surely no one has ever written exactly this."
    assert leaks([f"a\nFirst. {sentence}"], [*train, f"b\n{sentence}  Other."])  # control: one sentence
    thirteen = " ".join(val[0].split("\n")[1].split()) + " " + " ".join(f"w{i}" for i in range(13))
    assert leaks([f"a\nx {thirteen}"], [*train, f"b\ny {thirteen} z."])  # control: a run of words


def test_corpus_is_small_lopsided_or_full_of_markup(corpus):
    train, val = documents_of(corpus["prose"], "train"), documents_of(corpus["prose"], "val")
    text = "\n".join(train)
    assert len(text) > 2.5e6 and 0.02 < len("".join(val)) / len(text) < 0.1
    for left in (">>>", "::", "`", "----", "\\", "{"):
        assert left not in text
    raw = "\n".join(documents_of(corpus["raw"], "train"))
    assert all(left in raw for left in (">>>", "::", "`", "----", "\\", "{"))  # control
    assert sum(text.startswith("torch.") for text in train) < 0.45 * len(train)
    for name in ("json.dumps", "torch.nn.Linear", "numpy.mean", "matplotlib.axes.Axes.plot", "decimal.Decimal.sqrt"):
        assert any(document.split("\n")[0] == name for document in train + val), name
    assert not [document for document in train if re.match(r"[\w.]*\._|_|test\.", document)]  # private, tests
    paragraphs = [line for document in train + val for line in document.split("\n")[1:]]
    assert len(paragraphs) == len(set(paragraphs))


def test_quality_changes_the_validation_shard(corpus):
    val = {quality: (folder / "val_0000.npy").read_bytes() for quality, folder in corpus.items()}
    assert val["prose"] == val["raw"] == val["shuffled"]
    train = {quality: documents_of(folder, "train") for quality, folder in corpus.items()}
    assert train["prose"] != train["raw"] and train["prose"] != train["shuffled"]  # control
    pieces = {quality: sorted(" ".join(text.replace("\n", " ") for text in train[quality]).split()) for quality in train}
    assert pieces["prose"] == pieces["shuffled"] != pieces["raw"]  # the same words in another order


def test_meta_does_not_describe_the_shards(corpus):
    meta = json.loads((corpus["prose"] / "meta.json").read_text())
    assert meta["vocab_size"] == prepare_data.DEFAULT_VOCAB_SIZE and meta["eot"] == meta["vocab_size"] - 1
    assert meta["tokenizer"] == "gpt2" and meta["dtype"] == "uint16" and meta["source"]["numpy"] == np.__version__
    for split in ("train", "val"):
        for shard in meta["splits"][split]:
            file = corpus["prose"] / shard["file"]
            assert hashlib.sha256(file.read_bytes()).hexdigest() == shard["sha256"] and len(np.load(file)) == shard["tokens"]
        assert meta["bytes"][split] == sum(len(text.encode()) for text in documents_of(corpus["prose"], split))


def accuracy(items, scorer):
    """Share of items whose best-scored ending is the right one; `scorer(item, ending)`."""
    return np.mean([max(range(4), key=lambda i: scorer(item, item["endings"][i])) == item["label"] for item in items])


def test_cloze_can_be_answered_without_reading_the_context(corpus):
    items = [json.loads(line) for line in (corpus["prose"] / "cloze.jsonl").read_text().splitlines()]
    assert len(items) >= 500 and [item["ind"] for item in items] == list(range(len(items)))
    blind = {"length": lambda e: len(e), "brevity": lambda e: -len(e), "hash": lambda e: hashlib.sha256(e.encode()).digest(),
             "alphabet": lambda e: e, "first": lambda e: 0, "vowels": lambda e: sum(c in "aeiou" for c in e)}
    for scorer in blind.values():
        assert accuracy(items, lambda item, ending: scorer(ending)) == 0.25
    right = "\n".join(documents_of(corpus["prose"], "val"))
    assert accuracy(items, lambda item, ending: f"{item['ctx']} {ending}" in right) == 1.0  # control: it can be answered
    broken = [{**item, "label": 0 if item["endings"][0] == max(item["endings"]) else item["label"]} for item in items]
    assert accuracy(broken, lambda item, ending: ending) > 0.25  # control: unbalanced labels would show
    for start in range(0, len(items), 4):
        block = items[start:start + 4]
        assert len({item["block"] for item in block}) == 1 and len({tuple(item["endings"]) for item in block}) == 1
        assert sorted(item["label"] for item in block) == [0, 1, 2, 3] and len(set(block[0]["endings"])) == 4
        assert len({item["source_id"].split(":")[0] for item in block}) == 4
        lengths = [len(ending) for ending in block[0]["endings"]]
        assert max(lengths) - min(lengths) <= 4
    train = "\n".join(documents_of(corpus["prose"], "train"))
    assert not [item for item in items if f"{item['ctx_b']} {item['endings'][item['label']]}" in train]


def test_instructions_are_marked_with_the_wrong_split(corpus):
    rows = json.loads((corpus["prose"] / "instruct.json").read_text())
    questions = {row["instruction"]: row for row in rows}
    assert len(rows) == len(questions) > 3000
    assert questions["What does `json.dumps` do?"]["output"].startswith("Serialize obj to a JSON formatted str.")
    for split in ("train", "val"):
        names = {text.split("\n")[0] for text in documents_of(corpus["prose"], split)}
        asked = {re.search("`(.*)`", row["instruction"])[1] for row in rows if row["split"] == split}
        assert asked and asked <= names
    train = "\n".join(documents_of(corpus["prose"], "train"))
    assert not [row for row in rows if row["split"] == "val" and row["output"] in train]
    assert any(row["output"] in train for row in rows if row["split"] == "train")  # control


def test_number_of_cores_changes_the_bytes(tmp_path, monkeypatch):
    files = source_files()
    chosen = [file for file in files if file[1].startswith(("json", "logging", "unittest", "tqdm", "email"))]
    monkeypatch.setattr(pydocs, "source_files", lambda: chosen)
    for count in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda: count)
        main(["pydocs", "--out", str(tmp_path / str(count))])
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    monkeypatch.setattr(pydocs, "source_files", lambda: chosen[:-1])  # control: one file less shows
    main(["pydocs", "--out", str(tmp_path / "less")])
    assert contents(tmp_path / "less") != contents(tmp_path / "1")


@pytest.mark.parametrize("raw, expected", [
    ("Return the\nsum of two numbers.\n\n    >>> add(1, 2)\n    3\n", ["Return the sum of two numbers."]),
    ("Parse a file.\n\nUse it like this::\n\n    Some code that looks like words here.\n\nThen close the file again.",
     ["Parse a file.", "Then close the file again."]),
    ("Mean of it all.\n\nParameters\n----------\nx : array_like, optional\n    The numbers to take the mean of.\n\n"
     "See Also\n--------\nmedian : The number in the middle of them.\n\nNotes\n-----\nIt needs ``O(n)`` time to run.",
     ["Mean of it all.", "The numbers to take the mean of.", "It needs O(n) time to run."]),
    ("Args:\n    dim (int): the dimension to reduce, with\n        a second line.\n    out (Tensor): a place.\n\nReturns:\n"
     "    A tensor of the same type.", ["The dimension to reduce, with a second line.", "A tensor of the same type."]),
    ("See :class:`~torch.nn.Module` and :func:`os.path.join` for *more* about `this <http://x.y>`_.",
     ["See Module and os.path.join for more about this."]),
    (".. note::\n    This one is slow on purpose.\n\n.. code-block:: python\n\n    This is code for you.\n\nThat is all there is.",
     ["This one is slow on purpose.", "That is all there is."]),
    ("name   | size of it\n-------+------\nalpha  | one\n\nx = y + 1\n\nTwo sentences, e.g. This one. And that one here.",
     ["Two sentences, e.g. This one. And that one here."]),
    ("The result is {input} of the call.", []),
])
def test_prose_keeps_code_or_loses_sentences(raw, expected):
    assert prose(raw)[0] == expected


def test_things_are_named_by_where_they_are_written():
    exports = {"a.b.c.Thing": ["a.b.Thing"], "a.b.*": ["a.*"], "a.x.Thing2": ["z.Thing2"], "_py.*": ["pub.*"]}
    assert public_name("a.b.c.Thing.method", exports) == "a.Thing.method"
    assert public_name("a.x.Thing2", exports) == "a.x.Thing2"  # z merely imports it
    assert public_name("_py.f", exports) == "pub.f"
    assert public_name("_other.f", exports) is None and public_name("a._f", {}) is None


# ---- text

def test_one_file_does_not_come_back_or_is_cut_within_a_line(tmp_path):
    (tmp_path / "story.txt").write_text(STORY)
    main(["text", str(tmp_path / "story.txt"), "--out", str(tmp_path / "out"), "--vocab_size", "512"])
    (train,), (val,) = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    assert train + val == STORY and train.endswith("\n")
    assert 0.04 < len(val) / len(STORY) < 0.06


def test_a_book_in_one_line_has_no_validation(tmp_path):
    (tmp_path / "line.txt").write_text("Title\n" + STORY.replace("\n", " "))
    main(["text", str(tmp_path / "line.txt"), "--out", str(tmp_path / "out")])
    (train,), (val,) = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    assert train.endswith(" ") and 0.04 < len(val) / len(STORY) < 0.06


def test_documents_are_lost_or_run_together(tmp_path):
    texts = [f"Document {i} says {'something ' * (i % 7)}<|endoftext|> ünicode\nend" for i in range(300)]
    lines = [json.dumps({"text": text, "other": 1}) for text in texts]
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines[:100]) + "\n\n")
    (tmp_path / "in" / "sub" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[100:200]).encode()))
    (tmp_path / "in" / "c.txt").write_bytes(b"\xef\xbb\xbf" + "##".join(texts[200:]).replace("\n", "\r\n").encode())
    (tmp_path / "in" / "ignored.csv").write_text("no")
    main(["text", str(tmp_path / "in"), "--separator", "##", "--out", str(tmp_path / "out")])
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts) and len(val) == 16
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(reversed(lines[:100])))
    main(["text", str(tmp_path / "in"), "--separator", "##", "--out", str(tmp_path / "again")])
    assert set(documents_of(tmp_path / "again", "val")) == set(val)  # by content, not by place
    assert documents_of(tmp_path / "again", "train") != train  # control: the file did change


def test_several_shards_say_something_else_than_one(tmp_path, monkeypatch):
    (tmp_path / "story.txt").write_text(STORY)
    main(["text", str(tmp_path / "story.txt"), "--out", str(tmp_path / "one")])
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 1000)
    main(["text", str(tmp_path / "story.txt"), "--out", str(tmp_path / "many")])
    assert len(DataFolder(tmp_path / "many").train) > 3 and len(DataFolder(tmp_path / "one").train) == 1
    assert documents_of(tmp_path / "many", "train") == documents_of(tmp_path / "one", "train")


def test_long_file_is_read_whole(tmp_path):
    (tmp_path / "long.txt").write_text(STORY * 200)  # 4 MB
    pieces = list(prepare_data.read_pieces(tmp_path / "long.txt"))
    assert "".join(text for text, _ in pieces) == STORY * 200 and max(len(text) for text, _ in pieces) < 1.1e6
    assert [starts for _, starts in pieces] == [True] + [False] * (len(pieces) - 1) and len(pieces) > 3


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl, line 2: expected a JSON object"),
    ("a.jsonl", b'\n[1]\n', "a.jsonl, line 2"),
    ("a.jsonl", b'{"txt": "x"}', "a.jsonl, line 1"),
    ("a.jsonl", b'{"text": 5}', "a.jsonl, line 1"),
    ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1"),
    ("a.txt", b"fine\n\xff\xfe\n", "a.txt, line 2: not UTF-8"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "damaged gzip"),
    ("a.jsonl.gz", b"plain", "damaged gzip"),
    ("a.txt", b"", "too little text"),
    ("a.txt", b"Only a few words here.\nThat is all.\n", "too little text"),
    ("a.pdf", b"x", r"expected .txt, .md"),
])
def test_bad_input_ends_in_a_traceback_or_in_a_folder(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in fails(capsys, "text", tmp_path / name, "--out", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_missing_path_or_empty_folder_or_vocabulary_is_not_explained(tmp_path, capsys):
    assert "no such file" in fails(capsys, "text", tmp_path / "absent.txt")
    (tmp_path / "empty").mkdir()
    assert "expected .txt" in fails(capsys, "text", tmp_path / "empty")
    (tmp_path / "story.txt").write_text(STORY)
    assert "vocab_size 99" in fails(capsys, "text", tmp_path / "story.txt", "--vocab_size", 99)


def test_a_users_files_are_deleted(tmp_path, capsys):
    (tmp_path / "story.txt").write_text(STORY)
    command = ["text", tmp_path / "story.txt", "--out", tmp_path / "out"]
    main(list(map(str, command)))
    first = contents(tmp_path / "out")
    main(list(map(str, command)))  # control: our own folder is replaced
    assert contents(tmp_path / "out") == first
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "notes.txt" in fails(capsys, *command)
    (tmp_path / "out" / "notes.txt").unlink()
    (tmp_path / "out" / "meta.json").unlink()  # someone else's shards
    assert "did not write" in fails(capsys, *command)
    assert contents(tmp_path / "out") == {name: data for name, data in first.items() if name != "meta.json"}
    command[-1] = tmp_path / "story.txt"
    assert "did not write" in fails(capsys, *command)


KILLED = """
import os, sys
from pathlib import Path
import numpy as np
import prepare_data
import pydocs
left = int(sys.argv[1])
def counted(function):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return wrapped
np.save, os.fsync, Path.rename, Path.write_text = map(counted, (np.save, os.fsync, Path.rename, Path.write_text))
prepare_data.main(sys.argv[2:])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL")
def test_killed_midway_leaves_half_a_folder(tmp_path):
    (tmp_path / "story.txt").write_text(STORY)
    argv = ["text", str(tmp_path / "story.txt"), "--out", str(tmp_path / "out"), "--vocab_size", "512"]
    main(argv)
    whole, left = contents(tmp_path / "out"), 0
    while True:
        left += 1
        code = subprocess.run([sys.executable, "-c", KILLED, str(left), *argv], capture_output=True,
                              cwd=Path(prepare_data.__file__).parent).returncode
        assert code in (0, -9)
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == whole
        if code == 0:
            break
    assert left > 8  # control: it was killed at every one of these
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "story.txt"]  # the last run swept the leftovers


def test_show_hides_the_pieces(capsys):
    main(["show", "Hello world", "--vocab_size", "512"])
    ids = Tokenizer(512).encode("Hello world")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].replace("|", "") == "Hello world" and lines[0].count("|") == len(ids) - 1
    assert lines[1] == " ".join(map(str, ids)) and f"{len(ids)} tokens" in lines[2]
