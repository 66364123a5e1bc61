"""foreign_shards.py — files of GPT-2's token ids that other projects have written, checked before
they are used.

    build-nanogpt    .npy    a 1-D array of uint16
    llm.c            .bin    int32[256]: magic, version, number of tokens, …; then uint16
    nanoGPT          train.bin, val.bin: uint16 and nothing else

No file says what its ids stand for, so they are decoded and encoded again.
"""
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.textfiles import is_hidden, report_unread
from support.files import OF_THE_SYSTEM
from support.progress import tqdm
from support.runs import UserError, first_line_of

LLMC_MAGIC = 20240520
LLMC_VERSION = 1
LLMC_HEADER = 256 * 4  # bytes
IDS_AT_ONCE = 1 << 24
SUFFIXES = (".npy", ".bin")


@dataclass
class ForeignShard:
    path: Path
    tokens: np.ndarray  # (n,) uint16, memory-mapped
    offset: int | None  # bytes before the ids; None for .npy, whose header tells


def foreign_shards(folder, tokenizer, trust=False):
    """{"train": shards, "val": shards} of a folder of another project; prints what is not read.

    Raises UserError if a split has none, a file cannot be read, the ids are not those of
    `tokenizer`, GPT-2's, or text is in both splits. trust: do not ask what the ids stand for."""
    splits = {"train": [], "val": []}
    unread = []
    for file in sorted(folder.iterdir()):
        word = split_of(file)
        if word is not None and not is_hidden(file, folder):  # the file system of a Mac leaves some
            splits[word].append(open_foreign(file))
        elif not file.is_dir() and file.name not in OF_THE_SYSTEM:
            unread.append(file)
    report_unread(folder, unread, f"only {' and '.join(SUFFIXES)} with the word \"train\" or "
                                  f"\"val\" in the name are")
    for split, shards in splits.items():
        if not shards:
            raise UserError(f"{folder}: no file for {split} — its files need the suffix .npy or "
                            f".bin, and the word \"train\" or \"val\" in their names (folders in "
                            f"it are not read)")
        for shard in tqdm(shards, desc=f"checking {split}", unit=" files"):
            if not trust:
                check_meaning(shard, tokenizer)
    check_apart(splits["train"], splits["val"])
    return splits


def split_of(file):
    """"train" or "val", if the name contains it as a word: fineweb_train_000001.bin; else None."""
    words = re.split(r"[_.-]", file.name)
    found = [split for split in ("train", "val") if split in words]
    return found[0] if len(found) == 1 and file.suffix in SUFFIXES else None


# -------------------------------------------------------------------------------------------------
# The formats

def open_foreign(path):
    """The ForeignShard. Raises UserError naming the file, what was expected and what was found."""
    if not path.is_file():
        raise UserError(f"{path}: shard is missing — restore the file")
    if path.suffix == ".npy":
        shard = open_npy(path)
    else:
        shard = open_bin(path)
    if len(shard.tokens) == 0:
        raise UserError(f"{path}: expected tokens, found an empty shard — restore the file")
    return shard


def open_npy(path):
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except PermissionError:
        raise
    except Exception as error:  # of a damaged header NumPy raises almost any exception
        size = path.stat().st_size
        raise UserError(f"{path}: expected a .npy file of tokens, found {size} bytes that cannot "
                        f"be read as one ({first_line_of(error)}) — restore the file") from None
    if tokens.ndim != 1 or tokens.dtype != np.uint16:
        raise UserError(f"{path}: expected a 1-D uint16 array, found {tokens.ndim}-D "
                        f"{tokens.dtype} — convert it, if its ids are GPT-2's")
    return ForeignShard(path, tokens, offset=None)


def open_bin(path):
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) == 3 and header[0] == LLMC_MAGIC:
        if header[1] != LLMC_VERSION:
            raise UserError(f"{path}: expected llm.c format version {LLMC_VERSION}, found "
                            f"{header[1]} — write it again with llm.c of today")
        shard = map_uint16(path, LLMC_HEADER)
        if len(shard.tokens) != header[2]:
            raise UserError(f"{path}: expected {header[2]} tokens, found {len(shard.tokens)} — "
                            f"restore the file")
        return shard
    if path.name not in ("train.bin", "val.bin"):
        raise UserError(f"{path}: expected llm.c's magic number {LLMC_MAGIC}, found "
                        f"{header[:1].tolist()} — restore the file, or prepare its text")
    return map_uint16(path, offset=0)


def map_uint16(path, offset):
    size = path.stat().st_size - offset
    if size < 0 or size % 2 != 0:
        raise UserError(f"{path}: expected a header of {offset} bytes and whole uint16 tokens, "
                        f"found {offset + size} bytes — restore the file")
    tokens = np.empty(0, dtype=np.uint16)
    if size > 0:  # nothing cannot be mapped
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=offset)
    return ForeignShard(path, tokens, offset)


# -------------------------------------------------------------------------------------------------
# What the ids stand for

CHECKED_BLOCKS = 16
CHECKED_IDS = 512     # ids in such a block
# The share of them that must come back. Measured: 0.99 and more of text that GPT-2's tokenizer
# encoded in whole documents or lines, 0.97 of single sentences; 0.95 and less of other tables, but
# 0.98 and more of one that has nearly all of GPT-2's merges.
LEAST_SAME = 0.97


def check_meaning(shard, tokenizer):
    """Raise UserError if the ids of a shard cannot be those of `tokenizer`."""
    evidence = None
    if shard.path.with_name("meta.pkl").exists():
        evidence = "the meta.pkl beside it is nanoGPT's table of another vocabulary"
    elif looks_like_32_bits(shard.tokens):
        evidence = "every second id is 0, 1 or 2: these are 32-bit numbers"
    else:
        share = share_encoded_again(shard.tokens, tokenizer)
        if share < LEAST_SAME:
            evidence = (f"decoded and encoded again, only {share:.1%} of them are the same: "
                        f"another tokenizer made them")
    if evidence is not None:
        raise UserError(f"{shard.path}: its ids are not those of GPT-2's tokenizer ({evidence}) — "
                        f"prepare its text instead, or, if they are, give --trust")


def looks_like_32_bits(tokens):
    """Whether uint16 ids are the halves of 32-bit ones: then every second of them is small."""
    halves = tokens[1:1_000_000:2]
    return len(halves) > 0 and np.mean(halves < 3) > 0.9


def share_encoded_again(tokens, tokenizer):
    """Decode some blocks and encode their text again: the share of the ids that come back.

    Of GPT-2's ids nearly all do, except where a block begins or ends within a word. Ids of another
    tokenizer decode to a jumble of pieces, and some of them merge when it is encoded."""
    starts = np.linspace(0, max(0, len(tokens) - CHECKED_IDS), CHECKED_BLOCKS).astype(int)
    same = 0
    total = 0
    for start in np.unique(starts):
        block = tokens[start:start + CHECKED_IDS]
        block = block[block < tokenizer.vocab_size]
        for document in np.split(block, np.flatnonzero(block == tokenizer.eot)):
            ids = [int(token) for token in document if token != tokenizer.eot]
            again = tokenizer.encode(tokenizer.decode(ids))
            same += (Counter(ids) & Counter(again)).total()
            total += len(ids)
    return same / max(1, total)


# -------------------------------------------------------------------------------------------------
# No text in both splits

def check_apart(train, val):
    """Raise UserError if most of four passages of validation, evenly spread, stand in training
    too. (One may: web pages repeat each other.)"""
    passages = []
    for i in range(4):
        tokens = val[(2 * i + 1) * len(val) // 8].tokens
        length = min(100, len(tokens) // 8)
        start = (len(tokens) - length) * (2 * i + 1) // 8
        if length >= 20:  # else too short to tell
            passages.append(tokens[start:start + length])
    known = 0
    for passage in passages:
        known += any(holds(shard.tokens, passage) for shard in train)
    if known > len(passages) / 2:
        raise UserError(f"{val[0].path.parent}: text of the validation shards is in the training "
                        f"shards too — remove it from one of them")


def holds(tokens, passage):
    """Whether a passage stands in a shard."""
    for start in range(0, len(tokens), IDS_AT_ONCE):
        part = tokens[start:start + IDS_AT_ONCE + len(passage)]
        if passage.tobytes() in part.tobytes():
            return True
    return False
