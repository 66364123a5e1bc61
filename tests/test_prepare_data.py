"""prepare_data.py: the corpus of docstrings and the questions from it; the user's own text; kills
and bad input. The corpus is built once for all tests: by default a part of it, and with `-m slow`
the whole."""
import gzip
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

import prepare_data
from conftest import ROOT, exit_code, messages, write_lines
from corpus import pydocs, textfiles
from data import DataFolder, Tokenizer
from prepare_data import main

STORY = "".join(f"Line {i}: the quick brown fox met {i * i} lazy dogs.\n" for i in range(400))
QUALITIES = ("prose", "raw", "shuffled")
MARKUP = (">>>", "::", "`", "----", "\\", "{")


def run(*argv):
    assert main(argv) is None


def fails(capsys, *argv):
    """Run the script on bad input; returns its last line on stderr."""
    assert exit_code(main, argv) == 2
    return messages(capsys)[-1]


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


def shards(folder):
    return {name: text for name, text in contents(folder).items() if name.endswith(".npy")}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def story(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    return file


# ---- pydocs

def read_part(patch, modules):
    """Let the corpus be that of the files whose modules begin like these."""
    for name in ("source_files", "dependency_files"):
        files = [file for file in getattr(pydocs, name)() if file[1].startswith(modules)]
        patch.setattr(pydocs, name, lambda files=files: files)


PART = ("json", "decimal", "_pydecimal", "logging", "unittest", "email", "argparse", "collections",
        "tqdm", "numpy", "torch.nn", "torch._torch_docs", "matplotlib.axes",
        "fsspec", "mpmath", "jinja2", "urllib3", "requests", "packaging")  # dependencies


@pytest.fixture(scope="session", params=["part", pytest.param("whole", marks=pytest.mark.slow)])
def documents(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "part":
            read_part(patch, PART)
        return pydocs.build_corpus()


@pytest.fixture(scope="session")
def texts(documents):
    """{(quality, split): texts}."""
    found = {}
    for quality in QUALITIES:
        for split, text, _ in pydocs.pieces_of(documents, quality, quality):
            found.setdefault((quality, split), []).append(text)
    return found


@pytest.fixture(scope="session")
def corpus(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "prose"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pydocs, "build_corpus", lambda: documents)
        run("pydocs", "--out", folder)
    return folder


def name_of(document):
    return document.split("\n")[0]


def words_of(text):
    return [word for word in re.split(r"[^0-9a-z_]+", text.lower()) if word]


def runs_of_13(text):
    words = words_of(text)
    return {tuple(words[i:i + 13]) for i in range(len(words) - 12)}


def fragments(document):
    """Its sentences and all runs of 13 words in a line. Shares no code with prepare_data."""
    found = set()
    for line in document.split("\n")[1:]:  # the first line is a name
        for sentence in re.split(r"(?<=[.!?])\s+", line):
            found.add(tuple(words_of(sentence)))
        found |= runs_of_13(line)
    return found - {()}


@pytest.mark.parametrize("quality", ["prose", "raw"])
def test_validation_shares_no_text_with_training(texts, quality):
    """Catches: a sentence, or 13 words in a row, that is in both splits."""
    training = set()
    for document in texts[quality, "train"]:
        training |= fragments(document)
    val = texts["prose", "val"]
    assert not [document for document in val if fragments(document) & training]

    # control: one sentence in a document of training shows
    training |= fragments("b\nSurely no one has ever written exactly this.  Other.")
    assert fragments("a\nFirst. Surely no one has ever written exactly this.") & training
    # control: 13 words in a row show, 12 do not
    row = " ".join(f"w{i}" for i in range(13))
    training |= fragments(f"b\ny {row} z.")
    assert fragments(f"a\nx {row}") & training
    assert not fragments(f"a\nx {row[:-4]}") & training


def test_raw_validation_is_nearly_apart(texts):
    """Catches: raw validation text (prose is apart altogether) of which more than a little stands
    in the raw training text too."""
    val = set()
    for document in texts["raw", "val"]:
        val |= runs_of_13(document)
    known = set()
    for document in texts["raw", "train"]:
        known |= runs_of_13(document) & val
    assert 0 < len(known) / len(val) < 0.015


def test_corpus_is_large_balanced_and_free_of_markup(documents, texts):
    """Catches: lost files, a dominant package, mostly text of dependencies, private names, code or
    repeated paragraphs in the prose."""
    train = texts["prose", "train"]
    val = texts["prose", "val"]
    text = "\n".join(train)
    raw = "\n".join(texts["raw", "train"])
    assert len(text) > 1.2e6
    assert 0.01 < len("".join(val)) / len(text) < 0.1
    for mark in MARKUP:
        assert mark not in text
        assert mark in raw  # control

    names = [name_of(document) for document in train + val]
    assert {"json.dumps", "torch.abs", "torch.nn.Linear", "numpy.mean", "matplotlib.axes.Axes.plot",
            "decimal.Decimal.sqrt", "jinja2.Environment"} <= set(names)
    assert not [name for name in names if re.match(r"[\w.]*\._|_|test\.", name)]
    sizes = Counter()
    for document in documents:
        sizes[document.package] += len(document.text())
    added = sum(sizes.pop(package, 0) for package in pydocs.dependencies())
    assert 0.2 < added / len(text) < 0.5
    assert max(sizes.values()) < 0.34 * sum(sizes.values())
    paragraphs = []
    for document in train + val:
        paragraphs += document.split("\n")[1:]
    assert len(paragraphs) == len(set(paragraphs))


def test_shuffled_text_has_the_same_words(texts):
    """Catches: "shuffled" that loses words or leaves the order."""
    assert texts["prose", "train"] != texts["shuffled", "train"]
    words = {quality: sorted(" ".join(texts[quality, "train"]).split()) for quality in QUALITIES}
    assert words["prose"] == words["shuffled"]
    assert words["prose"] != words["raw"]  # control


def test_each_quality_changes_its_own_shard(tmp_path, documents, corpus, texts, monkeypatch):
    """Catches: scores on different validation texts compared with each other; a flag that does
    nothing, or changes the other shard or the questions."""
    monkeypatch.setattr(pydocs, "build_corpus", lambda: documents)
    for split, flag in (("train", "--quality"), ("val", "--val_quality")):
        run("pydocs", flag, "raw", "--out", tmp_path / split)
        assert documents_of(tmp_path / split, split) == texts["raw", split]
        before = contents(corpus)
        after = contents(tmp_path / split)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {f"{split}_0000.npy", "meta.json"}


def test_meta_describes_the_shards(corpus, texts):
    """Catches: wrong hashes, lengths, byte counts, or an end-of-text id of another vocabulary."""
    data = DataFolder(corpus)
    data.check_content()
    dependencies = data.meta["source"]["dependencies"]
    assert dependencies["sympy"] == importlib.metadata.version("sympy")
    for split in ("train", "val"):
        assert documents_of(corpus, split) == texts["prose", split]
        size = sum(len(text.encode()) for text in texts["prose", split])
        assert data.meta["bytes"][split] == size


@pytest.fixture(scope="session")
def items(corpus):
    lines = (corpus / "cloze.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_cloze_with_the_context_can_be_answered(items, texts):
    """Catches: an ending that does not continue its context in the validation text, or a wrong one
    that does; questions made from documents of training."""
    val = "\n".join(texts["prose", "val"])
    for item in items:
        found = [f"{item['ctx']} {ending}" in val for ending in item["endings"]]
        assert found == [place == item["label"] for place in range(4)]


def test_cloze_without_the_context_is_chance(items):
    """Catches: right endings that are longer, or more common, or at one place more often: all four
    questions of a block have the same endings, and each is right once. A block with two documents
    of one file."""
    assert len(items) >= 100
    for start in range(0, len(items), 4):
        block = items[start:start + 4]
        endings = block[0]["endings"]
        assert all(item["endings"] == endings for item in block)
        assert len(set(endings)) == 4
        assert sorted(item["label"] for item in block) == [0, 1, 2, 3]
        modules = {item["source_id"].split(":")[0] for item in block}
        assert len(modules) == 4
        lengths = [len(ending) for ending in endings]
        assert max(lengths) - min(lengths) <= 4


def test_instructions_carry_the_split_of_their_document(corpus, texts):
    """Catches: a held-out answer that was in the training text."""
    rows = json.loads((corpus / "instruct.json").read_text())
    answers = {row["instruction"]: row["output"] for row in rows}
    assert len(rows) == len(answers)
    start = "Serialize obj to a JSON formatted str."
    assert answers["What does `json.dumps` do?"].startswith(start)
    for split in ("train", "val"):
        names = {name_of(document) for document in texts["prose", split]}
        asked = {re.search("`(.*)`", row["instruction"])[1] for row in rows
                 if row["split"] == split}
        assert asked
        assert asked <= names


@pytest.fixture
def small(monkeypatch):
    """The files of a corpus that is read in a second."""
    read_part(monkeypatch, ("json", "logging", "unittest", "tqdm", "email"))
    return pydocs.source_files()


def test_the_second_process_changes_nothing(tmp_path, monkeypatch, small):
    """Catches: a second process that is needed, that reads something else, or that always fails, so
    that one process reads all."""
    whole = pydocs.read_sources(small)
    assert pydocs.ask_helper(small[1::2]) == whole[1::2]
    with pytest.raises(subprocess.CalledProcessError):
        pydocs.ask_helper([("json", "json", None)])  # control
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    assert pydocs.read_sources(small) == whole


def test_dependencies_add_training_text_only(tmp_path, monkeypatch, small, capsys):
    """Catches: a validation text, or questions, that change with the dependencies; a sentence of
    validation that a dependency brings into training; one that is missing without a word."""
    monkeypatch.setattr(pydocs, "limit_largest_package", lambda documents: documents)
    run("pydocs", "--out", tmp_path / "without")
    assert "not installed" not in capsys.readouterr().out  # control
    held_out = documents_of(tmp_path / "without", "val")
    known = max(held_out, key=len).split("\n")[1]
    new = "Surely no one has ever written this."
    (tmp_path / "copy.py").write_text(f'"""{new} {known}"""')
    (tmp_path / "new.py").write_text(f'"""{new}"""')
    files = [(name, name, tmp_path / f"{name}.py") for name in ("copy", "new")]
    monkeypatch.setattr(pydocs, "dependency_files", lambda: files)
    # `copy` and `new` stand for dependencies, whose documents are not in instruct.json
    versions = {"copy": "1.0", "new": "1.0", "absent": None}
    monkeypatch.setattr(pydocs, "dependencies", lambda: versions)
    run("pydocs", "--out", tmp_path / "with")

    assert "not installed, so not in the training text: absent\n" in capsys.readouterr().out
    train = documents_of(tmp_path / "with", "train")
    assert f"new\n{new}" in train
    assert not [document for document in train if known in document]
    before = contents(tmp_path / "without")
    after = contents(tmp_path / "with")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"train_0000.npy", "meta.json"}


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
    operating system; a requirement of a requirement that is missed; a traceback for one that is
    not installed."""
    versions = pydocs.dependencies()
    files = pydocs.dependency_files()
    assert {"sympy", "mpmath", "python-dateutil"} <= versions.keys()  # SymPy requires mpmath
    install(tmp_path, "inner", ["never_installed"])
    install(tmp_path, "outer", ["Inner>=1.0", "extra; extra == 'all'", "windows; os_name == 'nt'"])
    install(tmp_path, "sixth", ["outer[all] (>=1.0)"])
    monkeypatch.syspath_prepend(tmp_path)
    assert pydocs.dependencies() == versions

    # control: what one of the five requires is read
    monkeypatch.setattr(pydocs, "PACKAGES", (*pydocs.PACKAGES, "sixth"))
    new = {"inner": "1.5", "outer": "1.5", "never-installed": None}
    assert pydocs.dependencies() == {**versions, **new}
    added = [("inner", "inner", tmp_path / "inner.py"), ("outer", "outer", tmp_path / "outer.py")]
    assert pydocs.dependency_files() == sorted(files + added)


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


# ---- text

@pytest.mark.parametrize("text, end", [(STORY, "\n"), ("Title\n" + STORY.replace("\n", " "), " ")])
def test_one_text_comes_back_whole_and_is_cut_near_its_end(tmp_path, text, end):
    """Catches: characters lost or repeated at the cut between the splits; a book in one line that
    gets no validation, or nothing else."""
    (tmp_path / "a.txt").write_text(text)
    run("text", tmp_path / "a.txt", "--out", tmp_path / "out")
    (train,) = documents_of(tmp_path / "out", "train")
    (val,) = documents_of(tmp_path / "out", "val")
    assert train + val == text
    assert train.endswith(end)
    assert 0.04 < len(val) / len(text) < 0.06


@pytest.mark.row(43)
def test_every_document_comes_back_once_and_keeps_its_split(tmp_path, capsys):
    """Catches: documents lost, joined or cut; one that is validated and trained on, or counts twice
    for the share of validation; a split by place in the files, not by content; line ends,
    byte-order marks or "<|endoftext|>" that change the text."""
    texts = [f"Document {i} says {'some ' * (i % 7)}<|endoftext|> ünicode\nend" for i in range(300)]
    rows = [{"text": text, "other": 1} for text in texts[:200]]
    plain = "##".join(texts[200:]).replace("\n", "\r\n")
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    write_lines(folder / "a.jsonl", [*rows[:100], {"text": " \n"}, *[rows[0]] * 500])
    packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    (folder / "sub" / "b.jsonl.gz").write_bytes(packed)
    (folder / "c.TXT").write_bytes(b"\xef\xbb\xbf" + plain.encode())
    run("text", folder, "--separator", "##", "--out", tmp_path / "out")
    train = documents_of(tmp_path / "out", "train")
    val = documents_of(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts)
    assert len(val) == 16
    assert "600 of 900 documents repeat another one" in capsys.readouterr().out

    write_lines(folder / "a.jsonl", rows[99::-1])
    run("text", folder, "--separator", "##", "--out", tmp_path / "again")
    assert set(documents_of(tmp_path / "again", "val")) == set(val)
    assert documents_of(tmp_path / "again", "train") != train  # control: the order did change


@pytest.mark.row(43, 68)
def test_a_text_is_read_once_and_in_any_order(tmp_path, story, capsys):
    """Catches: one text in both splits, because two paths lead to it, or as a copy with other line
    ends, a byte-order mark or more blank lines; other shards from the same files in another
    order."""
    other = tmp_path / "other.txt"
    other.write_text(STORY[::-1])
    run("text", story, other, "--out", tmp_path / "once")
    assert "left out" not in capsys.readouterr().out  # control
    (tmp_path / "link.txt").symlink_to(story)
    folder = tmp_path / "z"  # behind story.txt
    folder.mkdir()
    (folder / "z copy.txt").write_bytes(b"\xef\xbb\xbf" + STORY.replace("\n", "\r\n").encode())
    (folder / "z (2).md").write_text(STORY.replace("\n", "\n\n") + "\n")
    run("text", other, folder, tmp_path / "link.txt", story, folder / ".." / "story.txt",
        "--out", tmp_path / "often")
    assert shards(tmp_path / "often") == shards(tmp_path / "once")
    assert "2 of 4 documents repeat another one and are left out" in capsys.readouterr().out
    run("text", story, "--out", tmp_path / "less")
    assert shards(tmp_path / "less") != shards(tmp_path / "once")  # control


@pytest.mark.row(68)
def test_another_file_of_the_same_name_is_refused(tmp_path, capsys, monkeypatch):
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
    run("text", "a/input.txt")  # control: the same file again
    assert contents(tmp_path / "data/input") == before
    (tmp_path / ".notes.txt").write_text(STORY)
    run("text", ".notes.txt")
    assert sorted(os.listdir(tmp_path / "data")) == ["input", "notes"]


@pytest.mark.row(43)
def test_two_versions_of_a_text_are_reported(tmp_path, capsys):
    """Catches: a low validation loss, because most of the text is in training too."""
    lines = [f"{line} And so on, until {n}." for n, line in enumerate(STORY.splitlines())]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n".join(lines).replace("Line 7:", "Row 7:"))
    run("text", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert "passages for validation" not in capsys.readouterr().out  # control
    run("text", tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "out")
    assert "100% of the passages for validation are in the training text too" in \
        capsys.readouterr().out


@pytest.mark.row(43, 45, 57)
@pytest.mark.parametrize("source", ["text", "fineweb-edu --from"])
def test_what_is_not_read_is_counted(tmp_path, capsys, source):
    """Catches: files of a folder that are passed over without a word; the older versions that
    editors and notebooks keep; a pipe for which it waits; a .json beside others read as text, or a
    lone one not."""
    folder = tmp_path / "notes"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    rows = [{"text": f"{line}\n"} for line in STORY.splitlines()]
    (folder / "a.json").write_text(json.dumps(rows))
    argv = (*source.split(), folder, "--out")
    run(*argv, tmp_path / "once")
    assert "not read" not in capsys.readouterr().out  # control
    write_lines(folder / "a.jsonl", rows)
    for name in (".ipynb_checkpoints/a-copy.jsonl", ".c.jsonl", ".DS_Store", "d.pdf", "e.pdf"):
        (folder / name).write_text("Something else.")
    os.mkfifo(folder / "f.jsonl")
    (folder / "g.jsonl").symlink_to("nowhere")
    run(*argv, tmp_path / "again")
    assert shards(tmp_path / "again") == shards(tmp_path / "once")
    printed = capsys.readouterr().out
    assert "7 files are not read (2 hidden, 2 .pdf, 2 .jsonl, 1 .json)" in printed


@pytest.mark.row(45)
def test_a_separator_that_separates_nothing_is_reported(tmp_path, story, capsys):
    """Catches: a mistyped separator, or one for JSON lines, that silently does nothing."""
    rows = tmp_path / "rows.jsonl"
    write_lines(rows, [{"text": f"{i} lazy dogs"} for i in range(400)])
    for file, separator, is_reported in ((story, "<|endoftxt|>", True), (story, "lazy", False),
                                         (rows, "lazy", True)):
        run("text", file, "--separator", separator, "--out", tmp_path / "out")
        said = f"{separator!r} separates nothing" in capsys.readouterr().out
        assert said == is_reported


@pytest.mark.row(52)
def test_one_of_two_preparations_is_refused(tmp_path, story, capsys, monkeypatch):
    """Catches: shards of one text beside the meta.json of another; a folder that is lost."""
    out = tmp_path / "out"
    run("text", story, "--out", out)
    before = contents(out)
    other = tmp_path / "other.txt"
    other.write_text(STORY.upper())
    write_shards = prepare_data.write_shards

    def meanwhile(*args):
        message = fails(capsys, "text", story, "--out", out)
        assert "out is being prepared by another process" in message
        assert contents(out) == before
        write_shards(*args)

    monkeypatch.setattr(prepare_data, "write_shards", meanwhile)
    run("text", other, "--out", out)
    assert contents(out) != before
    monkeypatch.undo()
    run("text", story, "--out", out)  # control
    assert contents(out) == before
    assert names_in(tmp_path) == ["other.txt", "out", "story.txt"]


def test_a_file_that_grows_meanwhile_is_refused(tmp_path, capsys, monkeypatch):
    """Catches: documents in the wrong split, or a traceback, because the file has others when it is
    read again."""
    file = tmp_path / "a.txt"
    text = "##".join(f"Document {i} says something of its own. " * 9 for i in range(50))
    file.write_text(text)
    argv = ("text", file, "--separator", "##", "--out", tmp_path / "out")
    run(*argv)  # control
    split = prepare_data.Documents.split

    def changed(self, pieces):
        file.write_text(f"{text}##One more.")
        return split(self, pieces)

    monkeypatch.setattr(prepare_data.Documents, "split", changed)
    assert "was changed while it was read" in fails(capsys, *argv)


def test_shard_size_does_not_change_the_tokens(tmp_path, story, monkeypatch):
    """Catches: tokens lost or repeated where a shard is full."""
    run("text", story, "--out", tmp_path / "one")
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 1000)
    run("text", story, "--out", tmp_path / "many")
    assert documents_of(tmp_path / "many", "train") == documents_of(tmp_path / "one", "train")
    assert len(DataFolder(tmp_path / "many").train) > 3  # control: they do differ


def test_long_file_is_read_whole_in_pieces(tmp_path):
    """Catches: a file that must fit in memory; text lost between pieces."""
    (tmp_path / "long.txt").write_text(STORY * 200)  # 4 MB
    pieces = list(textfiles.read_pieces(tmp_path / "long.txt", None))
    texts = [text for text, _ in pieces]
    assert "".join(texts) == STORY * 200
    assert max(map(len, texts)) < 1.1e6
    assert [starts for _, starts in pieces] == [True] + [False] * (len(pieces) - 1)


# ---- refusals and kills

JSON_LINE = b'{"text": "x"}\n'


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", JSON_LINE + b'{"text": \n', "a.jsonl, line 2: not valid JSON"),
    ("a.jsonl", b'\n[1]\n', "a.jsonl, row 0: not a JSON object"),
    ("a.jsonl", b'{"text": 5}', "a.jsonl, line 1"),
    ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1"),
    ("a.jsonl", b'[' * 100_000, "a.jsonl: not valid JSON (too deeply nested)"),
    ("a.txt", b"fine\n\xff\xfe\n", "a.txt, line 2: not UTF-8"),
    ("a.jsonl.gz", gzip.compress(JSON_LINE * 99, mtime=0)[:-9], "damaged gzip"),
    ("a.txt", b"Only a few words here.\nThat is all.\n", "too little text"),
    ("a.pdf", b"x", "expected .txt, .md"),
])
def test_bad_input_is_refused_in_one_line(tmp_path, capsys, name, content, message):
    """Catches: a traceback, a message without file and line, a folder left behind."""
    (tmp_path / name).write_bytes(content)
    sources = [["text"]]
    if name == "a.jsonl":
        sources.append(["fineweb-edu", "--from"])
    for source in sources:
        assert message in fails(capsys, *source, tmp_path / name, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_bad_arguments_are_refused_in_one_line(tmp_path, story, capsys):
    """Catches: a traceback for a wrong path, vocabulary or separator."""
    assert "no such file" in fails(capsys, "text", tmp_path / "absent.txt")
    assert "--vocab_size: 99 is" in fails(capsys, "text", story, "--vocab_size", 99)
    message = fails(capsys, "text", story, "--separator", "a\nb", "--out", tmp_path / "out")
    assert "a separator must be within one line" in message


def test_a_folder_of_others_is_refused(tmp_path, story, capsys):
    """Catches: an --out with a typing error that deletes or overwrites what the user has there."""
    out = tmp_path / "out"
    run("text", story, "--out", out)
    run("text", story, "--out", out)  # control: our own folder is replaced
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in fails(capsys, "text", story, "--out", out)
    (out / "notes.txt").unlink()
    (out / "meta.json").unlink()  # now these can be the shards of another project
    first = contents(out)
    for source in (["text", story], ["pydocs"], ["fineweb-edu", "--from", story],
                   ["alpaca", "--from", story], ["hellaswag", "--from", story]):
        assert "prepare_data.py did not write" in fails(capsys, *source, "--out", out)
        assert contents(out) == first
    assert "is a file" in fails(capsys, "text", story, "--out", story)
    assert story.read_text() == STORY


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


def killed_before(n, argv, env=None):
    """Whether the script was killed before its n-th operation, rather than done."""
    command = [sys.executable, "-c", KILLED, str(n), *map(str, argv)]
    process = subprocess.run(command, capture_output=True, cwd=ROOT, text=True, env=env)
    assert process.returncode in (0, -9), process.stderr
    return process.returncode == -9


def test_a_kill_leaves_a_whole_folder_or_none(tmp_path, story):
    """Catches: shards that training would read although the preparation did not finish; a kill that
    leaves neither the old folder nor the new one. It takes its time: each kill needs a process."""
    out = tmp_path / "out"
    argv = ["text", story, "--out", out, "--vocab_size", 512]
    run(*argv)
    whole = contents(out)
    kills = 0
    for n in range(12, 0, -1):  # each run begins with what a later kill has left
        kills += killed_before(n, argv)
        if out.exists():
            assert contents(out) == whole
        else:
            assert contents(tmp_path / ".out.replaced") == whole
    assert 8 <= kills < 12  # control: it was killed before every operation
    run(*argv)
    assert contents(out) == whole
    assert names_in(tmp_path) == ["out", "story.txt"]  # the last run deleted what was left


# ---- show

def test_show_prints_the_pieces(capsys):
    """Catches: pieces that do not add up to the text, or other ids than training reads."""
    run("show", "Hello world", "--vocab_size", 512)
    ids = Tokenizer(512).encode("Hello world")
    pieces, numbers, _ = capsys.readouterr().out.splitlines()
    assert pieces.split("|") == [Tokenizer(512).decode([token]) for token in ids]
    assert numbers == " ".join(map(str, ids))
