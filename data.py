"""data.py — tokens in memory: the tokenizer, the shards on disk, and the order in which training reads them.

No network and no torch in here. Everything is a pure function of the files, the seed and the step, so the position of
a run in its data is one number, and the number of processes changes nothing but the speed.

    python prepare_data.py show "The tokenizer at work." --vocab_size 512     # look at the pieces
"""
import base64
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from errors import UserError


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: GPT-2's byte-level BPE, optionally with only its first merges.

MERGES = Path(__file__).parent / "gpt2.tiktoken"  # lines of "base64(token) rank"
MERGES_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # the hash tiktoken pins for r50k_base
GPT2_VOCAB_SIZE = 50_257
# How GPT-2 cuts text before merging (Radford et al. 2019, §2.2): contractions, words, numbers, signs, white space.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer:
    """GPT-2's tokenizer with `vocab_size` ids: the first vocab_size − 1 ranks of its table, then end-of-text.

    Ranks are in the order in which merges were learned, and the first 256 are the single bytes. So every prefix of the
    table is a working tokenizer of its own: any text encodes, only into more and shorter pieces. Why fewer is better
    for a tiny model: with 50k ids most of its arithmetic is the output layer.

    Raises UserError if vocab_size is out of range or the table is not the one that we know."""

    def __init__(self, vocab_size=GPT2_VOCAB_SIZE):
        if not 257 <= vocab_size <= GPT2_VOCAB_SIZE:
            raise UserError(f"vocab_size {vocab_size} is out of range — choose 257 (bytes and end-of-text) "
                            f"to {GPT2_VOCAB_SIZE} (all of GPT-2's merges)")
        if not MERGES.is_file():
            raise UserError(f"{MERGES}: the merge table is missing — restore it from the repository")
        table = MERGES.read_bytes()
        if hashlib.sha256(table).hexdigest() != MERGES_SHA256:
            raise UserError(f"{MERGES}: not GPT-2's merge table (its hash differs) — restore it from the repository")
        tokens = [base64.b64decode(line.split()[0]) for line in table.splitlines()[:vocab_size - 1]]
        self.vocab_size = vocab_size
        self.eot = vocab_size - 1
        self.bpe = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, special_tokens={"<|endoftext|>": self.eot},
                                     mergeable_ranks={token: rank for rank, token in enumerate(tokens)})
        # Bytes of text that each id stands for, for bits per byte. End-of-text is no text: 0 bytes.
        self.byte_lengths = np.array([len(token) for token in tokens] + [0])  # (vocab_size,)

    def encode(self, text):
        """Ids of `text`, all of it taken as plain text: a literal "<|endoftext|>" is just these 13 characters."""
        return self.bpe.encode_ordinary(text)

    def decode_bytes(self, ids):
        """The bytes that `ids` stand for, maybe ending amid a character. End-of-text reads "<|endoftext|>"."""
        return self.bpe.decode_bytes(ids)

    def decode(self, ids):
        """The text that `ids` stand for; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# Chat: a conversation as one row of tokens, in the template of Vicuna 1.1 (as FastChat renders it):
#     SYSTEM USER: question ASSISTANT: answer<eot>USER: question ASSISTANT: answer<eot>

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


def chat_pieces(messages, system=SYSTEM):
    """A conversation as pieces, [(text, is_answer), …], that are encoded one by one. messages: [{"role", "content"}, …], maybe
    a "system" first, then "user" and "assistant" in turn. After a "user" as the last it is a prompt: it ends at "ASSISTANT:",
    without a space, for the space is part of the answer's first token."""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    pieces, before = [], f"{system} " if system else ""
    for message in messages:
        if message["role"] == "user":
            pieces.append((f"{before}USER: {message['content']} ASSISTANT:", False))
            before = ""
        else:
            pieces.append((f" {message['content']}", True))
    return pieces


def encode_chat(tokenizer, messages, system=SYSTEM):
    """(ids, is_answer): the tokens of a conversation, and for each of them whether it belongs to an answer, as the end-of-text
    after it does. All text is plain text: a literal "<|endoftext|>" ends nothing."""
    ids, is_answer = [], []
    for text, answer in chat_pieces(messages, system):
        piece = tokenizer.encode(text) + [tokenizer.eot] * answer
        ids += piece
        is_answer += [answer] * len(piece)
    return ids, is_answer


# ---------------------------------------------------------------------------------------------------------------------
# Shards: files of uint16 token ids, memory-mapped. Ours, and those of three other projects.

LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER = 20240520, 1, 256 * 4  # llm.c: int32[256] = magic, version, number of tokens, …


@dataclass
class Shard:
    path: Path
    tokens: np.ndarray  # (n,) uint16


def open_shard(path, declared=None):
    """Memory-map one shard: `.npy` (ours, build-nanogpt), `.bin` of llm.c, or nanoGPT's raw `train.bin`/`val.bin`.

    `declared` is the number of tokens that meta.json promises. Raises UserError naming file, expected and found.
    """
    again = "prepare the data again or restore the file"
    if not path.is_file():
        raise UserError(f"{path}: shard is missing — {again}")
    size = path.stat().st_size
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path}: expected a .npy file of tokens, found {size} bytes that do not read as one "
                            f"({error}) — {again}") from None
        if tokens.ndim != 1 or tokens.dtype != np.uint16:
            raise UserError(f"{path}: expected a 1-D uint16 array, found {tokens.ndim}-D {tokens.dtype} — {again}")
    else:
        header = np.fromfile(path, dtype="<i4", count=3)
        has_header = len(header) == 3 and header[0] == LLMC_MAGIC
        if not has_header and path.name not in ("train.bin", "val.bin"):
            raise UserError(f"{path}: expected llm.c's magic number {LLMC_MAGIC}, found {header[:1].tolist()} — {again}")
        if has_header and header[1] != LLMC_VERSION:
            raise UserError(f"{path}: expected llm.c format version {LLMC_VERSION}, found {header[1]} — {again}")
        offset = LLMC_HEADER if has_header else 0
        if size < offset or (size - offset) % 2:
            raise UserError(f"{path}: expected whole uint16 tokens, found {size - offset} bytes — {again}")
        declared = int(header[2]) if has_header else declared
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=offset) if size > offset else np.empty(0, dtype=np.uint16)
    if declared is not None and len(tokens) != declared:
        raise UserError(f"{path}: expected {declared} tokens, found {len(tokens)} — {again}")
    if len(tokens) == 0:
        raise UserError(f"{path}: expected tokens, found an empty shard — {again}")
    return Shard(path, tokens)


class DataFolder:
    """A folder of shards: `vocab_size`, `tokenizer`, `meta` ({} when others made the folder) and the splits `train` and
    `val`. Raises UserError if one of them is missing, or meta.json cannot be used."""

    def __init__(self, path):
        self.path = Path(path)
        self.meta = self._read_meta()
        self.vocab_size = self.meta.get("vocab_size", GPT2_VOCAB_SIZE)
        self.tokenizer = Tokenizer(self.vocab_size)
        self.train, self.val = self._open("train"), self._open("val")

    def _read_meta(self):
        file = self.path / "meta.json"
        if not file.exists():
            return {}
        try:
            meta = json.loads(file.read_text())
            assert isinstance(meta["vocab_size"], int) and meta["tokenizer"] == "gpt2"
            assert all(isinstance(s["file"], str) for split in ("train", "val") for s in meta["splits"][split])
            return meta
        except (ValueError, KeyError, TypeError, AssertionError):
            raise UserError(f"{file}: not a data folder's meta.json — prepare the data again") from None

    def _open(self, split):
        declared = ({self.path / s["file"]: s["tokens"] for s in self.meta["splits"][split]} if self.meta else
                    {f: None for f in sorted(self.path.glob("*")) if f.suffix in (".npy", ".bin") and split in f.name})
        shards = [open_shard(file, tokens) for file, tokens in declared.items()]
        if not shards:
            how = self.path.name if self.path.name in ("pydocs", "fineweb-edu") else f"text FILE --out {self.path}"
            raise UserError(f"no {split} shards in {self.path} — run: python prepare_data.py {how}")
        return shards

    def fingerprint(self):
        """What the data is, for the checkpoint: per shard its name, its tokens, and a SHA-256 over 64 evenly spaced
        blocks of 64 KiB (the whole shard below 4 MiB), so that even a terabyte is recognised in seconds."""
        marks = []
        for shard in self.train + self.val:
            size, digest = shard.path.stat().st_size, hashlib.sha256()
            with open(shard.path, "rb") as file:
                if size < 64 * 65536:
                    digest.update(file.read())
                else:
                    for block in range(64):
                        file.seek((size - 65536) * block // 63)
                        digest.update(file.read(65536))
            marks.append([shard.path.name, len(shard.tokens), digest.hexdigest()])
        return marks


# ---------------------------------------------------------------------------------------------------------------------
# Windows: the split cut into pieces of seq_len inputs, each token's target being the next one.

class Windows:
    """All windows of a list of shards. Window w of a shard reads its tokens wT … wT + T inclusive: T inputs and, one
    place later, T targets. Windows do not cross shards; a shard's rest, too short for a window, is left out.
    Raises UserError if all shards are too short for one window."""

    def __init__(self, shards, seq_len, vocab_size, seed=0, shuffle=True):
        self.shards, self.seq_len, self.vocab_size, self.seed, self.shuffle = shards, seq_len, vocab_size, seed, shuffle
        counts = [(len(shard.tokens) - 1) // seq_len for shard in shards]
        self.first = np.cumsum([0] + counts)  # number of each shard's first window
        self.total = int(self.first[-1])
        if self.total == 0:
            raise UserError(f"{shards[0].path.parent}: {sum(len(s.tokens) for s in shards)} tokens do not fill one window of "
                            f"{seq_len} — add text or lower --seq_len")

    @functools.lru_cache(maxsize=2)  # a step may lie across two epochs
    def _permutation(self, epoch):
        # RandomState's stream is frozen by NumPy's compatibility policy; default_rng's may change between versions.
        return np.random.RandomState([self.seed, epoch]).permutation(self.total)

    def order(self, start, count):
        """Numbers of the `count` windows that training reads from position `start` on. Position i is in epoch
        i // total; each epoch is a permutation of its own (file order when not shuffled)."""
        positions = np.arange(start, start + count)
        if not self.shuffle:
            return positions % self.total
        return np.array([self._permutation(int(i // self.total))[i % self.total] for i in positions])

    def read(self, windows):
        """Tokens of these windows, (len(windows), seq_len + 1) int64. Raises UserError naming shard, offset and id if
        an id is not in the vocabulary: it would index outside the embedding."""
        rows = np.empty((len(windows), self.seq_len + 1), dtype=np.int64)
        for row, window in zip(rows, windows):
            shard = int(np.searchsorted(self.first, window, side="right")) - 1
            offset = int(window - self.first[shard]) * self.seq_len
            row[:] = self.shards[shard].tokens[offset:offset + self.seq_len + 1]
            if row.max() >= self.vocab_size:
                at = int(np.argmax(row >= self.vocab_size))
                raise UserError(f"{self.shards[shard].path}: token {row[at]} at offset {offset + at} is outside the vocabulary of "
                                f"{self.vocab_size} — the shard is damaged or was made with another tokenizer")
        return rows
