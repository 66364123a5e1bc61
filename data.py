"""data.py — token ids: the tokenizer, a folder of shards, the order in which they are read.

No download and no torch in here. Which tokens a step reads depends only on the files, the seed and
the number of the step. So to resume it is enough to know the step. With more processes a step reads
the same tokens, divided among them. To see the tokenizer at work:

    python prepare_data.py show "Two commands." --vocab_size 512
"""
import base64
import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from support.files import blocks_sha256, sha256_of
from support.runs import UserError, first_line_of, parse_json, quoted

# -------------------------------------------------------------------------------------------------
# Tokenizer: GPT-2's byte-pair encoding, optionally with only the first merges of its table. It
# starts from the 256 bytes. Its training merged, again and again, the two neighbours that occur
# together most often into one new token. The table lists the tokens in this order, their ranks.

# The table: lines of "base64(token) rank", in the order of the ranks.
MERGES = Path(__file__).parent / "support" / "gpt2.tiktoken"
# The hash that tiktoken itself expects of this table, which it calls r50k_base.
MERGES_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_VOCAB_SIZE = 50_257
# How GPT-2 cuts text before it merges (Radford et al. 2019, §2.2): contractions, words, numbers,
# signs, white space.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# White space is cut after so many characters, because a million of them crash tiktoken. (The
# brackets: split() then returns the white space too.)
LONG_BLANK = re.compile(r"(\s{100000})")


class Tokenizer:
    """GPT-2's tokenizer with `vocab_size` ids: the first of its table, and end-of-text as the last.

    The table is in the order in which merges were learned, and its first 256 entries are the single
    bytes. So every prefix of it is a working tokenizer: it encodes any text, only into more and
    shorter pieces. A small vocabulary is better for a tiny model, which with 50k ids would spend
    most of its arithmetic on the output layer.

    Raises UserError if vocab_size is out of range or the table is not GPT-2's."""

    def __init__(self, vocab_size=GPT2_VOCAB_SIZE):
        if not 257 <= vocab_size <= GPT2_VOCAB_SIZE:
            raise UserError(f"vocab_size {vocab_size} is out of range — choose 257 (bytes and "
                            f"end-of-text) to {GPT2_VOCAB_SIZE} (all of GPT-2's merges)")
        table = MERGES.read_bytes()
        if hashlib.sha256(table).hexdigest() != MERGES_SHA256:
            raise UserError(f"{MERGES}: not GPT-2's merge table (its hash differs) — restore it "
                            f"from the repository")
        lines = table.splitlines()[:vocab_size - 1]
        pieces = [base64.b64decode(line.split()[0]) for line in lines]
        self.vocab_size = vocab_size
        self.eot = vocab_size - 1
        self.bpe = tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, special_tokens={"<|endoftext|>": self.eot},
            mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)})
        # How many bytes of text each id stands for: evaluate.py computes bits per byte with it.
        # End-of-text (which stands before each document, despite its name) stands for no text.
        self.byte_lengths = np.array([len(piece) for piece in pieces] + [0])  # (vocab_size,)

    def encode(self, text):
        """The ids of `text`. All of it is plain text: "<|endoftext|>" is just 13 characters."""
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        """The same as (n,) uint16."""
        parts = [self.bpe.encode_to_numpy(part, disallowed_special=())
                 for part in LONG_BLANK.split(text)]
        return np.concatenate(parts).astype(np.uint16)

    def decode_bytes(self, ids):
        """The bytes of `ids`; they may end within a character. End-of-text is "<|endoftext|>"."""
        return self.bpe.decode_bytes(ids)

    def decode(self, ids):
        """The text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


# -------------------------------------------------------------------------------------------------
# A folder of shards, as prepare_data.py writes it

ADVICE = "restore the file, or prepare or adopt the data again"


@dataclass
class Shard:
    """A file of token ids. It is memory-mapped: `tokens` looks like an array in memory, and the
    system reads from the disk what is used."""
    path: Path
    tokens: np.ndarray  # (n,) uint16


def open_shard(path, length, offset=None):
    """A shard of `length` tokens: a .npy file, or raw uint16 numbers behind the first `offset`
    bytes of a file. Raises UserError naming the file, what was expected and what was found."""
    if not path.is_file():
        raise UserError(f"{path}: shard is missing — {ADVICE}")
    size = path.stat().st_size
    if offset is None and path.suffix == ".bin":  # prepared by older code: the end of the file
        offset = size - 2 * length
    try:
        if offset is None:
            tokens = np.lib.format.open_memmap(path, mode="r")
        else:
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(length,))
        end = tokens.offset + tokens.nbytes  # a damaged header may tell another length
    except Exception as error:  # of a damaged header NumPy raises almost any exception
        raise UserError(f"{path}: expected {length} tokens, found {size} bytes that cannot be read "
                        f"({first_line_of(error)}) — {ADVICE}") from None
    if tokens.shape != (length,) or tokens.dtype != np.uint16 or end != size:
        raise UserError(f"{path}: expected {length} tokens, found {tokens.shape} {tokens.dtype} in "
                        f"{size} bytes — {ADVICE}")
    return Shard(path, tokens)


class DataFolder:
    """The shards that a folder's meta.json lists, `train` and `val`, and their `tokenizer`.

    Raises UserError if the meta.json or a shard is missing or cannot be used."""

    def __init__(self, path):
        self.path = Path(path)
        file = self.path / "meta.json"
        if not file.exists():
            is_source = self.path.name in ("pydocs", "fineweb-edu")
            path = quoted(self.path)
            source = self.path.name if is_source else f"text FILE --out {path}"
            raise UserError(f"no data of ours in {self.path} — run: python prepare_data.py "
                            f"{source} (or, for shards that another project has made: python "
                            f"prepare_data.py adopt {path} --out data/NAME)")
        try:
            self.meta = parse_json(file.read_bytes())
            check_meta(self.meta)
            self.vocab_size = self.meta["vocab_size"]
            self.tokenizer = Tokenizer(self.vocab_size)
            self.train = self.open_split("train")
            self.val = self.open_split("val")
        except (ValueError, KeyError, TypeError) as why:
            raise UserError(f"{file}: not the meta.json of a data folder ({why}) — prepare the "
                            f"data again") from None

    def rows(self):
        """What meta.json tells about each shard: those of training first."""
        return self.meta["splits"]["train"] + self.meta["splits"]["val"]

    def open_split(self, split):
        shards = []
        for row in self.meta["splits"][split]:
            path = self.path / row["file"]  # or an absolute path, of another project's shard
            shards.append(open_shard(path, row["tokens"], row.get("offset")))
        return shards

    def check_content(self):
        """Read every byte; raise UserError if a shard's SHA-256 is not the recorded one."""
        for shard, row in zip(self.train + self.val, self.rows()):
            if sha256_of(shard.path) != row["sha256"]:
                raise UserError(f"{shard.path}: its content is not what meta.json recorded (the "
                                f"SHA-256 differs) — {ADVICE}")

    @functools.cached_property
    def fingerprint(self):
        """What the data is, for the checkpoint: [name, tokens, hash of some blocks] of each shard,
        and [name, bytes, hash] of the questions for evaluate.py, if it has some."""
        rows = [[shard.path.name, len(shard.tokens), blocks_sha256(shard.path)]
                for shard in self.train + self.val]
        questions = self.path / "cloze.jsonl"
        if os.path.lexists(questions):  # also a link to nowhere, which is then an error
            rows.append([questions.name, questions.stat().st_size, sha256_of(questions)])
        return rows

    def check_same(self, recorded, advice):
        """Raise UserError, naming the files, unless the fingerprint is the recorded one."""
        found = self.fingerprint
        if found != recorded:
            recorded = recorded or []
            changed = [row[0] for row in found if row not in recorded]
            changed += [row[0] for row in recorded if row not in found]
            # dict.fromkeys names each once; if there is none, only their order differs.
            what = ", ".join(dict.fromkeys(map(str, changed))) or "the order of the shards"
            raise UserError(f"{self.path} is not the data of this run (changed: {what}) — {advice}")


def check_meta(meta):
    """Raise ValueError if a meta.json is of data that we cannot use, or contradicts itself."""
    if meta["tokenizer"] != "gpt2" or meta["dtype"] != "uint16":
        raise ValueError("other tokens than ours")
    if meta["eot"] != meta["vocab_size"] - 1:
        raise ValueError("eot is not the last id")
    train = meta["splits"]["train"]
    val = meta["splits"]["val"]
    if not train or not val:
        raise ValueError("a split is empty")
    if {row["sha256"] for row in train} & {row["sha256"] for row in val}:
        raise ValueError("a shard of validation is one of training too")
    if len({row["file"] for row in train + val}) < len(train + val):
        raise ValueError("a file is listed twice")


def check_range(shard, start, tokens, vocab_size):
    """Raise UserError naming shard, offset and id if one of `tokens` is not in the vocabulary: it
    would index outside the embedding. start: the offset of the first of them in the shard."""
    if tokens.max() >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))  # the first of them
        raise UserError(f"{shard.path}: token {tokens[at]} at offset {start + at} is outside the "
                        f"vocabulary of {vocab_size} — the shard is damaged or was made with "
                        f"another tokenizer")


# -------------------------------------------------------------------------------------------------
# Windows: a split cut into pieces of seq_len inputs; the target of each is the token after it.

class Windows:
    """All windows of a list of shards, and the order in which training reads them.

    With seq_len 4, a shard of 14 tokens has three windows: its tokens 0 … 4, 4 … 8 and 8 … 12. Each
    is 4 inputs and, one place later, their 4 targets; so neighbours share a token. Token 13 is left
    out, since a window does not cross shards. Raises UserError if there is not one window.

        window      its number, counted through all shards: 0 … total − 1
        place       when in its epoch it is read: order[place] is the window
        position    counts the windows read over all epochs: epoch · total + place
        offset      where a token stands in its shard
    """

    def __init__(self, shards, seq_len, vocab_size, seed=0, shuffle=True):
        self.shards = shards
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.seed = seed
        self.shuffle = shuffle
        counts = [(len(shard.tokens) - 1) // seq_len for shard in shards]
        self.first = np.cumsum([0] + counts)  # each shard's first window; at the end the total
        self.total = int(self.first[-1])
        self.order = None        # the permutation of an epoch; kept, because making it takes long
        self.order_epoch = None  # which epoch
        if self.total == 0:
            tokens = sum(len(shard.tokens) for shard in shards)
            raise UserError(f"{shards[0].path.parent}: {tokens} tokens do not fill one window of "
                            f"{seq_len} — add text or lower --seq_len")

    def read(self, position, count):
        """The tokens of `count` windows in training order, from `position` on: (count, seq_len + 1)
        int64. Raises UserError as `read_window` does."""
        rows = [self.read_window(self.window_at(position + i)) for i in range(count)]
        return np.stack(rows)

    def window_at(self, position):
        """The window that is read at a position. Each epoch is a random permutation of its own;
        without shuffling it is file order."""
        epoch, place = divmod(position, self.total)
        if not self.shuffle:
            return place
        if epoch != self.order_epoch:
            # Not default_rng: its numbers may change with the version of NumPy, and then a resume
            # would read other data. Those of RandomState never change.
            generator = np.random.RandomState([self.seed, epoch])
            self.order = generator.permutation(self.total)
            self.order_epoch = epoch
        return int(self.order[place])

    def read_window(self, window):
        """Its tokens, (seq_len + 1,) int64. Raises UserError naming shard, offset and id if an id
        is not in the vocabulary: it would index outside the embedding."""
        # With first = [0, 10, 15], window 12 is in shard 1: two of these numbers are ≤ 12.
        shard = int(np.searchsorted(self.first, window, side="right")) - 1
        start = (window - int(self.first[shard])) * self.seq_len
        tokens = self.shards[shard].tokens[start:start + self.seq_len + 1].astype(np.int64)
        check_range(self.shards[shard], start, tokens, self.vocab_size)
        return tokens
