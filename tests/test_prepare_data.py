"""prepare_data.py: the corpus of docstrings and the questions from it; the user's own text; kills
and bad input. The corpus is built once for all tests."""
import copy
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from data import DataFolder, Tokenizer
from prepare_data import main
from corpus import pydocs, textfiles

STORY = "".join(f"Line {i}: the quick brown fox met {i * i} lazy dogs.\n" for i in range(400))
QUALITIES = ("prose", "raw", "shuffled")
MARKUP = (">>>", "::", "`", "----", "\\", "{")


def run(*argv):
    main([str(argument) for argument in argv])


def fails(capsys, *argv):
    """Run the script on bad input; returns its one line on stderr."""
    with pytest.raises(SystemExit) as exit_:
        run(*argv)
    assert exit_.value.code == 2
    lines = re.split("[\r\n]", capsys.readouterr().err)  # a progress bar ends lines with \r
    messages = [line for line in lines if "prepare_data.py: " in line]
    assert len(messages) == 1
    return messages[0]


def documents_of(folder, split):
    """The documents of a split as texts, read back from the shards."""
    data = DataFolder(folder)
    shards = data.train if split == "train" else data.val
    ids = np.concatenate([shard.tokens for shard in shards])
    starts = np.flatnonzero(ids == data.tokenizer.eot)
    assert starts[0] == 0
    rows = np.split(ids, starts)[1:]
    return [data.tokenizer.decode(row[1:].tolist()) for row in rows]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def story(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    return file


# ---- pydocs

@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """{quality: folder}: the real corpus, read once and written in the three qualities, and as "all
    raw": its validation text too."""
    root = tmp_path_factory.mktemp("corpus")
    documents = pydocs.build_corpus()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pydocs, "build_corpus", lambda: copy.deepcopy(documents))
        for quality in QUALITIES:
            run("pydocs", "--quality", quality, "--out", root / quality)
        run("pydocs", "--quality", "raw", "--val_quality", "raw", "--out", root / "all raw")
    return {quality: root / quality for quality in (*QUALITIES, "all raw")}


@pytest.fixture(scope="session")
def texts(corpus):
    """{(quality, split): documents}, decoded once."""
    found = {}
    for quality in QUALITIES:
        for split in ("train", "val"):
            found[quality, split] = documents_of(corpus[quality], split)
    return found


def name_of(document):
    return document.split("\n")[0]


def words_of(text):
    return [word for word in re.split(r"[^0-9a-z_]+", text.lower()) if word]


def fragments(document):
    """Its sentences and all runs of 13 words in a line. Shares no code with prepare_data."""
    found = set()
    for line in document.split("\n")[1:]:  # the first line is a name
        for sentence in re.split(r"(?<=[.!?])\s+", line):
            found.add(tuple(words_of(sentence)))
        words = words_of(line)
        for i in range(len(words) - 12):
            found.add(tuple(words[i:i + 13]))
    return found - {()}


@pytest.mark.parametrize("quality", QUALITIES)
def test_validation_shares_no_text_with_training(texts, quality):
    """Catches: a sentence, or 13 words in a row, that is in both splits."""
    training = set()
    for document in texts[quality, "train"]:
        training |= fragments(document)
    val = texts[quality, "val"]
    assert not [document for document in val if fragments(document) & training]

    # control: one sentence in a document of training shows
    training |= fragments("b\nSurely no one has ever written exactly this.  Other.")
    assert fragments("a\nFirst. Surely no one has ever written exactly this.") & training
    # control: 13 words in a row show, 12 do not
    row = " ".join(f"w{i}" for i in range(13))
    training |= fragments(f"b\ny {row} z.")
    assert fragments(f"a\nx {row}") & training
    assert not fragments(f"a\nx {row[:-4]}") & training


def test_corpus_is_large_balanced_and_free_of_markup(texts):
    """Catches: lost files, a dominant package, private names, code or repeated paragraphs in the
    prose."""
    train = texts["prose", "train"]
    val = texts["prose", "val"]
    text = "\n".join(train)
    raw = "\n".join(texts["raw", "train"])
    assert len(text) > 4.5e6
    assert 0.015 < len("".join(val)) / len(text) < 0.1
    for mark in MARKUP:
        assert mark not in text
        assert mark in raw  # control

    of_torch = [document for document in train if document.startswith("torch.")]
    assert len(of_torch) < 0.45 * len(train)
    names = {name_of(document) for document in train + val}
    assert "json.dumps" in names
    assert "torch.nn.Linear" in names
    assert "numpy.mean" in names
    assert "matplotlib.axes.Axes.plot" in names
    assert "decimal.Decimal.sqrt" in names
    assert "networkx.shortest_path" in names
    assert not [name for name in names if re.match(r"[\w.]*\._|_|test\.", name)]

    paragraphs = []
    for document in train + val:
        paragraphs += document.split("\n")[1:]
    assert len(paragraphs) == len(set(paragraphs))


def test_quality_changes_only_the_training_shard(corpus, texts):
    """Catches: scores on different validation texts compared with each other; "shuffled" that
    loses words or leaves the order."""
    shards = {quality: (corpus[quality] / "val_0000.npy").read_bytes() for quality in QUALITIES}
    assert shards["prose"] == shards["raw"]
    assert shards["prose"] == shards["shuffled"]
    # control: the training shards differ
    assert texts["prose", "train"] != texts["raw", "train"]
    assert texts["prose", "train"] != texts["shuffled", "train"]

    words = {quality: sorted(" ".join(texts[quality, "train"]).split()) for quality in QUALITIES}
    assert words["prose"] == words["shuffled"]
    assert words["prose"] != words["raw"]  # control


def test_quality_of_the_validation_is_chosen_apart(corpus, texts):
    """Catches: a --val_quality that does nothing, or changes the training shard or the
    questions."""
    same = {}
    for name in ("train_0000.npy", "cloze.jsonl", "val_0000.npy"):
        one, other = [(corpus[key] / name).read_bytes() for key in ("all raw", "raw")]
        same[name] = one == other
    assert same == {"train_0000.npy": True, "cloze.jsonl": True, "val_0000.npy": False}
    documents = documents_of(corpus["all raw"], "val")
    assert [name_of(document) for document in documents] == [
        name_of(document) for document in texts["raw", "val"]]


def test_raw_validation_is_nearly_apart(corpus, texts):
    """Catches: raw validation text (prose is apart altogether) of which more than a little stands
    in the raw training text too."""
    def runs_of_13(documents):
        words = [words_of(document) for document in documents]
        return {tuple(w[i:i + 13]) for w in words for i in range(len(w) - 12)}
    training = runs_of_13(texts["raw", "train"])
    val = runs_of_13(documents_of(corpus["all raw"], "val"))
    assert 0 < len(val & training) / len(val) < 0.015
    half = runs_of_13(texts["raw", "train"][::2])  # control: text that was trained on
    assert len(half & training) == len(half)


def test_meta_describes_the_shards(corpus, texts):
    """Catches: wrong hashes, lengths, byte counts, or an end-of-text id of another vocabulary."""
    folder = corpus["prose"]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["tokenizer"] == "gpt2"
    assert meta["dtype"] == "uint16"
    assert meta["vocab_size"] == prepare_data.DEFAULT_VOCAB_SIZE
    assert meta["eot"] == meta["vocab_size"] - 1
    assert meta["source"]["numpy"] == np.__version__
    assert meta["source"]["dependencies"]["sympy"] == importlib.metadata.version("sympy")
    for split in ("train", "val"):
        for shard in meta["splits"][split]:
            file = folder / shard["file"]
            assert hashlib.sha256(file.read_bytes()).hexdigest() == shard["sha256"]
            assert len(np.load(file)) == shard["tokens"]
        size = sum(len(document.encode()) for document in texts["prose", split])
        assert meta["bytes"][split] == size


@pytest.fixture(scope="session")
def items(corpus):
    lines = (corpus["prose"] / "cloze.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def accuracy(items, score):
    """Share of the items whose right ending scores best; score(item, ending)."""
    right = 0
    for item in items:
        scores = [score(item, ending) for ending in item["endings"]]
        right += scores.index(max(scores)) == item["label"]
    return right / len(items)


BLIND = {
    "length": lambda item, ending: len(ending),
    "brevity": lambda item, ending: -len(ending),
    "alphabet": lambda item, ending: ending,
    "first": lambda item, ending: 0,
    "vowels": lambda item, ending: sum(letter in "aeiou" for letter in ending),
    "hash": lambda item, ending: hashlib.sha256(ending.encode()).digest(),
}


@pytest.mark.parametrize("rule", BLIND)
def test_cloze_without_the_context_is_chance(items, rule):
    """Catches: right endings that are longer, or more common, or at one place more often."""
    assert accuracy(items, BLIND[rule]) == 0.25


def test_cloze_with_the_context_can_be_answered(items, texts):
    """Catches: an ending that does not continue its context in the validation text."""
    val = "\n".join(texts["prose", "val"])

    def is_in_val(item, ending):
        return f"{item['ctx']} {ending}" in val

    assert accuracy(items, is_in_val) == 1.0
    # control: labels that favour one ending of a block show without the context
    broken = copy.deepcopy(items)
    for item in broken:
        if item["endings"][0] == max(item["endings"]):
            item["label"] = 0
    assert accuracy(broken, BLIND["alphabet"]) > 0.25


def test_cloze_blocks_share_their_endings(items):
    """Catches: a block with two documents of one file, a repeated ending, or a label twice."""
    assert len(items) >= 500
    assert [item["ind"] for item in items] == list(range(len(items)))
    for start in range(0, len(items), 4):
        block = items[start:start + 4]
        endings = block[0]["endings"]
        assert all(item["endings"] == endings for item in block)
        assert all(item["block"] == start // 4 for item in block)
        assert len(set(endings)) == 4
        assert sorted(item["label"] for item in block) == [0, 1, 2, 3]
        modules = {item["source_id"].split(":")[0] for item in block}
        assert len(modules) == 4
        lengths = [len(ending) for ending in endings]
        assert max(lengths) - min(lengths) <= 4


def test_cloze_sentences_are_not_in_training(items, texts):
    """Catches: questions made from documents of training."""
    train = "\n".join(texts["prose", "train"])
    val = "\n".join(texts["prose", "val"])
    for item in items:
        sentence = f"{item['ctx_b']} {item['endings'][item['label']]}"
        assert sentence not in train
        assert sentence in val  # control


def test_instructions_carry_the_split_of_their_document(corpus, texts):
    """Catches: a held-out answer that was in the training text."""
    rows = json.loads((corpus["prose"] / "instruct.json").read_text())
    answers = {row["instruction"]: row["output"] for row in rows}
    assert len(rows) == len(answers)
    assert len(rows) > 3000
    start = "Serialize obj to a JSON formatted str."
    assert answers["What does `json.dumps` do?"].startswith(start)

    by_split = {"train": [], "val": []}
    for row in rows:
        by_split[row["split"]].append(row)
    for split, chosen in by_split.items():
        names = {name_of(document) for document in texts["prose", split]}
        asked = {re.search("`(.*)`", row["instruction"])[1] for row in chosen}
        assert asked
        assert asked <= names
    train = "\n".join(texts["prose", "train"])
    assert not [row for row in by_split["val"] if row["output"] in train]
    assert any(row["output"] in train for row in by_split["train"])  # control


def test_dependencies_are_at_most_half_of_training_and_nothing_else(corpus, texts):
    """Catches: validation text, questions or answers from packages other than the five; a training
    text that is mostly about something else."""
    folders = {module.split(".")[0] for _, module, _ in pydocs.dependency_files()}

    def is_of_dependency(name):
        return name.split(".")[0] in folders

    train = texts["prose", "train"]
    added = [document for document in train if is_of_dependency(name_of(document))]
    assert 0.2 < len("".join(added)) / len("".join(train)) < 0.5
    assert not [document for document in texts["prose", "val"]
                if is_of_dependency(name_of(document))]
    answers = (corpus["prose"] / "instruct.json").read_text()
    asked = re.findall("`(.*?)`", answers)
    assert "json.dumps" in asked
    assert not [name for name in asked if is_of_dependency(name)]


SMALL = ("json", "logging", "unittest", "tqdm", "email")


@pytest.fixture
def small(monkeypatch):
    """The files of a corpus that is read in a second."""
    files = [file for file in pydocs.source_files() if file[1].startswith(SMALL)]
    monkeypatch.setattr(pydocs, "source_files", lambda: files)
    monkeypatch.setattr(pydocs, "dependency_files", lambda: [])
    return files


def test_number_of_processes_does_not_change_the_bytes(tmp_path, monkeypatch, small):
    """Catches: an order that depends on which core is first; a second process that is needed."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    run("pydocs", "--out", tmp_path / "one")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    run("pydocs", "--out", tmp_path / "three")
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    run("pydocs", "--out", tmp_path / "alone")
    assert contents(tmp_path / "one") == contents(tmp_path / "alone")

    monkeypatch.setattr(pydocs, "source_files", lambda: small[:-1])
    run("pydocs", "--out", tmp_path / "less")
    assert contents(tmp_path / "less") != contents(tmp_path / "one")  # control


def test_the_second_process_reads_the_same(small):
    """Catches: a helper that always fails, so that one process reads all."""
    assert pydocs.ask_helper(small[:9]) == [pydocs.read_source(*file) for file in small[:9]]
    with pytest.raises(subprocess.CalledProcessError):
        pydocs.ask_helper([("json", "json", None)])  # control


def test_dependencies_add_training_text_only(tmp_path, monkeypatch, small):
    """Catches: a validation text, or questions, that change with the dependencies; a sentence of
    validation that a dependency brings into training."""
    monkeypatch.setattr(pydocs, "limit_largest_package", lambda documents: documents)
    run("pydocs", "--out", tmp_path / "without")
    held_out = documents_of(tmp_path / "without", "val")
    known = max(held_out, key=len).split("\n")[1]
    files = []
    new = "Surely no one has ever written this."
    for name, text in (("copy", f"{new} {known}"), ("new", new)):
        file = tmp_path / f"{name}.py"
        file.write_text(f'"""{text}"""')
        files.append((name, name, file))
    monkeypatch.setattr(pydocs, "dependency_files", lambda: files)
    # `copy` and `new` stand for dependencies, whose documents are not in instruct.json
    monkeypatch.setattr(pydocs, "dependencies", lambda: {"copy": "1.0", "new": "1.0"})
    run("pydocs", "--out", tmp_path / "with")

    train = documents_of(tmp_path / "with", "train")
    assert f"new\n{new}" in train
    assert not [document for document in train if known in document]
    before = contents(tmp_path / "without")
    after = contents(tmp_path / "with")
    for name in ("val_0000.npy", "cloze.jsonl", "instruct.json"):
        assert before[name] == after[name]
    assert before["train_0000.npy"] != after["train_0000.npy"]  # control


def install(folder, name, requirements=()):
    """Make a package of one module, with the metadata that pip writes."""
    info = folder / f"{name}-1.5.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.5"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "RECORD").write_text(f"{name}.py,,\n{info.name}/METADATA,,\n{name}/tests/a.py,,\n")
    (folder / f"{name}.py").write_text(f'"""The manual of {name} is rather short."""')


def test_only_what_the_five_require_is_read(tmp_path, monkeypatch):
    """Catches: text that changes with what else is installed; packages for an extra or for one
    operating system; a requirement of a requirement that is missed."""
    versions = pydocs.dependencies()
    files = pydocs.dependency_files()
    assert {"sympy", "mpmath", "python-dateutil"} <= versions.keys()  # SymPy requires mpmath
    assert "pytest" not in versions
    install(tmp_path, "inner")
    install(tmp_path, "outer", ["Inner>=1.0", "extra; extra == 'all'", "windows; os_name == 'nt'"])
    monkeypatch.syspath_prepend(tmp_path)
    assert pydocs.dependencies() == versions
    assert pydocs.dependency_files() == files

    # control: what one of the five requires is read
    install(tmp_path, "sixth", ["outer[all] (>=1.0)"])
    monkeypatch.setattr(pydocs, "PACKAGES", (*pydocs.PACKAGES, "sixth"))
    assert pydocs.dependencies() == {**versions, "inner": "1.5", "outer": "1.5"}
    added = [("inner", "inner", tmp_path / "inner.py"), ("outer", "outer", tmp_path / "outer.py")]
    assert pydocs.dependency_files() == sorted(files + added)


def test_a_missing_dependency_is_reported_and_left_out(tmp_path, monkeypatch, small, capsys):
    """Catches: a traceback after `pip install --no-deps`, or text that is less in silence."""
    install(tmp_path, "sixth", ["never_installed"])
    monkeypatch.syspath_prepend(tmp_path)
    run("pydocs", "--out", tmp_path / "whole")
    assert "not installed" not in capsys.readouterr().out  # control
    monkeypatch.setattr(pydocs, "PACKAGES", (*pydocs.PACKAGES, "sixth"))
    run("pydocs", "--out", tmp_path / "less")
    line = "not installed, so not in the training text: never-installed\n"
    assert line in capsys.readouterr().out
    source = json.loads((tmp_path / "less" / "meta.json").read_text())["source"]
    assert source["dependencies"]["never-installed"] is None


DOCTEST = """Return the
sum of two numbers.

    >>> add(1, 2)
    3
"""
CODE_BLOCK = """Parse a file.

Use it like this::

    Some code that looks like words here.

Then close the file again."""
NUMPY = """Mean of it all.

Parameters
----------
x : array_like, optional
    The numbers to take the mean of.

See Also
--------
median : The number in the middle of them.

Notes
-----
It needs ``O(n)`` time to run."""
GOOGLE = """Args:
    dim (int): the dimension to reduce, with
        a second line.
    out (Tensor): a place.

Returns:
    A tensor of the same type."""
ROLES = """See :class:`~torch.nn.Module` and :func:`os.path.join`
for *more* about `this <http://x.y>`_."""
DIRECTIVES = """.. note::
    This one is slow on purpose.

.. code-block:: python

    This is code for you.

That is all there is."""
TABLE = """name   | size of it
-------+------
alpha  | one

x = y + 1

Two sentences, e.g. This one. And that one here."""


@pytest.mark.parametrize("raw, expected", [
    (DOCTEST, ["Return the sum of two numbers."]),
    (CODE_BLOCK, ["Parse a file.", "Then close the file again."]),
    (NUMPY, ["Mean of it all.", "The numbers to take the mean of.",
             "It needs O(n) time to run."]),
    (GOOGLE, ["The dimension to reduce, with a second line.", "A tensor of the same type."]),
    (ROLES, ["See Module and os.path.join for more about this."]),
    (DIRECTIVES, ["This one is slow on purpose.", "That is all there is."]),
    (TABLE, ["Two sentences, e.g. This one. And that one here."]),
    ("The result is {input} of the call.", []),
], ids=["doctest", "code", "numpy", "google", "roles", "directives", "table", "braces"])
def test_prose_keeps_sentences_and_drops_code(raw, expected):
    """Catches: a layout rule that eats a sentence or leaves code."""
    paragraphs, _ = pydocs.prose(raw)
    assert paragraphs == expected


def test_names_are_the_public_ones():
    """Catches: documents named after the file that defines a thing, or a private name."""
    exports = {
        "a.b.c.Thing": ["a.b.Thing"],
        "a.b.*": ["a.*"],
        "a.x.Other": ["z.Other"],
        "_py.*": ["pub.*"],
    }
    assert pydocs.public_name("a.b.c.Thing.method", exports) == "a.Thing.method"
    assert pydocs.public_name("a.x.Other", exports) == "a.x.Other"  # z merely imports it
    assert pydocs.public_name("_py.f", exports) == "pub.f"
    assert pydocs.public_name("_other.f", exports) is None
    assert pydocs.public_name("a._f", {}) is None


# ---- text

def test_one_file_comes_back_whole_and_is_cut_at_a_line_break(tmp_path, story):
    """Catches: characters lost or repeated at the cut between the splits."""
    run("text", story, "--out", tmp_path / "out", "--vocab_size", 512)
    (train,) = documents_of(tmp_path / "out", "train")
    (val,) = documents_of(tmp_path / "out", "val")
    assert train + val == STORY
    assert train.endswith("\n")
    assert 0.04 < len(val) / len(STORY) < 0.06


def test_a_book_in_one_line_is_cut_at_a_space(tmp_path):
    """Catches: a text with few line breaks that gets no validation, or nothing else."""
    (tmp_path / "line.txt").write_text("Title\n" + STORY.replace("\n", " "))
    run("text", tmp_path / "line.txt", "--out", tmp_path / "out")
    (train,) = documents_of(tmp_path / "out", "train")
    (val,) = documents_of(tmp_path / "out", "val")
    assert train.endswith(" ")
    assert 0.04 < len(val) / len(STORY) < 0.06


def test_every_document_comes_back_and_keeps_its_split(tmp_path):
    """Catches: documents lost, joined or cut; a split by place in the files, not by content; line
    ends, byte-order marks or "<|endoftext|>" that change the text."""
    texts = []
    for i in range(300):
        some = "something " * (i % 7)
        texts.append(f"Document {i} says {some}<|endoftext|> ünicode\nend")
    lines = [json.dumps({"text": text, "other": 1}) for text in texts[:200]]
    plain = "##".join(texts[200:]).replace("\n", "\r\n")
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_text("\n".join(lines[:100]) + "\n\n")
    (folder / "sub" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[100:]).encode()))
    (folder / "c.TXT").write_bytes(b"\xef\xbb\xbf" + plain.encode())
    (folder / "ignored.csv").write_text("not text")
    run("text", folder, "--separator", "##", "--out", tmp_path / "out")
    train = documents_of(tmp_path / "out", "train")
    val = documents_of(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts)
    assert len(val) == 16

    (folder / "a.jsonl").write_text("\n".join(reversed(lines[:100])))
    run("text", folder, "--separator", "##", "--out", tmp_path / "again")
    assert set(documents_of(tmp_path / "again", "val")) == set(val)
    assert documents_of(tmp_path / "again", "train") != train  # control: the order did change


def test_a_file_given_twice_is_read_once(tmp_path, story):
    """Catches: one text in both splits, because two paths lead to it."""
    (tmp_path / "link.txt").symlink_to(story)
    run("text", story, "--out", tmp_path / "once")
    run("text", story, tmp_path, tmp_path / ".." / tmp_path.name / "story.txt",
        "--out", tmp_path / "twice")
    assert shards(tmp_path / "twice") == shards(tmp_path / "once")
    (tmp_path / "other.txt").write_text(STORY[::-1])  # control: another text is read
    run("text", story, tmp_path / "other.txt", "--out", tmp_path / "both")
    assert shards(tmp_path / "both") != shards(tmp_path / "once")


@pytest.mark.row(68)
def test_order_of_the_files_does_not_matter(tmp_path, story):
    """Catches: other shards from the same command with its files in another order."""
    (tmp_path / "a.txt").write_text(STORY.upper())
    run("text", story, tmp_path / "a.txt", "--out", tmp_path / "out")
    before = contents(tmp_path / "out")
    run("text", tmp_path / "a.txt", story, "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    run("text", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert contents(tmp_path / "out") != before  # control


@pytest.mark.row(68)
def test_another_file_of_the_same_name_replaces_nothing(tmp_path, story, capsys, monkeypatch):
    """Catches: shards that a run was trained on, replaced by those of another input.txt; a hidden
    file whose shards land in data/ itself."""
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "input.txt").write_text(STORY + folder)
    run("text", "a/input.txt")
    before = contents(tmp_path / "data/input")
    (tmp_path / "data/input/.DS_Store").write_bytes(b"of a Mac")
    line = fails(capsys, "text", "b/input.txt")
    assert f"prepared from {tmp_path}/a/input.txt — choose another folder with --out" in line
    (tmp_path / "data/input/.DS_Store").unlink()
    assert contents(tmp_path / "data/input") == before
    run("text", "b/input.txt", "--out", "data/b")
    run("text", "a/input.txt")  # control: the same file again
    (tmp_path / ".notes.txt").write_text(STORY)
    run("text", ".notes.txt")
    assert sorted(os.listdir(tmp_path / "data")) == ["b", "input", "notes"]


def shards(folder):
    return {name: text for name, text in contents(folder).items() if name.endswith(".npy")}


@pytest.mark.row(43)
def test_a_copied_text_is_read_once(tmp_path, story, capsys):
    """Catches: one text in both splits as two files, be it with other line ends, with a byte-order
    mark or with more blank lines."""
    run("text", story, "--out", tmp_path / "once")
    assert "left out" not in capsys.readouterr().out  # control
    folder = tmp_path / "z"  # behind story.txt
    folder.mkdir()
    (folder / "z copy.txt").write_bytes(b"\xef\xbb\xbf" + STORY.replace("\n", "\r\n").encode())
    (folder / "z (2).md").write_text(STORY.replace("\n", "\n\n") + "\n")
    run("text", story, folder, "--out", tmp_path / "thrice")
    assert shards(tmp_path / "thrice") == shards(tmp_path / "once")
    assert "2 of 3 documents repeat another one and are left out" in capsys.readouterr().out


@pytest.mark.row(43)
def test_repeated_documents_are_on_one_side(tmp_path, capsys):
    """Catches: a document that is validated and trained on; one that counts twice for the share of
    validation; blank documents."""
    texts = [f"Document {i} says something of its own." for i in range(100)]
    rows = [{"text": text} for text in [*texts, " \n", "", *texts, *[texts[0]] * 500]]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("##\n\n##".join([*texts, "One more document."]))
    run("text", file, tmp_path / "b.txt", "--separator", "##", "--out", tmp_path / "out")
    train = documents_of(tmp_path / "out", "train")
    val = documents_of(tmp_path / "out", "val")
    assert sorted(train + val) == sorted([*texts, "One more document."])
    assert len(val) == 6
    assert "700 of 801 documents repeat another one" in capsys.readouterr().out


@pytest.mark.row(43)
def test_two_versions_of_a_text_are_reported(tmp_path, story, capsys):
    """Catches: a low validation loss, because most of the text is in training too."""
    lines = STORY.splitlines()
    version = "\n".join(f"{line} And so on, until {n}." for n, line in enumerate(lines))
    older = version.replace("Line 7:", "Row 7:")
    (tmp_path / "a.txt").write_text(version)
    (tmp_path / "b.txt").write_text(older)
    run("text", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert "passages for validation" not in capsys.readouterr().out  # control
    run("text", tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "out")
    assert "100% of the passages for validation are in the training text too" in \
        capsys.readouterr().out


@pytest.mark.row(43, 45)
def test_what_is_not_read_is_counted(tmp_path, capsys):
    """Catches: files of a folder that are passed over without a word; the older versions that
    editors and notebooks keep; a pipe for which it waits."""
    folder = tmp_path / "notes"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "a.txt").write_text(STORY)
    (folder / "b.MD").write_text(STORY[::-1])
    run("text", folder, "--out", tmp_path / "once")
    assert "not read" not in capsys.readouterr().out  # control
    for name in (".ipynb_checkpoints/a-checkpoint.txt", ".c.txt", "c.txt~", "d.pdf", "e.pdf"):
        (folder / name).write_text("Something else.")
    os.mkfifo(folder / "f.txt")
    (folder / "g.txt").symlink_to("nowhere")
    (folder / "h.txt").mkdir()
    (folder / "empty.txt").write_text("\n")
    run("text", folder, "--out", tmp_path / "again")
    assert shards(tmp_path / "again") == shards(tmp_path / "once")
    printed = capsys.readouterr().out
    assert "7 files are not read (2 hidden, 2 .pdf, 2 .txt, 1 .txt~)" in printed
    assert "1 files hold no text: " in printed


@pytest.mark.row(47)
@pytest.mark.parametrize("blank", [" ", "\n", "\t ", "\u00a0"])
def test_a_million_blanks_are_encoded(tmp_path, capsys, blank):
    """Catches: a panic of tiktoken's, in prepare_data.py or in any other script."""
    text = f"A word.{blank * 1_500_000}Another word. " + STORY
    ids = Tokenizer(512).encode(text)
    assert Tokenizer(512).decode(ids) == text
    (tmp_path / "a.txt").write_text(text)
    run("text", tmp_path / "a.txt", "--out", tmp_path / "out")
    with pytest.raises(BaseException, match="StackOverflow|BacktrackLimit|called .Result"):
        Tokenizer(512).bpe.encode_ordinary(text)  # control: it does panic
    capsys.readouterr()


@pytest.mark.row(52)
def test_one_of_two_preparations_wins(tmp_path, story, capsys, monkeypatch):
    """Catches: shards of one text beside the meta.json of another; a folder that is lost."""
    out = tmp_path / "out"
    run("text", story, "--out", out)
    before = contents(out)
    other = tmp_path / "other.txt"
    other.write_text(STORY.upper())
    script = (f"import os, sys; sys.path.insert(0, {str(Path(prepare_data.__file__).parent)!r})\n"
              f"import prepare_data\n"
              f"write = prepare_data.write_shards\n"
              f"def slow(*args):\n"
              f"    print('begun', flush=True)\n"
              f"    input()\n"
              f"    write(*args)\n"
              f"prepare_data.write_shards = slow\n"
              f"sys.exit(prepare_data.main(['text', {str(other)!r}, '--out', {str(out)!r}]))\n")
    first = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while first.stdout.readline() != "begun\n":
        assert first.poll() is None
    message = fails(capsys, "text", story, "--out", out)
    assert "out is being prepared by another process" in message
    assert contents(out) == before
    first.communicate("go\n", timeout=60)
    assert first.returncode == 0
    assert contents(out) != before
    run("text", story, "--out", out)  # control
    assert contents(out) == before
    assert names_in(tmp_path) == ["other.txt", "out", "story.txt"]


@pytest.mark.parametrize("grows", [True, False])
def test_a_file_that_changes_meanwhile_is_refused(tmp_path, capsys, monkeypatch, grows):
    """Catches: documents in the wrong split, or a traceback, because the file has others when it is
    read again."""
    file = tmp_path / "a.txt"
    lines = [f"Document {i} says something of its own. " * 9 for i in range(50)]
    file.write_text("##".join(lines))
    argv = ("text", file, "--separator", "##", "--out", tmp_path / "out")
    run(*argv)  # control
    split = prepare_data.Documents.split

    def changed(self, pieces):
        file.write_text("##".join([*lines, "One more."] if grows else lines[:-1]))
        return split(self, pieces)

    monkeypatch.setattr(prepare_data.Documents, "split", changed)
    assert "was changed while it was read" in fails(capsys, *argv)


def test_a_separator_that_separates_nothing_is_reported(tmp_path, story, capsys):
    """Catches: a mistyped separator that silently joins all documents."""
    out = tmp_path / "out"
    run("text", story, "--separator", "<|endoftxt|>", "--out", out)
    assert "'<|endoftxt|>' separates nothing" in capsys.readouterr().out
    run("text", story, "--separator", "lazy", "--out", out)
    assert "separates nothing" not in capsys.readouterr().out  # control
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} lazy dogs"}) + "\n" for i in range(400)))
    run("text", rows, "--separator", "lazy", "--out", out)
    assert "'lazy' separates nothing" in capsys.readouterr().out
    message = fails(capsys, "text", story, "--separator", "a\nb", "--out", out)
    assert "a separator must be within one line" in message


def test_shard_size_does_not_change_the_tokens(tmp_path, story, monkeypatch):
    """Catches: tokens lost or repeated where a shard is full."""
    run("text", story, "--out", tmp_path / "one")
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 1000)
    run("text", story, "--out", tmp_path / "many")
    assert documents_of(tmp_path / "many", "train") == documents_of(tmp_path / "one", "train")
    assert len(DataFolder(tmp_path / "one").train) == 1  # control: they do differ
    assert len(DataFolder(tmp_path / "many").train) > 3


def test_long_file_is_read_whole_in_pieces(tmp_path):
    """Catches: a file that must fit in memory; text lost between pieces."""
    (tmp_path / "long.txt").write_text(STORY * 200)  # 4 MB
    pieces = list(textfiles.read_pieces(tmp_path / "long.txt", None))
    texts = [text for text, _ in pieces]
    assert "".join(texts) == STORY * 200
    assert max(map(len, texts)) < 1.1e6
    assert len(pieces) > 3
    assert [starts for _, starts in pieces] == [True] + [False] * (len(pieces) - 1)


# ---- refusals and kills

JSON_LINE = b'{"text": "x"}\n'


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", JSON_LINE + b'{"text": \n', "a.jsonl, line 2: not valid JSON"),
    ("a.jsonl", b'\n[1]\n', "a.jsonl, row 0: not a JSON object"),
    ("a.jsonl", b'{"txt": "x"}', 'a.jsonl: no row has a string "text"'),
    ("a.jsonl", b'{"text": 5}', "a.jsonl, line 1"),
    ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1"),
    ("a.jsonl", b'[' * 100_000, "a.jsonl: not valid JSON (too deeply nested)"),
    ("a.txt", b"fine\n\xff\xfe\n", "a.txt, line 2: not UTF-8"),
    ("a.jsonl.gz", gzip.compress(JSON_LINE * 99, mtime=0)[:-9], "damaged gzip"),
    ("a.jsonl.gz", b"plain", "a.jsonl.gz, line 1: not valid JSON"),
    ("a.txt", b"", "too little text"),
    ("a.txt", b"Only a few words here.\nThat is all.\n", "too little text"),
    ("a.pdf", b"x", "expected .txt, .md"),
])
def test_bad_input_is_refused_in_one_line(tmp_path, capsys, name, content, message):
    """Catches: a traceback, a message without file and line, a folder left behind."""
    (tmp_path / name).write_bytes(content)
    assert message in fails(capsys, "text", tmp_path / name, "--out", tmp_path / "out")
    assert names_in(tmp_path) == [name]


def test_bad_arguments_are_refused_in_one_line(tmp_path, story, capsys):
    """Catches: a traceback for a wrong path or vocabulary."""
    assert "no such file" in fails(capsys, "text", tmp_path / "absent.txt")
    (tmp_path / "empty").mkdir()
    assert "expected .txt" in fails(capsys, "text", tmp_path / "empty")
    assert "--vocab_size: 99 is" in fails(capsys, "text", story, "--vocab_size", 99)


def test_files_of_others_are_never_deleted(tmp_path, story, capsys):
    """Catches: an --out with a typing error that deletes a folder of the user."""
    out = tmp_path / "out"
    command = ["text", story, "--out", out]
    run(*command)
    first = contents(out)
    run(*command)  # control: our own folder is replaced
    assert contents(out) == first

    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in fails(capsys, *command)
    (out / "notes.txt").unlink()
    (out / "meta.json").unlink()  # now these can be the shards of another project
    assert "did not write" in fails(capsys, *command)
    del first["meta.json"]
    assert contents(out) == first
    assert "is a file" in fails(capsys, "text", story, "--out", story)
    assert story.read_text() == STORY


def test_a_failed_rename_keeps_the_old_folder(tmp_path, story, capsys, monkeypatch):
    """Catches: an error at the last step that leaves neither the old folder nor the new one."""
    out = tmp_path / "out"
    run("text", story, "--out", out, "--vocab_size", 512)
    before = contents(out)
    rename = Path.rename

    def failing(path, target):
        if path.name.endswith(".preparing"):
            raise OSError("no room")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    assert "no room" in fails(capsys, "text", story, "--out", out, "--vocab_size", 300)
    assert contents(out) == before
    assert names_in(tmp_path) == ["out", "story.txt"]
    monkeypatch.undo()
    run("text", story, "--out", out, "--vocab_size", 300)
    assert contents(out) != before  # control


# A child process that kills itself before the n-th operation on files.
KILLED = """
import os, sys
from pathlib import Path
import numpy as np
import prepare_data

left = int(sys.argv[1])

def counted(function):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return wrapped

for module, name in ((np, "save"), (os, "fsync"), (os, "replace"), (os, "link"), (Path, "rename"),
                     (Path, "write_text")):
    setattr(module, name, counted(getattr(module, name)))
sys.exit(prepare_data.main(sys.argv[2:]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL")
def test_a_kill_leaves_a_whole_folder_or_none(tmp_path, story):
    """Catches: shards that training would read although the preparation did not finish."""
    out = tmp_path / "out"
    argv = ["text", str(story), "--out", str(out), "--vocab_size", "512"]
    main(argv)
    whole = contents(out)
    root = Path(prepare_data.__file__).parent
    kills = 0
    while True:
        command = [sys.executable, "-c", KILLED, str(kills + 1), *argv]
        code = subprocess.run(command, capture_output=True, cwd=root).returncode
        if out.exists():
            assert contents(out) == whole
        if code == 0:
            break
        assert code == -9
        kills += 1
    assert kills >= 8  # control: it was killed before every operation
    assert names_in(tmp_path) == ["out", "story.txt"]  # the last run deleted what was left


# ---- show

def test_show_prints_the_pieces(capsys):
    """Catches: pieces that do not add up to the text, or other ids than training reads."""
    run("show", "Hello world", "--vocab_size", 512)
    ids = Tokenizer(512).encode("Hello world")
    pieces, numbers, summary = capsys.readouterr().out.splitlines()
    assert pieces.replace("|", "") == "Hello world"
    assert pieces.count("|") == len(ids) - 1
    assert numbers == " ".join(map(str, ids))
    assert f"{len(ids)} tokens" in summary
