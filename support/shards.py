"""shards.py — files of token ids, ours and of three other projects, checked as they are opened.

ours, build-nanogpt    .npy    a 1-D array of uint16
llm.c                  .bin    int32[256]: magic, version, number of tokens, …; then uint16
nanoGPT                train.bin, val.bin: uint16 and nothing else
"""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.runs import UserError

LLMC_MAGIC = 20240520
LLMC_VERSION = 1
LLMC_HEADER = 256 * 4  # bytes
BLOCK = 65_536         # bytes of a block of the fingerprint
BLOCKS = 64

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
