"""prepare_data.py adopt: shards of other projects enter by one door, with all checks."""
from pathlib import Path

import numpy as np
import pytest

import data
import evaluate
import prepare_data
from conftest import exit_code, messages, run
from data import DataFolder, Tokenizer
from support.runs import UserError
from test_data import npy

# Text that GPT-2's tokenizer has encoded.
SOURCE = Path(data.__file__).read_text()
GPT2 = Tokenizer()
IDS = np.array(GPT2.encode(SOURCE), dtype=np.uint16)


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
    text = len(GPT2.decode(IDS[:HALF].tolist()).encode())
    assert found.meta["bytes"]["val"] == text
    found.check_content()
    (theirs / train).write_bytes(pack(np.append(IDS[HALF:], 50_257).astype(np.uint16)))
    assert f"{train}: token 50257 at offset {len(IDS) - HALF} is outside" in refused(theirs)


@pytest.mark.row(24, 25)
def test_run_on_adopted_shards_resumes_after_they_moved(tmp_path, capsys, short_samples):
    """Catches: a fingerprint of paths, after which moved shards are other data; shards that are
    gone, without a line that names them."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], IDS[:HALF])
    adopted = tmp_path / "adopted"
    assert adopt(theirs, adopted) is None
    flags = ("--max_steps", 2, "--batch_tokens", 16, "--micro_batch", 1, "--eval_tokens", 16)
    assert run(adopted, tmp_path / "r", *flags, "--stop_at", 1) == 75
    moved = theirs.rename(tmp_path / "elsewhere")
    assert run(adopted, tmp_path / "r", *flags, "--resume") == 2
    assert "theirs/train.bin: shard is missing" in messages(capsys)[-1]
    assert adopt(moved, adopted) is None  # it replaces its own folder
    assert run(adopted, tmp_path / "r", *flags, "--resume") == 0
    (moved / "val.bin").write_bytes(IDS[HALF - 99:HALF].tobytes())  # control
    assert adopt(moved, adopted) is None
    assert run(adopted, tmp_path / "r", *flags, "--resume", "--max_steps", 3) == 2
    assert "not the data of this run (changed: val.bin)" in messages(capsys)[-1]


@pytest.mark.row(42)
def test_folder_that_was_not_adopted_is_refused(whole, tmp_path, capsys):
    """Catches: shards of others that are read without a check; a line without the command."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], IDS[:HALF])
    assert run(theirs, tmp_path / "r") == 2
    assert f"adopt {theirs} --out data/NAME" in messages(capsys)[-1]
    assert exit_code(evaluate.main, [whole, "--data", theirs]) == 2
    assert f"adopt {theirs} --out data/NAME" in messages(capsys)[-1]
    assert not (tmp_path / "r/metrics.jsonl").exists()


# -------------------------------------------------------------------------------------------------
# What the ids stand for

def characters():
    """Numbers of characters, as nanoGPT's example for Shakespeare makes them."""
    letters = sorted(set(SOURCE))
    return np.array([letters.index(letter) for letter in SOURCE], dtype=np.uint16)


OF_OTHERS = {
    "characters": characters(),
    "32 bits": IDS.astype(np.uint32),
    "32 bits, ids above 65,535": IDS + 65_536 * (IDS % 2 == 0).astype(np.uint32),
    "a smaller vocabulary": np.array(Tokenizer(4096).encode(SOURCE), dtype=np.uint16),
    "the same pieces in another order": np.random.RandomState(0).permutation(50_257)[IDS]
    .astype(np.uint16),
}


@pytest.mark.row(42)
@pytest.mark.parametrize("kind", OF_OTHERS)
def test_ids_of_other_tokenizers_are_refused(tmp_path, kind):
    """Catches: a run on numbers that stand for something else, with bits per byte that mean
    nothing; ids that nobody has checked, of which the folder does not tell."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:])
    (theirs / "val.bin").write_bytes(OF_OTHERS[kind].tobytes())
    line = refused(theirs)
    assert "val.bin: its ids are not those of GPT-2's" in line and "--trust" in line
    assert ("32-bit numbers" in line) == ("bits" in kind)
    assert adopt(theirs, tmp_path / "out", "--trust") is None
    assert DataFolder(tmp_path / "out").meta["source"]["trusted"] is True


@pytest.mark.row(42)
def test_table_of_another_vocabulary_is_refused(tmp_path):
    """Catches: nanoGPT's meta.pkl, which no one reads."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], IDS[:HALF])
    prepare_data.prepare_adopted(tmp_path / "out", theirs)  # control
    assert DataFolder(tmp_path / "out").meta["source"]["trusted"] is False
    (theirs / "meta.pkl").write_bytes(b"")
    assert "meta.pkl beside it" in refused(theirs)


def test_ids_of_gpt2_are_accepted(tmp_path):
    """Catches: a guard that refuses real data, as that of projects that encode each line for
    itself. The control of the tests before."""
    lines = [GPT2.encode(line) for line in SOURCE.splitlines(True)]
    documents = [[50_256, *line] for line in lines]
    chinese = GPT2.encode("中文的維基百科是一個自由的百科全書。" * 99)
    for ids in (IDS[:1], np.concatenate(lines[:99]), np.concatenate(documents), chinese):
        theirs = folder_of(tmp_path / "theirs", IDS[HALF:], ids)
        prepare_data.prepare_adopted(tmp_path / "out", theirs)
        assert len(DataFolder(tmp_path / "out").val[0].tokens) == len(ids)


# -------------------------------------------------------------------------------------------------
# No text in both splits

@pytest.mark.row(43)
def test_text_in_both_splits_is_refused(tmp_path):
    """Catches: validation on training text, or training on a shard twice, by a link or a copy; a
    validation shard that was copied out of the training text and not removed from it."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], IDS[:HALF], ("x_train_0.npy", "val.npy"),
                       npy)
    (theirs / "x_train_1.npy").symlink_to(theirs / "x_train_0.npy")
    assert "have the same content" in refused(theirs)
    (theirs / "x_train_1.npy").unlink()
    prepare_data.prepare_adopted(tmp_path / "out", theirs)  # control
    (theirs / "val.npy").unlink()
    behind = np.append(IDS[:900], IDS[HALF:])  # its beginning is of its own
    for ids in (IDS[HALF:], IDS[-999:], behind):
        (theirs / "val.bin").write_bytes(nanogpt(ids))
        assert "text of the validation shards is in the training shards too" in refused(theirs)
    (theirs / "val.bin").unlink()
    for number, ids in enumerate((IDS[:900], IDS[-1999:-999], IDS[-999:])):
        (theirs / f"val_{number}.npy").write_bytes(npy(ids))
    assert "text of the validation shards is in" in refused(theirs)


# -------------------------------------------------------------------------------------------------
# Damage and mistakes

@pytest.mark.row(24)
@pytest.mark.parametrize("name, content, message", [
    ("train.npy", npy(IDS[:0]), "empty"),
    ("train.npy", npy(IDS.astype(np.int64)), "found 1-D int64"),
    ("train.npy", npy(IDS.astype(">u2")), "found 1-D >u2"),
    ("train.npy", npy(IDS[:300].reshape(2, -1)), "found 2-D"),
    ("train.npy", npy(IDS)[:-5], "that cannot be read"),
    ("train.npy", npy(IDS[:HALF]) + b"more", f"expected {HALF} tokens"),
    ("train_0.bin", llmc(IDS, magic=7), "magic number 20240520, found [7]"),
    ("train_0.bin", llmc(IDS, version=2), "version 1, found 2"),
    ("train_0.bin", llmc(IDS, declared=400), f"400 tokens, found {len(IDS)}"),
    ("train_0.bin", llmc(IDS)[:100], "header of 1024 bytes and whole uint16"),
    ("train_0.bin", llmc(IDS)[:8], "magic"),
    ("train.bin", nanogpt(IDS)[:-1], "whole uint16"),
    ("train.bin", b"", "empty"),
])
def test_damaged_foreign_shard_is_refused(tmp_path, name, content, message):
    """Catches: training on bytes that are not tokens, a message without file and reason."""
    theirs = folder_of(tmp_path / "theirs", IDS, IDS[HALF:])
    (theirs / "train.bin").unlink()
    (theirs / name).write_bytes(content)
    line = refused(theirs)
    assert f"{name}: expected" in line and message in line


@pytest.mark.row(54)
def test_adopt_mistakes_are_one_line(tmp_path, capsys, data):
    """Catches: a traceback; a folder of ours that is adopted; text that is lost."""
    theirs = folder_of(tmp_path / "theirs", IDS[HALF:], IDS[:HALF])
    linked = folder_of(tmp_path / "linked", IDS)
    (linked / "val.bin").unlink()
    (linked / "val.bin").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    for folder, out, message in [
        (tmp_path / "nowhere", "out", "nowhere: not a folder"),
        (data, "out", "is a data folder already"),
        (tmp_path / "notes", "out", "no file for train"),
        (linked, "out", "val.bin: shard is missing"),
        (theirs, "notes", "did not write — choose another --out"),
        (theirs, "theirs", "did not write — choose another --out"),
    ]:
        assert adopt(folder, tmp_path / out) == 2
        assert message in messages(capsys)[-1]
    assert not (tmp_path / "out").exists()
    assert adopt(theirs, tmp_path / "out") is None  # control
