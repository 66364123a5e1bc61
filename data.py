"""data.py — token ids: the tokenizer, a folder of shards, the order in which they are read.

No download and no torch in here. Which tokens a step reads depends only on the files, the seed and
the number of the step. So one number is enough to resume, and more processes read the same tokens,
only faster. To see the tokenizer at work:

    python prepare_data.py show "Two commands." --vocab_size 512
"""
import base64
import functools
import hashlib
import os
import re
from pathlib import Path

import numpy as np
import tiktoken

from support.runs import UserError, parse_json
from support.shards import check_apart, check_ids, check_meaning, check_range, open_shard

# -------------------------------------------------------------------------------------------------
# Tokenizer: GPT-2's byte-level BPE, optionally with only the first merges of its table.

# The table: lines of "base64(token) rank", in the order of the ranks.
MERGES = Path(__file__).parent / "support" / "gpt2.tiktoken"
# The hash that tiktoken itself expects of this table, which it calls r50k_base.
MERGES_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_VOCAB_SIZE = 50_257
# How GPT-2 cuts text before it merges (Radford et al. 2019, §2.2): contractions, words, numbers,
# signs, white space.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


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
        if not MERGES.is_file():
            raise UserError(f"{MERGES}: the merge table is missing — restore it from the "
                            f"repository")
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
        ids = []
        for part in cut_long_blanks(text):
            ids += self.bpe.encode_ordinary(part)
        return ids

    def encode_array(self, text):
        """The same as (n,) uint16, without a Python list between: a fifth faster."""
        parts = [self.bpe.encode_to_numpy(part, disallowed_special=())
                 for part in cut_long_blanks(text)]
        return np.concatenate(parts).astype(np.uint16)

    def decode_bytes(self, ids):
        """The bytes of `ids`; they may end within a character. End-of-text is "<|endoftext|>"."""
        return self.bpe.decode_bytes(ids)

    def decode(self, ids):
        """The text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


# On about a million white-space characters in a row tiktoken ends with a "panic" of its Rust code.
LONG_BLANK = re.compile(r"\s{100000}")


def cut_long_blanks(text):
    """Yield `text` in parts: all of it at once, but for a cut in very long white space."""
    start = 0
    for blank in LONG_BLANK.finditer(text):
        yield text[start:blank.end()]
        start = blank.end()
    yield text[start:]


# -------------------------------------------------------------------------------------------------
# A folder of shards. A shard is a file of uint16 token ids, memory-mapped.

class DataFolder:
    """The shards of a folder in two lists, `train` and `val`, with their `tokenizer`.

    `python prepare_data.py` writes a meta.json beside them. Folders of nanoGPT, build-nanogpt and
    llm.c have none: there the names of the files tell the split, and the ids must be GPT-2's.
    `unused` lists the files that look like shards and are in no split. Raises UserError if a split
    or a shard is missing or cannot be used."""

    def __init__(self, path):
        self.path = Path(path)
        self.meta = self.read_meta()
        self.vocab_size = self.meta.get("vocab_size", GPT2_VOCAB_SIZE)
        self.tokenizer = Tokenizer(self.vocab_size)
        self.train = self.open_split("train")
        self.val = self.open_split("val")
        used = [shard.path for shard in self.train + self.val]
        self.unused = [file for file in self.files() if file not in used]
        if not self.meta:
            for shard in self.train + self.val:
                check_meaning(shard, self.tokenizer)

    def files(self):
        """All files that can be shards, sorted. (The file system of a Mac leaves hidden ones.)"""
        found = [*self.path.glob("[!.]*.npy"), *self.path.glob("[!.]*.bin")]
        return sorted(found)

    def read_meta(self):
        """The content of meta.json, checked; {} for a folder of another project."""
        file = self.path / "meta.json"
        if not file.exists():
            return {}
        try:
            meta = parse_json(file.read_bytes())
            listed = meta["splits"]["train"] + meta["splits"]["val"]
            names = [shard["file"] for shard in listed]
            sizes = [shard["tokens"] for shard in listed]
            fits = (meta["tokenizer"] == "gpt2"
                    and isinstance(meta["vocab_size"], int)
                    and meta["eot"] == meta["vocab_size"] - 1
                    and meta["dtype"] == "uint16"
                    and all(Path(name).name == name for name in names)  # of this folder
                    and all(isinstance(size, int) for size in sizes)
                    and len(set(names)) == len(names))  # no file is listed twice
        except (OSError, ValueError, KeyError, TypeError):
            fits = False  # not JSON, or without what we need
        if not fits:
            raise UserError(f"{file}: not a valid meta.json of a data folder — prepare the data "
                            f"again")
        return meta

    def open_split(self, split):
        """The shards of a split, memory-mapped: their `tokens` look like an array in memory, and
        the system reads from the disk what is used."""
        if self.meta:
            listed = self.meta["splits"][split]
            shards = [open_shard(self.path / shard["file"], shard["tokens"]) for shard in listed]
        else:
            shards = [open_shard(file) for file in self.files() if is_of_split(file, split)]
        if not shards:
            command = f"text FILE --out {self.path}"
            if self.path.name in ("pydocs", "fineweb-edu"):
                command = self.path.name
            raise UserError(f"no {split} shards in {self.path} — run: python prepare_data.py "
                            f"{command}")
        return shards

    def check_content(self):
        """Read every byte. With a meta.json compare the SHA-256 of each shard, without one look for
        ids outside the vocabulary and for validation text in training. Raises UserError."""
        if not self.meta:
            for shard in self.train + self.val:
                check_ids(shard, self.vocab_size)
            check_apart(self.train, self.val)
            return
        listed = self.meta["splits"]["train"] + self.meta["splits"]["val"]  # as they were opened
        for shard, recorded in zip(self.train + self.val, listed):
            if shard.sha256() != recorded.get("sha256"):
                raise UserError(f"{shard.path}: its content is not what meta.json recorded (the "
                                f"SHA-256 differs) — prepare the data again or restore the file")

    @functools.cached_property
    def fingerprint(self):
        """What the data is, for the checkpoint: of each shard its name, its length, and a hash of
        64 blocks of it, which is fast for any size; and the same of the questions, if there are
        any. Raises UserError if two are the same file, or copies: what is read for validation must
        not be read in training too."""
        rows = [shard.fingerprint() for shard in self.train + self.val]
        questions = self.path / "cloze.jsonl"
        if os.path.lexists(questions):  # a link to nowhere is an error
            content = questions.read_bytes()
            rows.append([questions.name, len(content), hashlib.sha256(content).hexdigest()])
        names = {}
        for name, _, digest in rows:
            if digest in names:
                raise UserError(f"{self.path}: {names[digest]} and {name} have the same content — "
                                f"remove one of them")
            names[digest] = name
        return rows

    def check_same(self, recorded, advice):
        """Raise UserError, naming the files, unless the fingerprint is the recorded one."""
        found = self.fingerprint
        if found == recorded:
            return
        what = "which its config.json does not tell"
        if isinstance(recorded, list):
            changed = [row[0] for row in found if row not in recorded]
            gone = [row for row in recorded if row not in found]
            changed += [str(row[0]) for row in gone if isinstance(row, list) and row]
            changed = list(dict.fromkeys(changed))[:5]  # each once
            what = f"changed: {', '.join(changed) or 'the order of the shards'}"
        raise UserError(f"{self.path} is not the data of this run ({what}) — {advice}")


def is_of_split(file, split):
    """Whether a file of another project belongs to a split: if its name contains "train" or "val"
    as a word, as in fineweb_train_000001.bin."""
    return split in re.split(r"[_.-]", file.name)


# -------------------------------------------------------------------------------------------------
# Windows: a split cut into pieces of seq_len inputs; the target of each is the token after it.

class Windows:
    """All windows of a list of shards, and the order in which training reads them.

    With T = seq_len, the first window of a shard is its tokens 0 … T, the next T … 2T, and so on:
    T inputs and, one place later, T targets. A window does not cross shards; the end of a shard
    that is too short for one is left out. Raises UserError if there is not one window.

    Four numbers: a window has an index, through all shards. A position counts 0, 1, 2 … over the
    whole training; a place counts within its epoch. An offset is that of a token in its shard."""

    def __init__(self, shards, seq_len, vocab_size, seed=0, shuffle=True):
        self.shards = shards
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.seed = seed
        self.shuffle = shuffle
        counts = [(len(shard.tokens) - 1) // seq_len for shard in shards]
        self.first = np.cumsum([0] + counts)  # index of each shard's first window, and the total
        self.total = int(self.first[-1])
        self.order = None        # of one epoch: the window at each place; kept, as it takes long
        self.order_epoch = None  # of which epoch
        if self.total == 0:
            tokens = sum(len(shard.tokens) for shard in shards)
            raise UserError(f"{shards[0].path.parent}: {tokens} tokens do not fill one window of "
                            f"{seq_len} — add text or lower --seq_len")

    def read(self, position, count):
        """The tokens that training reads at `count` positions from `position` on: (count, seq_len +
        1) int64. Raises UserError as `read_window` does."""
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
