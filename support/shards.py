"""shards.py — files of token ids, ours and of three other projects, checked before they are used.

ours, build-nanogpt    .npy    a 1-D array of uint16
llm.c                  .bin    int32[256]: magic, version, number of tokens, …; then uint16
nanoGPT                train.bin, val.bin: uint16 and nothing else
"""
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.runs import UserError

LLMC_MAGIC = 20240520
LLMC_VERSION = 1
LLMC_HEADER = 256 * 4  # bytes
BLOCK = 65_536         # bytes of a block of the fingerprint
BLOCKS = 64
IDS_AT_ONCE = 1 << 24  # read at once when all of them are checked

ADVICE = "prepare the data again or restore the file"


@dataclass
class Shard:
    path: Path
    tokens: np.ndarray  # (n,) uint16, memory-mapped

    def sha256(self):
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def fingerprint(self):
        """[name, number of tokens, SHA-256 over 64 evenly spaced blocks of 64 KiB], so that even a
        terabyte is recognized in seconds. A file below 4 MiB is hashed whole."""
        size = self.path.stat().st_size
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            if size < BLOCKS * BLOCK:
                digest.update(file.read())
            else:
                for block in range(BLOCKS):
                    file.seek((size - BLOCK) * block // (BLOCKS - 1))
                    digest.update(file.read(BLOCK))
        return [self.path.name, len(self.tokens), digest.hexdigest()]


def open_shard(path, declared=None):
    """Memory-map one file. `declared`: the number of tokens that meta.json promises.

    Raises UserError naming the file, what was expected, and what was found."""
    if not path.is_file():
        raise UserError(f"{path}: shard is missing — {ADVICE}")
    if path.suffix == ".npy":
        tokens = open_npy(path)
    else:
        tokens = open_bin(path)
    if declared is not None and len(tokens) != declared:
        raise UserError(f"{path}: expected {declared} tokens, found {len(tokens)} — {ADVICE}")
    if len(tokens) == 0:
        raise UserError(f"{path}: expected tokens, found an empty shard — {ADVICE}")
    return Shard(path, tokens)


# -------------------------------------------------------------------------------------------------
# Ids of other projects: no file says what they stand for, so look for evidence

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
                        f"prepare its text with prepare_data.py, or, if they are, put a meta.json "
                        f"like ours beside it")


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


def check_ids(shard, vocab_size):
    """Raise UserError if any id of the shard is outside the vocabulary; this reads all of them."""
    for start in range(0, len(shard.tokens), IDS_AT_ONCE):
        check_range(shard, start, shard.tokens[start:start + IDS_AT_ONCE], vocab_size)


def check_range(shard, start, tokens, vocab_size):
    """Raise UserError naming shard, offset and id if one of `tokens`, which begin at offset
    `start`, is not in the vocabulary: it would index outside the embedding."""
    if tokens.max() >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))  # the first of them
        raise UserError(f"{shard.path}: token {tokens[at]} at offset {start + at} is outside the "
                        f"vocabulary of {vocab_size} — the shard is damaged or was made with "
                        f"another tokenizer")


def check_apart(train, val):
    """Raise UserError if most of four passages of the validation shards stand in training too."""
    tokens = val[0].tokens
    length = min(100, len(tokens) // 8)
    passages = [tokens[at:at + length] for at in range(length, 8 * length, 2 * length)]
    known = 0
    for passage in passages:
        known += length >= 20 and any(holds(shard.tokens, passage) for shard in train)
    if known > len(passages) / 2:
        raise UserError(f"{val[0].path}: its text is in the training shards too — remove it from "
                        f"one of them")


def holds(tokens, passage):
    """Whether a passage stands in a shard."""
    for start in range(0, len(tokens), IDS_AT_ONCE):
        part = tokens[start:start + IDS_AT_ONCE + len(passage)]
        if passage.tobytes() in part.tobytes():
            return True
    return False


# -------------------------------------------------------------------------------------------------
# The formats

def open_npy(path):
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a damaged header NumPy raises almost any exception
        size = path.stat().st_size
        raise UserError(f"{path}: expected a .npy file of tokens, found {size} bytes that cannot "
                        f"be read as one ({error}) — {ADVICE}") from None
    if tokens.ndim != 1 or tokens.dtype != np.uint16:
        raise UserError(f"{path}: expected a 1-D uint16 array, found {tokens.ndim}-D "
                        f"{tokens.dtype} — {ADVICE}")
    described = tokens.offset + tokens.nbytes
    if described != path.stat().st_size:  # one flipped bit in the header is enough
        raise UserError(f"{path}: expected {described} bytes as its header says, found "
                        f"{path.stat().st_size} — {ADVICE}")
    return tokens


def open_bin(path):
    header = np.fromfile(path, dtype="<i4", count=3)
    has_header = len(header) == 3 and header[0] == LLMC_MAGIC
    if has_header:
        return open_llmc(path, version=int(header[1]), declared=int(header[2]))
    if path.name not in ("train.bin", "val.bin"):
        raise UserError(f"{path}: expected llm.c's magic number {LLMC_MAGIC}, found "
                        f"{header[:1].tolist()} — {ADVICE}")
    return map_uint16(path, offset=0)


def open_llmc(path, version, declared):
    if version != LLMC_VERSION:
        raise UserError(f"{path}: expected llm.c format version {LLMC_VERSION}, found {version} — "
                        f"{ADVICE}")
    tokens = map_uint16(path, offset=LLMC_HEADER)
    if len(tokens) != declared:
        raise UserError(f"{path}: expected {declared} tokens, found {len(tokens)} — {ADVICE}")
    return tokens


def map_uint16(path, offset):
    size = path.stat().st_size - offset
    if size < 0 or size % 2 != 0:
        raise UserError(f"{path}: expected a header of {offset} bytes and whole uint16 tokens, "
                        f"found {offset + size} bytes — {ADVICE}")
    if size == 0:
        return np.empty(0, dtype=np.uint16)  # nothing to map
    return np.memmap(path, dtype="<u2", mode="r", offset=offset)
