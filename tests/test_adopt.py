"""prepare_data.py adopt: shards of other projects enter by one door, with all checks."""
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import data
import evaluate
import prepare_data
from conftest import evals, exit_code, messages, rows, run, same
from data import DataFolder, Tokenizer
from support.runs import UserError

# Text that GPT-2's tokenizer has encoded.
SOURCE = Path(data.__file__).read_text()
IDS = np.array(Tokenizer().encode(SOURCE), dtype=np.uint16)


def npy(tokens):
    file = io.BytesIO()
    np.save(file, tokens)
    return file.getvalue()


def llmc(tokens, magic=20240520, version=1, declared=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = [magic, version, declared or len(tokens)]
    return header.tobytes() + tokens.tobytes()


def nanogpt(tokens):
    return tokens.tobytes()


def folder_of(path, train, val=IDS[:999], names=("train.bin", "val.bin"), pack=nanogpt):
    """A folder as another project leaves it."""
    path.mkdir(parents=True, exist_ok=True)
    for name, ids in zip(names, (train, val)):
        (path / name).write_bytes(pack(np.asarray(ids, dtype=np.uint16)))
    return path


def adopt(folder, out, *flags):
    return exit_code(prepare_data.main, ["adopt", folder, "--out", out, *flags])


def refused(folder, *flags):
    """The line with which a folder is refused; nothing is left of it."""
    out = folder.parent / "refused"
    with pytest.raises(UserError) as error:
        prepare_data.prepare_adopted(out, folder, *flags)
    assert not out.exists() and not (out.parent / ".refused.preparing").exists()
    return str(error.value)


HALF = len(IDS) // 2


@pytest.mark.row(45)
@pytest.mark.parametrize("pack, train, val", [
    (npy, "edufineweb_train_000001.npy", "edufineweb_val_000000.npy"),
    (npy, "medieval_train_000001.npy", "val.npy"),
    (llmc, "fineweb_train_000001.bin", "fineweb_val_000000.bin"),
    (nanogpt, "train.bin", "val.bin"),
])
def test_shards_of_other_projects_are_adopted(tmp_path, capsys, pack, train, val):
    """Catches: a header that is read as tokens; a file in the wrong split, as when "val" is only a
    part of a word; a copy of 20 GB; a file that is not read, without a word."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], IDS[:HALF], (train, val), pack)
    (theirs / f"trainer_valid{Path(val).suffix}").write_bytes(pack(IDS))
    (theirs / f".{train}").write_bytes(b"of a Mac")
    assert adopt(theirs, tmp_path / "out") is None
    printed = capsys.readouterr().out
    assert f"2 files are not read (1 hidden, 1 {Path(val).suffix})" in printed
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["meta.json"]
    found = DataFolder(tmp_path / "out")
    assert [shard.path for shard in found.train] == [theirs / train]
    assert [shard.path for shard in found.val] == [theirs / val]
    assert np.array_equal(found.train[0].tokens, IDS[HALF:])
    assert np.array_equal(found.val[0].tokens, IDS[:HALF])
    assert found.vocab_size == 50_257
    text = len(Tokenizer().decode(IDS[:HALF].tolist()).encode())
    assert found.meta["bytes"]["val"] == text
    found.check_content()
    (theirs / train).write_bytes(pack(np.append(IDS[HALF:], 50_257).astype(np.uint16)))
    assert f"{train}: token 50257 at offset {len(IDS) - HALF} is outside" in refused(theirs)


@pytest.fixture
def adopted(tmp_path):
    """Runs on adopted shards need a network with all of GPT-2's ids."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], IDS[:HALF])
    assert adopt(theirs, tmp_path / "adopted") is None
    return tmp_path / "adopted"


@pytest.mark.row(24, 25)
def test_run_on_adopted_shards_resumes_after_they_moved(adopted, tmp_path, capsys):
    """Catches: a fingerprint of paths, after which moved shards are other data; shards that are
    gone, without a line that names them."""
    assert run(adopted, tmp_path / "whole", "--max_steps", 4) == 0
    assert run(adopted, tmp_path / "r", "--max_steps", 4, "--stop_at", 2) == 75
    shutil.move(tmp_path / "theirs", tmp_path / "elsewhere")
    assert run(adopted, tmp_path / "r", "--resume", "--max_steps", 4) == 2
    assert "theirs/train.bin: shard is missing" in messages(capsys)[-1]
    assert adopt(tmp_path / "elsewhere", adopted) is None  # it replaces its own folder
    assert run(adopted, tmp_path / "r", "--resume", "--max_steps", 4) == 0
    assert same(tmp_path / "r", tmp_path / "whole", step=4)
    assert exit_code(evaluate.main, [tmp_path / "r", "--eval_tokens", 64]) is None
    assert evals(tmp_path / "r") and len(rows(tmp_path / "r")) == 4
    (tmp_path / "elsewhere/val.bin").write_bytes(IDS[HALF - 99:HALF].tobytes())  # control
    assert adopt(tmp_path / "elsewhere", adopted) is None
    assert run(adopted, tmp_path / "r", "--resume", "--max_steps", 6) == 2
    assert "not the data of this run (changed: val.bin)" in messages(capsys)[-1]


@pytest.mark.row(42)
@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_folder_that_was_not_adopted_names_the_command(whole, tmp_path, capsys, script):
    """Catches: shards of others that are read without a check."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], IDS[:HALF])
    if script == "train":
        assert run(theirs, tmp_path / "r") == 2
        assert not (tmp_path / "r/metrics.jsonl").exists()
    else:
        assert exit_code(evaluate.main, [whole, "--data", theirs]) == 2
    assert f"adopt {theirs} --out data/NAME" in messages(capsys)[-1]


# -------------------------------------------------------------------------------------------------
# What the ids stand for

def characters():
    """Numbers of characters, as nanoGPT's example for Shakespeare makes them."""
    letters = sorted(set(SOURCE))
    return np.array([letters.index(letter) for letter in SOURCE], dtype=np.uint16)


OF_OTHERS = {
    "characters": characters(),
    "bytes": np.frombuffer(SOURCE.encode(), dtype=np.uint8).astype(np.uint16),
    "32 bits": IDS.astype(np.uint32),
    "64 bits": IDS.astype(np.int64),
    "32 bits, ids above 65,535": IDS + 65_536 * (IDS % 2 == 0).astype(np.uint32),
    "a smaller vocabulary": np.array(Tokenizer(4096).encode(SOURCE), dtype=np.uint16),
    "the same pieces in another order": np.random.RandomState(0).permutation(50_257)[IDS],
    "four other ids first": np.minimum(IDS + 4, 50_256),
    "shifted by a byte": np.frombuffer(IDS.tobytes()[1:-1], dtype=np.uint16),
}


@pytest.mark.row(42)
@pytest.mark.parametrize("kind", OF_OTHERS)
def test_ids_of_other_tokenizers_are_refused(tmp_path, kind):
    """Catches: a run on numbers that stand for something else, with bits per byte that mean
    nothing."""
    ids = OF_OTHERS[kind]
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], IDS[:HALF])
    prepare_data.prepare_adopted(tmp_path / "out", theirs)  # control
    width = ids.dtype if "bits" in kind else np.uint16
    (theirs / "val.bin").write_bytes(ids.astype(width).tobytes())
    line = refused(theirs)
    assert "val.bin: its ids are not those of GPT-2's" in line and "--trust" in line
    assert ("32-bit numbers" in line) == ("bits" in kind)


@pytest.mark.row(42)
def test_trust_is_noted(tmp_path):
    """Catches: ids that nobody has checked, of which the folder does not tell."""
    theirs = folder_of(tmp_path / "theirs", IDS, characters())
    assert "are not those of GPT-2's" in refused(theirs)  # control
    assert adopt(theirs, tmp_path / "out", "--trust") is None
    source = DataFolder(tmp_path / "out").meta["source"]
    assert source == {"name": "adopt", "paths": [str(theirs)], "trusted": True}


@pytest.mark.row(42)
def test_table_of_another_vocabulary_is_evidence(tmp_path):
    """Catches: nanoGPT's meta.pkl, which no one reads."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], IDS[:HALF])
    prepare_data.prepare_adopted(tmp_path / "out", theirs)  # control
    (theirs / "meta.pkl").write_bytes(b"")
    assert "meta.pkl beside it" in refused(theirs)


def line_by_line():
    """Some projects encode each line for itself."""
    return np.concatenate([Tokenizer().encode(line) for line in SOURCE.splitlines(True)])


@pytest.mark.row(42)
@pytest.mark.parametrize("ids", [
    IDS[:HALF],
    IDS[:1],
    line_by_line()[:HALF],
    Tokenizer().encode("中文的維基百科是一個自由的百科全書。" * 99),
    np.concatenate([[50_256, *Tokenizer().encode(line)] for line in SOURCE.splitlines()]),
])
def test_ids_of_gpt2_are_not_refused(tmp_path, ids):
    """Catches: a guard that refuses real data. The control of the others."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], ids)
    prepare_data.prepare_adopted(tmp_path / "out", theirs)
    assert len(DataFolder(tmp_path / "out").val[0].tokens) == len(ids)


# -------------------------------------------------------------------------------------------------
# No text in both splits

@pytest.mark.row(43)
@pytest.mark.parametrize("how", [Path.hardlink_to, Path.symlink_to, shutil.copy])
@pytest.mark.parametrize("name", ["val.bin", "x_train_1.npy"])
def test_one_content_is_adopted_once(tmp_path, how, name):
    """Catches: validation on training text, or training on a shard twice, by a link or a copy."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], IDS[:HALF], ("x_train_0.npy", "val.npy"),
                       npy)
    prepare_data.prepare_adopted(tmp_path / "out", theirs)  # control
    target = theirs / name.replace(".bin", ".npy")
    target.unlink(missing_ok=True)
    if how is shutil.copy:
        shutil.copy(theirs / "x_train_0.npy", target)
    else:
        how(target, theirs / "x_train_0.npy")
    line = refused(theirs)
    assert "is in the training shards too" in line or "have the same content" in line


@pytest.mark.row(43)
@pytest.mark.parametrize("name", ["train.bin", "x_train_0.npy"])
def test_validation_text_within_training_is_refused(tmp_path, name):
    """Catches: a validation shard that was copied out of the training text and not removed from it,
    or that is the same text in another format."""
    pack = npy if name.endswith(".npy") else nanogpt
    theirs = folder_of(tmp_path / "theirs", IDS, IDS[HALF:])
    (theirs / "train.bin").unlink()
    (theirs / name).write_bytes(pack(IDS[:HALF]))
    prepare_data.prepare_adopted(tmp_path / "out", theirs)  # control
    (theirs / name).write_bytes(pack(IDS))
    assert "val.bin: its text is in the training shards too" in refused(theirs)


# -------------------------------------------------------------------------------------------------
# Damage and mistakes

@pytest.mark.row(24)
@pytest.mark.parametrize("name, content, message", [
    ("train.npy", npy(IDS[:0]), "empty"),
    ("train.npy", npy(IDS.astype(np.int64)), "found 1-D int64"),
    ("train.npy", npy(IDS.astype(">u2")), "found 1-D >u2"),
    ("train.npy", npy(IDS[:300].reshape(2, -1)), "found 2-D"),
    ("train.npy", b"", "found 0 bytes"),
    ("train.npy", npy(IDS)[:-5], "that cannot be read"),
    ("train.npy", npy(IDS[:HALF]) + b"more", f"expected {HALF} tokens"),
    ("train_0.bin", llmc(IDS, magic=7), "magic number 20240520, found [7]"),
    ("train_0.bin", llmc(IDS, version=2), "version 1, found 2"),
    ("train_0.bin", llmc(IDS, declared=400), f"400 tokens, found {len(IDS)}"),
    ("train_0.bin", llmc(IDS)[:-1], "whole uint16"),
    ("train_0.bin", llmc(IDS)[:100], "header of 1024 bytes and whole uint16"),
    ("train_0.bin", llmc(IDS)[:8], "magic"),
    ("train.bin", nanogpt(IDS)[:-1], "whole uint16"),
    ("train.bin", b"", "empty"),
])
def test_damaged_foreign_shard_is_refused(tmp_path, name, content, message):
    """Catches: training on bytes that are not tokens, a message without file and reason."""
    theirs = folder_of(tmp_path / "theirs", IDS[:HALF], IDS[HALF:])
    prepare_data.prepare_adopted(tmp_path / "out", theirs)  # control
    (theirs / "train.bin").unlink()
    (theirs / name).write_bytes(content)
    line = refused(theirs)
    assert f"{name}: expected" in line and message in line


@pytest.mark.row(54)
def test_link_to_nowhere_is_refused(tmp_path):
    """Catches: a traceback, or a split without its shard."""
    theirs = folder_of(tmp_path / "theirs", IDS)
    (theirs / "val.bin").unlink()
    (theirs / "val.bin").symlink_to(tmp_path / "nowhere")
    assert "val.bin: shard is missing" in refused(theirs)


def test_adopt_mistakes_are_one_line(tmp_path, capsys, data):
    """Catches: a traceback; a folder of ours that is adopted; text that is lost."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], IDS[:HALF])
    before = json.dumps([file.name for file in sorted(theirs.iterdir())])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    for folder, out, message in [
        (tmp_path / "nowhere", "out", "nowhere: not a folder"),
        (theirs / "train.bin", "out", "not a folder"),
        (data, "out", "is a data folder already"),
        (tmp_path / "notes", "out", "no file for train"),
        (theirs, "notes", "did not write — choose another --out"),
        (theirs, "theirs", "did not write — choose another --out"),
    ]:
        assert adopt(folder, tmp_path / out) == 2
        assert message in messages(capsys)[-1]
    assert not (tmp_path / "out").exists()
    assert json.dumps([file.name for file in sorted(theirs.iterdir())]) == before
    assert adopt(theirs, tmp_path / "out") is None  # control
