"""data.py and support/shards.py: the tokenizer against a slow BPE written out here, the order of
windows, shards of other projects, damaged files."""
import base64
import hashlib
import io
import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import regex  # tiktoken's own dependency: the same pattern language in another implementation

import data
from data import DataFolder, Tokenizer, Windows
from support.runs import UserError
from support.shards import Shard, open_shard

# ---- tokenizer

SAMPLES = ["Hello world, it's 2024!", "  two  spaces\n\n\tand tabs \n", "naïve façade — 日本語 🤖",
           "x" * 50, "<|endoftext|>", "", "don't we'll I'M", "\x00\x7f\ufeff", "a\r\nb",
           "supercalifragilistic 1234567890"]
# As in encoder.py of GPT-2's release.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def ranks_of(vocab_size):
    ranks = {}
    for line in data.MERGES.read_bytes().splitlines()[:vocab_size - 1]:
        piece, rank = line.split()
        ranks[base64.b64decode(piece)] = int(rank)
    return ranks


def slow_encode(text, ranks):
    """BPE as the paper describes it: in each piece merge the adjacent pair whose union has the
    lowest rank, until no union is in the table."""
    ids = []
    for piece in regex.findall(PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            unions = [a + b for a, b in zip(parts, parts[1:])]
            known = [union for union in unions if union in ranks]
            if not known:
                break
            best = min(known, key=ranks.get)
            i = unions.index(best)
            parts[i:i + 2] = [best]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize("vocab_size", [257, 300, 2048, 50_257])
def test_small_vocab_equals_slow_bpe(vocab_size):
    """Catches: a small vocabulary that does not merge like GPT-2 with fewer merges."""
    tokenizer = Tokenizer(vocab_size)
    ranks = ranks_of(vocab_size)
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert ids == slow_encode(text, ranks)
        assert tokenizer.eot not in ids
    assert tokenizer.eot == vocab_size - 1
    # control: another number of merges shows
    assert tokenizer.encode(SAMPLES[0]) != slow_encode(SAMPLES[0], ranks_of(400))


def random_text(rng):
    """Up to 60 characters, a third of them ASCII; without surrogates, which are not characters."""
    text = ""
    for _ in range(rng.randrange(60)):
        first, end = rng.choice([(0, 128), (0, 0xD800), (0xE000, 0x110000)])
        text += chr(rng.randrange(first, end))
    return text


@pytest.mark.parametrize("vocab_size", [257, 2048, 50_257])
def test_any_text_comes_back(vocab_size):
    """Catches: text that the tokenizer changes, or lengths in bytes that are not the text's."""
    tokenizer = Tokenizer(vocab_size)
    rng = random.Random(0)
    texts = SAMPLES + [random_text(rng) for _ in range(200)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_endoftext_in_text_is_plain_text():
    """Catches: a document that ends where its text says <|endoftext|>; end-of-text that counts as
    bytes of text."""
    tokenizer = Tokenizer()
    assert tokenizer.eot not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
    assert tokenizer.byte_lengths[tokenizer.eot] == 0


@pytest.mark.parametrize("vocab_size", [0, 256, 50_258])
def test_vocab_size_has_a_range(vocab_size):
    """Catches: a tokenizer without all bytes, or with ids beyond GPT-2's table."""
    with pytest.raises(UserError, match=str(vocab_size)):
        Tokenizer(vocab_size)


def test_merge_table_is_verified(tmp_path, monkeypatch):
    """Catches: other ids than GPT-2's, from an altered table."""
    altered = tmp_path / "gpt2.tiktoken"
    altered.write_bytes(data.MERGES.read_bytes()[:-1])
    monkeypatch.setattr(data, "MERGES", altered)
    with pytest.raises(UserError, match="hash"):
        Tokenizer()
    altered.unlink()
    with pytest.raises(UserError, match="missing"):
        Tokenizer()


# ---- windows

def shards(*lengths):
    """Shards in memory. All their tokens are different, so a token tells where it is from."""
    found = []
    start = 0
    for i, length in enumerate(lengths):
        tokens = np.arange(start, start + length, dtype=np.uint16)
        found.append(Shard(Path(f"{i}.npy"), tokens))
        start += length
    return found


def test_windows_are_consecutive_tokens_of_one_shard():
    """Catches: targets that are not shifted by one, a window across shards, a last window that is
    lost or too short."""
    windows = Windows(shards(41, 16, 5, 60), seq_len=8, vocab_size=1000, shuffle=False)
    first = [0, 8, 16, 24, 32, 41, 62, 70, 78, 86, 94, 102, 110]
    expected = np.array(first)[:, None] + np.arange(9)
    rows = windows.read(0, windows.total)
    assert np.array_equal(rows, expected)
    assert rows.dtype == np.int64


def test_windows_cover_an_epoch_once():
    """Catches: a window that is read twice or never in an epoch; the same order in each epoch, or
    for each seed."""
    def orders(seed, shuffle=True):
        windows = Windows(shards(101, 57), 4, 1000, seed, shuffle)
        n = windows.total
        return [windows.read(epoch * n, n)[:, 0].tolist() for epoch in range(3)]

    in_file_order = [*range(0, 100, 4), *range(101, 157, 4)]
    found = orders(seed=3)
    for order in found:
        assert sorted(order) == in_file_order
    distinct = {tuple(order) for order in found + orders(seed=4)}
    assert len(distinct) == 6
    assert orders(seed=3, shuffle=False) == 3 * [in_file_order]


def test_order_depends_on_seed_and_position_alone():
    """Catches: an order that depends on what was read before, or on NumPy's version."""
    def fresh(shuffle=True):
        return Windows(shards(101, 57), 4, 1000, seed=3, shuffle=shuffle)

    n = fresh().total
    expected = [np.random.RandomState([3, epoch]).permutation(n) for epoch in range(3)]
    expected = fresh(shuffle=False).read(0, n)[np.concatenate(expected)]
    used = fresh()
    # All; across the end of an epoch; backwards; alone.
    for start, count in [(0, 3 * n), (n - 2, 4), (37, 5), (2 * n, 1), (0, 1)]:
        wanted = expected[start:start + count]
        assert np.array_equal(used.read(start, count), wanted)
        assert np.array_equal(fresh().read(start, count), wanted)
    assert not np.array_equal(expected[:n], expected[n:2 * n])  # control


def test_id_outside_the_vocabulary_is_named():
    """Catches: an index outside the embedding; a message that does not tell the place."""
    damaged = shards(41, 33)
    windows = Windows(damaged, seq_len=8, vocab_size=1000, shuffle=False)
    damaged[1].tokens[20] = 999
    windows.read(0, windows.total)  # control: the largest id is in
    damaged[1].tokens[20] = 1000
    windows.read(0, 7)  # control: the windows before it can be read
    with pytest.raises(UserError, match=r"1\.npy: token 1000 at offset 20"):
        windows.read(7, 1)


def test_one_window_is_enough():
    """Catches: a window without its last target; no message for too little data."""
    assert Windows(shards(9), seq_len=8, vocab_size=1000).total == 1
    with pytest.raises(UserError, match="8 tokens do not fill one window"):
        Windows(shards(8), seq_len=8, vocab_size=1000)


# ---- shards

TOKENS = np.arange(300, dtype=np.uint16)


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


# Text that GPT-2's tokenizer has encoded: folders of others must hold such ids.
SOURCE = Path(data.__file__).read_text()
IDS = np.array(Tokenizer().encode(SOURCE), dtype=np.uint16)


@pytest.mark.parametrize("pack, train, val", [
    (npy, "edufineweb_train_000001.npy", "edufineweb_val_000000.npy"),
    (npy, "medieval_train_000001.npy", "val.npy"),
    (llmc, "fineweb_train_000001.bin", "fineweb_val_000000.bin"),
    (nanogpt, "train.bin", "val.bin"),
])
def test_shards_of_other_projects_are_read(tmp_path, pack, train, val):
    """Catches: a header that is read as tokens; a file that is in the wrong split, as when "val"
    is only a part of a word."""
    (tmp_path / train).write_bytes(pack(IDS))
    (tmp_path / val).write_bytes(pack(IDS[:50]))
    (tmp_path / "val_notes.txt").write_text("not a shard")
    unused = tmp_path / f"trainer_valid{Path(val).suffix}"
    unused.write_bytes(pack(TOKENS))
    folder = DataFolder(tmp_path)
    assert [shard.path.name for shard in folder.train] == [train]
    assert [shard.path.name for shard in folder.val] == [val]
    assert np.array_equal(folder.train[0].tokens, IDS)
    assert np.array_equal(folder.val[0].tokens, IDS[:50])
    assert folder.vocab_size == 50_257
    assert folder.unused == [unused]
    folder.check_content()
    (tmp_path / train).write_bytes(pack(np.append(IDS, 50_257).astype(np.uint16)))
    with pytest.raises(UserError, match=f"{train}: token 50257 at offset {len(IDS)} is outside"):
        DataFolder(tmp_path).check_content()


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


@pytest.mark.parametrize("kind", OF_OTHERS)
def test_ids_of_other_tokenizers_are_refused(tmp_path, kind):
    """Catches: a run on numbers that stand for something else, with bits per byte that mean
    nothing. (Row 42.)"""
    ids = OF_OTHERS[kind]
    (tmp_path / "train.bin").write_bytes(IDS.tobytes())
    (tmp_path / "val.bin").write_bytes(IDS[:999].tobytes())
    DataFolder(tmp_path)  # control
    width = ids.dtype if "bits" in kind else np.uint16
    (tmp_path / "val.bin").write_bytes(ids.astype(width).tobytes())
    with pytest.raises(UserError, match="val.bin: its ids are not those of GPT-2's") as error:
        DataFolder(tmp_path)
    assert ("32-bit numbers" in str(error.value)) == ("bits" in kind)


def test_table_of_another_vocabulary_is_evidence(tmp_path):
    """Catches: nanoGPT's meta.pkl, which no one reads. (Row 42.)"""
    (tmp_path / "train.bin").write_bytes(IDS.tobytes())
    (tmp_path / "val.bin").write_bytes(IDS[:999].tobytes())
    DataFolder(tmp_path)  # control
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="meta.pkl beside it"):
        DataFolder(tmp_path)


def line_by_line():
    """Some projects encode each line for itself."""
    return np.concatenate([Tokenizer().encode(line) for line in SOURCE.splitlines(True)])


@pytest.mark.parametrize("ids", [
    IDS,
    IDS[:1],
    line_by_line(),
    Tokenizer().encode("中文的維基百科是一個自由的百科全書。" * 99),
    np.concatenate([[50_256, *Tokenizer().encode(line)] for line in SOURCE.splitlines()]),
])
def test_ids_of_gpt2_are_not_refused(tmp_path, ids):
    """Catches: a guard that refuses real data. The control of the two before. (Row 42.)"""
    (tmp_path / "train.bin").write_bytes(IDS.tobytes())
    (tmp_path / "val.bin").write_bytes(np.array(ids, dtype=np.uint16).tobytes())
    assert len(DataFolder(tmp_path).val[0].tokens) == len(ids)


@pytest.mark.parametrize("how", [Path.hardlink_to, Path.symlink_to, shutil.copy])
def test_one_content_is_never_in_both_splits(tmp_path, how):
    """Catches: validation on training text, by a link or a copy. (Row 43.)"""
    (tmp_path / "train.bin").write_bytes(IDS.tobytes())
    (tmp_path / "val.bin").write_bytes(IDS[:999].tobytes())
    DataFolder(tmp_path).fingerprint  # control
    (tmp_path / "val.bin").unlink()
    if how is shutil.copy:
        shutil.copy(tmp_path / "train.bin", tmp_path / "val.bin")
    else:
        how(tmp_path / "val.bin", tmp_path / "train.bin")
    with pytest.raises(UserError, match="train.bin and val.bin have the same content"):
        DataFolder(tmp_path).fingerprint


@pytest.mark.parametrize("train", ["train.bin", "x_train_0.npy"])
def test_validation_text_within_training_is_refused(tmp_path, train):
    """Catches: a validation shard that was copied out of the training text and not removed from it,
    or that is the same text in another format. (Row 43.)"""
    half = len(IDS) // 2
    (tmp_path / "val.bin").write_bytes(IDS[half:].tobytes())
    pack = npy if train.endswith(".npy") else nanogpt
    (tmp_path / train).write_bytes(pack(IDS[:half]))
    DataFolder(tmp_path).check_content()  # control
    (tmp_path / train).write_bytes(pack(IDS))
    with pytest.raises(UserError, match="val.bin: its text is in the training shards too"):
        DataFolder(tmp_path).check_content()


def test_link_to_nowhere_is_refused(tmp_path):
    """Catches: a traceback, or a split without its shard. (Row 54.)"""
    (tmp_path / "train.bin").write_bytes(IDS.tobytes())
    (tmp_path / "val.bin").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="val.bin: shard is missing"):
        DataFolder(tmp_path)


@pytest.mark.parametrize("name, content, message", [
    ("a.npy", npy(TOKENS[:0]), "empty"),
    ("a.npy", npy(TOKENS.astype(np.int64)), "found 1-D int64"),
    ("a.npy", npy(TOKENS.astype(">u2")), "found 1-D >u2"),
    ("a.npy", npy(TOKENS.reshape(2, -1)), "found 2-D"),
    ("a.npy", pickle.dumps([1, 2]), "cannot be read"),
    ("a.npy", b"", "found 0 bytes"),
    ("a.npy", npy(TOKENS)[:-5], "found 723 bytes"),
    ("a.bin", llmc(TOKENS, magic=7), r"magic number 20240520, found \[7\]"),
    ("a.bin", llmc(TOKENS, version=2), "version 1, found 2"),
    ("a.bin", llmc(TOKENS, declared=400), "400 tokens, found 300"),
    ("a.bin", llmc(TOKENS)[:-1], "whole uint16"),
    ("a.bin", llmc(TOKENS)[:100], "header of 1024 bytes and whole uint16"),
    ("a.bin", llmc(TOKENS)[:8], "magic"),
    ("train.bin", nanogpt(TOKENS)[:-1], "whole uint16"),
    ("train.bin", b"", "empty"),
])
def test_damaged_shard_is_refused(tmp_path, name, content, message):
    """Catches: training on bytes that are not tokens, a pickle that is run, a message without file
    and reason."""
    file = tmp_path / name
    with pytest.raises(UserError, match=f"{name}: shard is missing"):
        open_shard(file)
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: expected .*{message}"):
        open_shard(file)


def test_flipped_bit_in_a_header_is_refused_or_harmless(tmp_path):
    """Catches: a traceback, or wrong tokens, from a .npy file with one flipped bit in its first 128
    bytes, which are its header. All 1024 of them are tried."""
    file = tmp_path / "a.npy"
    intact = npy(TOKENS)
    wrong = []
    messages = []
    for bit in range(8 * 128):
        damaged = bytearray(intact)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            if not np.array_equal(open_shard(file).tokens, TOKENS):
                wrong.append(bit)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 1000  # control
    assert "\n" not in "".join(messages)
    assert wrong == []


# ---- folders

TRAIN = {"file": "train_0000.npy", "tokens": 300}
VAL = {"file": "val_0000.npy", "tokens": 40}


def our_folder(path, train=TOKENS, **changes):
    """A folder as prepare_data.py writes it; `changes` replaces fields of its meta.json."""
    path.mkdir()
    splits = {}
    for split, tokens in (("train", train), ("val", TOKENS[:40])):
        content = npy(tokens)
        (path / f"{split}_0000.npy").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        splits[split] = [{"file": f"{split}_0000.npy", "tokens": len(tokens), "sha256": sha256}]
    meta = {"tokenizer": "gpt2", "vocab_size": 512, "eot": 511, "dtype": "uint16",
            "splits": splits, **changes}
    (path / "meta.json").write_text(json.dumps(meta))
    return path


@pytest.mark.parametrize("changes", [
    {"tokenizer": "llama"},
    {"vocab_size": "512"},
    {"eot": 510},
    {"dtype": "uint32"},
    {"splits": {"train": [TRAIN]}},
    {"splits": {"train": [TRAIN], "val": [TRAIN]}},  # a file listed twice
    {"splits": {"train": [{"file": "train_0000.npy"}], "val": [VAL]}},
    {"splits": {"train": [{"file": 5, "tokens": 300}], "val": [VAL]}},
    {"splits": {"train": [TRAIN], "val": [{**TRAIN, "file": "./train_0000.npy"}]}},
    {"splits": {"train": [{**TRAIN, "file": "../a/train_0000.npy"}], "val": [VAL]}},
])
def test_meta_that_does_not_fit_is_refused(tmp_path, changes):
    """Catches: tokens of another format that are used because there is a meta.json; validation on
    training text."""
    splits = {"train": [TRAIN], "val": [VAL]}
    assert DataFolder(our_folder(tmp_path / "a", splits=splits)).tokenizer.eot == 511  # control
    with pytest.raises(UserError, match="not a valid meta.json"):
        DataFolder(our_folder(tmp_path / "b", **changes))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_broken_meta_is_refused(tmp_path, content):
    """Catches: a traceback from a damaged meta.json."""
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(UserError, match="not a valid meta.json"):
        DataFolder(tmp_path)


def test_missing_data_names_the_command(tmp_path):
    """Catches: a split that is short or empty; advice that does not make the missing data."""
    splits = {"train": [{**TRAIN, "tokens": 301}], "val": [VAL]}
    with pytest.raises(UserError, match="expected 301 tokens, found 300"):
        DataFolder(our_folder(tmp_path / "a", splits=splits))
    with pytest.raises(UserError, match="no train shards in .*run: python prepare_data.py text"):
        DataFolder(tmp_path / "nowhere")
    for name in ("pydocs", "fineweb-edu"):
        with pytest.raises(UserError, match=f"prepare_data.py {name}"):
            DataFolder(tmp_path / name)


@pytest.mark.parametrize("name", ["train_0000.npy", "val_0000.npy"])
def test_hashes_find_one_flipped_bit(tmp_path, name):
    """Catches: a damaged shard that nothing notices, since its length is right."""
    folder = our_folder(tmp_path / "a")
    DataFolder(folder).check_content()  # control
    damaged = bytearray((folder / name).read_bytes())
    damaged[-9] ^= 1
    (folder / name).write_bytes(damaged)
    with pytest.raises(UserError, match=f"{name}: its content is not"):
        DataFolder(folder).check_content()


def test_fingerprint_finds_a_changed_token(tmp_path):
    """Catches: a resume on other data, since names and lengths are the same."""
    def fingerprint(name, train):
        return DataFolder(our_folder(tmp_path / name, train)).fingerprint

    before = fingerprint("before", TOKENS)
    assert fingerprint("elsewhere", TOKENS) == before  # control: the folder does not matter
    changed = TOKENS.copy()
    changed[-1] += 1
    assert fingerprint("changed", changed) != before
    assert fingerprint("reordered", TOKENS[::-1]) != before

    large = np.zeros(64 * 65_536, dtype=np.uint16)  # 8 MiB: the first and last block are hashed
    before = fingerprint("large", large)
    large[-1] = 1
    assert fingerprint("changed at the end", large) != before
