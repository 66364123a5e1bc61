"""data.py: the tokenizer against a slow BPE written out here, the order of windows, foreign shards, damaged files."""
import base64
import json
import random

import numpy as np
import pytest
import regex  # tiktoken's own dependency: the same pattern language in another implementation

import data
from data import DataFolder, Shard, Tokenizer, Windows, open_shard
from errors import UserError, script

SAMPLES = ["Hello world, it's 2024!", "  two  spaces\n\n\tand tabs \n", "naïve façade — 日本語 🤖", "x" * 50, "<|endoftext|>", "",
           "don't we'll I'M", "\x00\x7f\ufeff", "a\r\nb", "supercalifragilistic 1234567890"]


# ---- tokenizer

def slow_encode(text, vocab_size):
    """BPE as in the paper's words: in each piece merge the adjacent pair whose union has the lowest rank, until none is left."""
    lines = data.MERGES.read_bytes().splitlines()[:vocab_size - 1]
    rank = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    ids = []
    for piece in regex.findall(data.GPT2_PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = [(rank[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in rank]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [rank[part] for part in parts]
    return ids


@pytest.mark.parametrize("vocab_size", [257, 300, 2048, 50_257])
def test_truncated_vocabulary_merges_otherwise_than_gpt2_with_fewer_merges(vocab_size):
    tokenizer = Tokenizer(vocab_size)
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert ids == slow_encode(text, vocab_size)
        assert not ids or max(ids) < tokenizer.eot == vocab_size - 1


def test_control_the_slow_bpe_tells_vocabularies_apart():
    assert Tokenizer(2048).encode(SAMPLES[0]) != slow_encode(SAMPLES[0], 300)


@pytest.mark.parametrize("vocab_size", [257, 2048, 50_257])
def test_some_text_does_not_come_back(vocab_size):
    tokenizer, rng = Tokenizer(vocab_size), random.Random(0)
    anything = ["".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
                        for _ in range(rng.randrange(60))) for _ in range(200)]
    for text in SAMPLES + anything:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_literal_endoftext_in_text_becomes_the_special_token():
    tokenizer = Tokenizer()
    assert tokenizer.eot not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>" and tokenizer.byte_lengths[tokenizer.eot] == 0


@pytest.mark.parametrize("vocab_size", [0, 256, 50_258])
def test_vocab_size_out_of_range_is_accepted(vocab_size):
    with pytest.raises(UserError, match=str(vocab_size)):
        Tokenizer(vocab_size)


def test_altered_merge_table_is_used(tmp_path, monkeypatch):
    (tmp_path / "gpt2.tiktoken").write_bytes(data.MERGES.read_bytes()[:-1])
    monkeypatch.setattr(data, "MERGES", tmp_path / "gpt2.tiktoken")
    with pytest.raises(UserError, match="hash"):
        Tokenizer()
    monkeypatch.setattr(data, "MERGES", tmp_path / "absent")
    with pytest.raises(UserError, match="missing"):
        Tokenizer()


# ---- windows

def shards(*lengths):
    """Shards in memory whose tokens are all different, so that a token says where it stood."""
    starts = np.cumsum([0, *lengths])
    return [Shard(data.Path(f"{i}.npy"), np.arange(starts[i], starts[i + 1], dtype=np.uint16)) for i in range(len(lengths))]


def test_targets_not_shifted_by_one_or_window_across_shards():
    windows = Windows(shards(41, 33, 5, 60), seq_len=8, vocab_size=1000)
    assert windows.total == 40 // 8 + 32 // 8 + 0 + 59 // 8
    rows = windows.read(range(windows.total))
    assert rows.shape == (windows.total, 9) and rows.dtype == np.int64
    assert (np.diff(rows, axis=1) == 1).all()  # consecutive tokens
    first, firsts = [0, 41, 74, 79, 139], []
    for start, end in zip(first, first[1:]):
        firsts += list(range(start, end - 8, 8))  # written out: wT while wT + T is inside
    assert rows[:, 0].tolist() == firsts
    shard_of = np.searchsorted(first, rows, side="right")
    assert (shard_of == shard_of[:, :1]).all()


def test_a_window_is_read_twice_or_never_in_an_epoch():
    windows = Windows(shards(101, 57), seq_len=4, vocab_size=1000, seed=3)
    epochs = [windows.order(e * windows.total, windows.total).tolist() for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(windows.total))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]  # control: epochs differ
    assert Windows(windows.shards, 4, 1000, seed=4).order(0, windows.total).tolist() != epochs[0]
    plain = Windows(windows.shards, 4, 1000, shuffle=False)
    assert plain.order(0, 2 * plain.total).tolist() == 2 * list(range(plain.total))


def test_order_depends_on_how_it_was_asked_for():
    windows = Windows(shards(101, 57), seq_len=4, vocab_size=1000, seed=3)
    whole = windows.order(0, 200)
    for start, count in [(0, 1), (37, 5), (windows.total - 2, 4), (199, 1)]:  # across the epoch's end, backwards, alone
        fresh = Windows(windows.shards, 4, 1000, seed=3)
        assert fresh.order(start, count).tolist() == whole[start:start + count].tolist()
        assert windows.order(start, count).tolist() == whole[start:start + count].tolist()
    expected = np.random.RandomState([3, 1]).permutation(windows.total)  # design.md's formula
    assert windows.order(windows.total, windows.total).tolist() == expected.tolist()


def test_id_outside_the_vocabulary_is_not_named_with_its_place():
    short = shards(41, 33)
    short[1].tokens[20] = 7777
    windows = Windows(short, seq_len=8, vocab_size=1000)
    windows.read([0, 5, 6])  # control: the other windows are fine
    with pytest.raises(UserError, match=r"1\.npy.*7777.*offset 20"):
        windows.read([7])


def test_too_little_data_for_one_window_is_accepted():
    assert Windows(shards(9), seq_len=8, vocab_size=1000).total == 1
    with pytest.raises(UserError, match="do not fill one window"):
        Windows(shards(8), seq_len=8, vocab_size=1000)


# ---- shards and folders

TOKENS = np.arange(300, dtype=np.uint16)


def llmc(tokens, magic=20240520, version=1, declared=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if declared is None else declared
    return header.tobytes() + tokens.astype("<u2").tobytes()


def npy(path, array):
    np.save(path, array)
    return path


def test_shards_of_other_projects_are_misread(tmp_path):
    folders = {"build-nanogpt": ("edufineweb_val_000000.npy", "edufineweb_train_000001.npy"),
               "llm.c": ("fineweb_val_000000.bin", "fineweb_train_000001.bin"), "nanogpt": ("val.bin", "train.bin")}
    for name, files in folders.items():
        (tmp_path / name).mkdir()
        for file, tokens in zip(files, (TOKENS[:50], TOKENS)):
            path = tmp_path / name / file
            if path.suffix == ".npy":
                npy(path, tokens)
            else:
                path.write_bytes(llmc(tokens) if name == "llm.c" else tokens.tobytes())
        folder = DataFolder(tmp_path / name)
        assert folder.meta == {} and folder.vocab_size == 50_257
        assert folder.train[0].tokens.tolist() == TOKENS.tolist() and folder.val[0].tokens.tolist() == TOKENS[:50].tolist()


@pytest.mark.parametrize("make, message", [
    (lambda d: d / "absent.npy", "missing"),
    (lambda d: npy(d / "a.npy", TOKENS[:0]), "empty"),
    (lambda d: npy(d / "a.npy", TOKENS.astype(np.int64)), "int64"),
    (lambda d: npy(d / "a.npy", TOKENS.reshape(2, -1)), "2-D"),
    (lambda d: write(d / "a.npy", b""), "found 0 bytes"),
    (lambda d: write(d / "a.npy", npy(d / "b.npy", TOKENS).read_bytes()[:-5]), "found 723 bytes"),
    (lambda d: write(d / "a.bin", llmc(TOKENS, magic=7)), "magic.*20240520.*7"),
    (lambda d: write(d / "a.bin", llmc(TOKENS, version=2)), "version 1, found 2"),
    (lambda d: write(d / "a.bin", llmc(TOKENS, declared=400)), "expected 400 tokens, found 300"),
    (lambda d: write(d / "a.bin", llmc(TOKENS)[:-1]), "whole uint16"),
    (lambda d: write(d / "train.bin", TOKENS.tobytes()[:-1]), "whole uint16"),
    (lambda d: write(d / "train.bin", b""), "empty"),
])
def test_damaged_shard_is_accepted(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        open_shard(make(tmp_path))


def write(path, content):
    path.write_bytes(content)
    return path


def our_folder(path, train=TOKENS, declared=None):
    path.mkdir()
    np.save(path / "train_0000.npy", train)
    np.save(path / "val_0000.npy", TOKENS[:40])
    splits = {"train": [{"file": "train_0000.npy", "tokens": declared or len(train)}], "val": [{"file": "val_0000.npy", "tokens": 40}]}
    (path / "meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": 512, "splits": splits}))
    return path


def test_folder_with_wrong_meta_or_without_a_split_is_accepted(tmp_path):
    good = our_folder(tmp_path / "good")
    assert DataFolder(good).vocab_size == 512 and DataFolder(good).tokenizer.eot == 511  # control
    with pytest.raises(UserError, match="expected 301 tokens, found 300"):
        DataFolder(our_folder(tmp_path / "short", declared=301))
    for broken in ("", "{", "[]", "{}", '{"vocab_size": "x", "tokenizer": "gpt2"}'):
        (good / "meta.json").write_text(broken)
        with pytest.raises(UserError, match="meta.json"):
            DataFolder(good)
    with pytest.raises(UserError, match="no train shards in .*run: python prepare_data.py text"):
        DataFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="prepare_data.py pydocs"):
        DataFolder(tmp_path / "pydocs")


def test_fingerprint_misses_a_changed_byte_or_another_order(tmp_path):
    print_of = DataFolder(our_folder(tmp_path / "a")).fingerprint()
    assert DataFolder(our_folder(tmp_path / "b")).fingerprint() == print_of  # the same content, elsewhere
    changed = TOKENS.copy()
    changed[-1] += 1
    assert DataFolder(our_folder(tmp_path / "c", changed)).fingerprint() != print_of
    changed[-1], changed[:2] = TOKENS[-1], TOKENS[1::-1]
    assert DataFolder(our_folder(tmp_path / "d", changed)).fingerprint() != print_of
    large = np.zeros(64 * 65536, dtype=np.uint16)  # 8 MiB: sampled in blocks, first and last among them
    before = DataFolder(our_folder(tmp_path / "e", large)).fingerprint()
    large[-1] = 1
    assert DataFolder(our_folder(tmp_path / "f", large)).fingerprint() != before


# ---- errors

def test_a_users_mistake_ends_in_a_traceback_or_in_exit_code_0(capsys):
    def main(argv=None):
        raise argv
    for error, code, message in [(UserError("no data"), 2, "test_data.py: no data\n"), (UserError("disk", 4), 4, "test_data.py: disk\n"),
                                 (PermissionError(13, "Permission denied", "/x"), 2, "test_data.py: /x: Permission denied")]:
        with pytest.raises(SystemExit) as exit_:
            script(main)(error)
        assert exit_.value.code == code and capsys.readouterr().err.startswith(message)
    with pytest.raises(ZeroDivisionError):  # control: our own mistakes stay visible
        script(main)(ZeroDivisionError())
