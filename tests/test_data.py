"""data.py: the tokenizer against a slow BPE written out here, the order of windows, damaged
folders."""
import base64
import hashlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import regex  # tiktoken's own dependency: the same pattern language in another implementation

import data
from data import DataFolder, Shard, Tokenizer, Windows, open_shard
from support.runs import UserError

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


@pytest.mark.parametrize("vocab_size", [257, 2048, 50_257])
def test_small_vocab_equals_slow_bpe(vocab_size):
    """Catches: a small vocabulary that does not merge like GPT-2 with fewer merges; "<|endoftext|>"
    in a text that ends its document; lengths in bytes that are not the text's."""
    tokenizer = Tokenizer(vocab_size)
    ranks = ranks_of(vocab_size)
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert ids == slow_encode(text, ranks)
        assert tokenizer.eot not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.eot == vocab_size - 1
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
    assert tokenizer.byte_lengths[tokenizer.eot] == 0
    # control: another number of merges shows
    assert tokenizer.encode(SAMPLES[0]) != slow_encode(SAMPLES[0], ranks_of(400))


@pytest.mark.row(47)
@pytest.mark.parametrize("blank", [" ", "\u00a0"])
def test_a_million_blanks_are_encoded(blank):
    """Catches: a panic of tiktoken's, in any script."""
    tokenizer = Tokenizer(512)
    text = f"A word.{blank * 1_500_000}Another word."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(BaseException, match="StackOverflow|BacktrackLimit|called .Result"):
        tokenizer.bpe.encode_ordinary(text)  # control: it does panic


def test_another_table_is_refused(tmp_path, monkeypatch):
    """Catches: a tokenizer without all bytes, with ids beyond GPT-2's table, or with other ids than
    GPT-2's from an altered table."""
    for vocab_size in (256, 50_258):
        with pytest.raises(UserError, match=str(vocab_size)):
            Tokenizer(vocab_size)
    altered = tmp_path / "gpt2.tiktoken"
    altered.write_bytes(data.MERGES.read_bytes()[:-1])
    monkeypatch.setattr(data, "MERGES", altered)
    with pytest.raises(UserError, match="hash"):
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
    lost or too short; no message for too little data."""
    windows = Windows(shards(41, 16, 5, 60), seq_len=8, vocab_size=1000, shuffle=False)
    first = [0, 8, 16, 24, 32, 41, 62, 70, 78, 86, 94, 102, 110]
    expected = np.array(first)[:, None] + np.arange(9)
    rows = windows.read(0, windows.total)
    assert np.array_equal(rows, expected)
    assert rows.dtype == np.int64
    with pytest.raises(UserError, match="8 tokens do not fill one window"):
        Windows(shards(8), seq_len=8, vocab_size=1000)


def test_order_depends_on_seed_and_position_alone():
    """Catches: an order that depends on what was read before, or on NumPy's version; a window that
    is read twice or never in an epoch; the same order in each epoch, or for each seed."""
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


@pytest.mark.row(26)
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


# ---- shards

TOKENS = np.arange(300, dtype=np.uint16)


def npy(tokens):
    file = io.BytesIO()
    np.save(file, tokens)
    return file.getvalue()


RAW = bytes(124) + TOKENS.tobytes()


@pytest.mark.row(24)
@pytest.mark.parametrize("content, offset, message", [
    (npy(TOKENS[:299]), None, "found .299,. uint16"),
    (npy(TOKENS.astype(np.int64)), None, "found .300,. int64"),
    (npy(TOKENS.astype(">u2")), None, "found .300,. >u2"),
    (pickle.dumps([1, 2]), None, "that cannot be read"),
    (b"", None, "found 0 bytes"),
    (npy(TOKENS)[:-5], None, "found 723 bytes"),
    (npy(TOKENS) + b"more", None, "in 732 bytes"),
    (RAW[:-1], 124, "found 723 bytes"),
    (RAW, 123, "in 724 bytes"),
    (RAW, -2, "that cannot be read"),
    (RAW, "124", "that cannot be read"),
])
def test_damaged_shard_is_refused(tmp_path, content, offset, message):
    """Catches: training on bytes that are not tokens (half a token, a header, the end of another
    shard), a pickle that is run, a message without file and reason."""
    file = tmp_path / "a.npy"
    with pytest.raises(UserError, match="a.npy: shard is missing"):
        open_shard(file, 300, offset)
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"a.npy: expected 300 tokens.*({message})"):
        open_shard(file, 300, offset)


def test_shards_of_both_kinds_are_read(tmp_path):
    """Catches: a header that is read as tokens. The control of the test before."""
    (tmp_path / "a.npy").write_bytes(npy(TOKENS))
    (tmp_path / "a.bin").write_bytes(RAW)
    for name, offset in (("a.npy", None), ("a.bin", 124), ("a.bin", None)):
        assert np.array_equal(open_shard(tmp_path / name, 300, offset).tokens, TOKENS)


# ---- folders

TRAIN = {"file": "train_0000.npy", "tokens": 300, "sha256": "a"}
VAL = {"file": "val_0000.npy", "tokens": 40, "sha256": "b"}


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


@pytest.mark.row(43, 54, 55)
@pytest.mark.parametrize("changes", [
    {"tokenizer": "llama"},
    {"vocab_size": "512"},
    {"eot": 510},
    {"dtype": "uint32"},
    {"splits": {"train": [TRAIN]}},
    {"splits": {"train": [TRAIN], "val": []}},
    {"splits": {"train": [TRAIN, TRAIN], "val": [VAL]}},
    {"splits": {"train": [TRAIN], "val": [{**TRAIN, "file": "./train_0000.npy"}]}},
    {"splits": {"train": [{**TRAIN, "file": 5}], "val": [VAL]}},
    {"splits": {"train": TRAIN, "val": VAL}},
    b"", b"[]", b"{}", b"\xff", b"[" * 100_000,
])
def test_meta_that_does_not_fit_is_refused(tmp_path, changes):
    """Catches: a traceback; tokens of another format that are used because there is a meta.json;
    validation on training text."""
    splits = {"train": [TRAIN], "val": [VAL]}
    folder = our_folder(tmp_path / "a", splits=splits)
    assert DataFolder(folder).tokenizer.eot == 511  # control
    if isinstance(changes, bytes):
        (folder / "meta.json").write_bytes(changes)
    else:
        folder = our_folder(tmp_path / "b", **changes)
    with pytest.raises(UserError, match="not the meta.json of a data folder"):
        DataFolder(folder)


@pytest.mark.row(24)
def test_missing_data_names_the_command(tmp_path):
    """Catches: a split that is short or empty; advice that does not make the missing data."""
    splits = {"train": [{**TRAIN, "tokens": 301}], "val": [VAL]}
    with pytest.raises(UserError, match="expected 301 tokens, found .300,."):
        DataFolder(our_folder(tmp_path / "a", splits=splits))
    with pytest.raises(UserError, match="no data of ours in .*run: python prepare_data.py text"):
        DataFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="prepare_data.py fineweb-edu"):
        DataFolder(tmp_path / "fineweb-edu")


@pytest.mark.row(54)
def test_hashes_find_one_flipped_bit(tmp_path):
    """Catches: a damaged shard that nothing notices, since its length is right."""
    for name in ("train_0000.npy", "val_0000.npy"):
        folder = our_folder(tmp_path / name)
        DataFolder(folder).check_content()  # control
        damaged = bytearray((folder / name).read_bytes())
        damaged[-9] ^= 1
        (folder / name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name}: its content is not"):
            DataFolder(folder).check_content()


@pytest.mark.row(25)
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
