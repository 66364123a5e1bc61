"""prepare_data.py — turn text into shards of tokens that train.py reads.

    python prepare_data.py pydocs                # the manuals on this computer, to data/pydocs
    python prepare_data.py text book.txt notes/  # .txt, .md, .jsonl, .jsonl.gz, folders; data/book
    python prepare_data.py show "The tokenizer at work." --vocab_size 512

`pydocs` needs no network: its text comes with Python and the required packages (see
support/pydocs.py). Beside the shards it writes `cloze.jsonl`, a multiple-choice test made from the
validation text, and `instruct.json`, questions and answers in Alpaca's format.

The same sources give the same bytes, with any number of cores. A folder is written under a
temporary name and renamed when all of it is on the disk, so an incomplete folder is never visible.
"""
import argparse
import array
import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import GPT2_VOCAB_SIZE, Tokenizer
from support.flags import Parser, number, text as valid_text
from support.pydocs import (
    PACKAGES, VAL_SHARE, build_corpus, cloze_items, dependencies, instruct_rows, shuffle_sentences,
    stable_hash)
from support.runs import UserError, lock, parse_json, script

# With 4,096 ids a tiny model spends its arithmetic on its layers, not on the output layer (see
# data.Tokenizer).
DEFAULT_VOCAB_SIZE = 4096
SHARD_TOKENS = 100_000_000
MIN_TOKENS = 64  # in each split; the loss on fewer tokens measures nothing
# Characters. Long documents are read in pieces of about this size, so that any file fits in memory.
PIECE_SIZE = 1 << 20


# -------------------------------------------------------------------------------------------------
# Encode text into shards. Text arrives in pieces, (text, starts): a document, or a part of a long
# one. `starts` is True if a document begins with this piece.

class ShardWriter:
    """Writes the tokens of one split to `{split}_0000.npy`, `{split}_0001.npy` and so on.

    It holds one shard in memory, 200 MB, however long the text is."""

    def __init__(self, folder, split, tokenizer):
        self.folder = folder
        self.split = split
        self.tokenizer = tokenizer
        self.waiting = []  # pieces to encode
        self.waiting_size = 0
        self.buffer = np.empty(SHARD_TOKENS, dtype=np.uint16)  # uses memory only as it is filled
        self.used = 0
        self.shards = []  # their rows in meta.json
        self.bytes = 0
        self.documents = 0

    def add(self, text, starts):
        self.waiting.append((text, starts))
        self.waiting_size += len(text)
        if self.waiting_size > 4 * PIECE_SIZE:  # enough to keep all cores busy
            self.encode()

    def encode(self):
        """Encode the waiting pieces on all cores.

        Threads are enough: tiktoken releases Python's global lock while it encodes."""
        texts = [text for text, _ in self.waiting]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            encoded = list(threads.map(self.tokenizer.encode, texts))
        for (text, starts), ids in zip(self.waiting, encoded):
            if starts:
                ids = [self.tokenizer.eot] + ids
                self.documents += 1
            self.bytes += len(text.encode())
            self.store(np.array(ids, dtype=np.uint16))
        self.waiting = []
        self.waiting_size = 0

    def store(self, ids):
        while len(ids) > 0:
            part = ids[:SHARD_TOKENS - self.used]
            self.buffer[self.used:self.used + len(part)] = part
            self.used += len(part)
            if self.used == SHARD_TOKENS:
                self.write_shard()
            ids = ids[len(part):]

    def write_shard(self):
        path = self.folder / f"{self.split}_{len(self.shards):04d}.npy"
        np.save(path, self.buffer[:self.used])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.shards.append({"file": path.name, "tokens": self.used, "sha256": digest})
        self.used = 0

    def finish(self):
        """Write what is left and print a summary. Raises UserError if the split is too short."""
        self.encode()
        if self.used > 0:
            self.write_shard()
        tokens = sum(shard["tokens"] for shard in self.shards)
        if tokens < MIN_TOKENS:
            raise UserError(f"too little text: {tokens} tokens for {self.split} — add text "
                            f"(validation is {VAL_SHARE:.0%} of it and needs at least "
                            f"{MIN_TOKENS} tokens)")
        print(f"{self.split:>5}: {self.documents:9,} documents {self.bytes / 1e6:9.2f} MB "
              f"{tokens:13,} tokens {self.bytes / tokens:6.2f} bytes/token")


def write_shards(folder, pieces, tokenizer, source, total):
    """Encode `pieces`, triples (split, text, starts), into shards, and describe them in meta.json.

    source: where the text is from, for meta.json. total: its characters, for the progress bar.
    Raises UserError if a split is too short."""
    train = ShardWriter(folder, "train", tokenizer)
    val = ShardWriter(folder, "val", tokenizer)
    with tqdm(total=total, desc="encoding", unit=" characters", unit_scale=True) as bar:
        for split, text, starts in pieces:
            writer = train if split == "train" else val
            writer.add(text, starts)
            bar.update(len(text))
    train.finish()
    val.finish()
    meta = {
        "tokenizer": "gpt2",
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "dtype": "uint16",
        "bytes": {"train": train.bytes, "val": val.bytes},
        "splits": {"train": train.shards, "val": val.shards},
        "source": source,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


# -------------------------------------------------------------------------------------------------
# Write a whole folder or nothing.

OURS = re.compile(r"meta\.json|cloze\.jsonl|instruct\.json|(train|val)_\d{4}\.npy")


def check_replaceable(out):
    """Raise UserError if `out` holds anything that this script did not write: the folder will be
    replaced, and files of others must not be lost."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file — choose another --out")
    names = sorted(os.listdir(out))
    foreign = [name for name in names if not OURS.fullmatch(name)]
    if "meta.json" not in names:
        foreign = names  # shards of other projects can have the same names as ours
    if foreign:
        raise UserError(f"{out} holds {foreign[0]}, which prepare_data.py did not write — choose "
                        f"another --out")


@contextlib.contextmanager
def new_folder(out):
    """A temporary folder beside `out`, which becomes `out` when the block succeeds.

    If the block fails, `out` stays as it was. After a kill `out` is the old folder, the new one, or
    absent, but never incomplete. Raises UserError if another process is preparing it."""
    out = out.resolve()
    check_replaceable(out)
    folder = out.with_name(f".{out.name}.preparing")
    older = out.with_name(f".{out.name}.replaced")
    in_use = f"{out} is being prepared by another process — wait for it, or choose another --out"
    folder.mkdir(parents=True, exist_ok=True)
    locked = lock(folder, in_use)
    # The process that held the lock before may have renamed or deleted this folder by now.
    if not folder.exists() or not os.path.samestat(os.fstat(locked), folder.stat()):
        os.close(locked)
        raise UserError(in_use)
    try:
        for leftover in folder.iterdir():  # of a killed process
            leftover.unlink()
        delete(older)
        yield folder
        for file in folder.iterdir():
            sync(file)
        sync(folder)
        replace(out, folder, older)
        sync(out.parent)
        delete(older)
    except BaseException:
        delete(folder)
        raise
    finally:
        os.close(locked)


def replace(out, folder, older):
    """Rename `out` to `older`, then `folder` to `out`. A full folder cannot be replaced in one
    step. If the second rename fails, undo the first."""
    if out.exists():
        out.rename(older)
    try:
        folder.rename(out)
    except OSError:
        if older.exists():
            older.rename(out)
        raise


def delete(folder):
    shutil.rmtree(folder, ignore_errors=True)


def sync(path):
    """Ask the operating system to put a file or a folder on the disk now."""
    with contextlib.suppress(PermissionError):  # Windows cannot open a folder
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


# -------------------------------------------------------------------------------------------------
# pydocs: the corpus on every computer that has Python.

def prepare_pydocs(out, vocab_size=DEFAULT_VOCAB_SIZE, quality="prose", val_quality="prose"):
    """Write the corpus of docstrings into the folder `out`.

    `quality` is that of the training shard, `val_quality` that of the validation shard; questions
    and instructions are prose. "prose": sentences. "raw": the docstrings with their code, tables
    and markup. "shuffled": every sentence is moved to a random place in its split."""
    tokenizer = Tokenizer(vocab_size)  # first, so that an error comes before the work
    with new_folder(Path(out)) as folder:
        versions = dependencies()
        absent = [package for package, version in versions.items() if version is None]
        if absent:
            print(f"not installed, so not in the training text: {', '.join(absent)}")
        documents = build_corpus()
        training = [document for document in documents if document.split == "train"]
        validation = [document for document in documents if document.split == "val"]
        training_texts = texts_of(training, quality)
        validation_texts = texts_of(validation, val_quality)

        pieces = [("train", text, True) for text in training_texts]
        pieces += [("val", text, True) for text in validation_texts]
        texts = training_texts + validation_texts
        source = {"name": "pydocs", "quality": quality, "val_quality": val_quality,
                  "python": sys.version.split()[0]}
        for package in PACKAGES:
            source[package] = importlib.metadata.version(package)
        source["dependencies"] = versions
        source["fingerprint"] = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        write_shards(folder, pieces, tokenizer, source, total=sum(map(len, texts)))

        items = cloze_items(validation)
        lines = [json.dumps(item) + "\n" for item in items]
        (folder / "cloze.jsonl").write_text("".join(lines))
        # As the validation text, questions and answers do not depend on the dependencies.
        rows = instruct_rows([document for document in documents
                              if document.package not in versions])
        (folder / "instruct.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"cloze.jsonl: {len(items):,} questions; instruct.json: {len(rows):,} rows")


def texts_of(documents, quality):
    """The text of each document, in a quality of `prepare_pydocs`."""
    if quality == "raw":
        return [f"{document.name}\n{document.raw}" for document in documents]
    if quality == "shuffled":
        return shuffle_sentences(documents)
    return [document.text() for document in documents]


# -------------------------------------------------------------------------------------------------
# text: the user's own files.

JSON_LINES = (".jsonl", ".jsonl.gz")
SUFFIXES = (".txt", ".md", *JSON_LINES)


def has_suffix(path, suffixes):
    return path.name.lower().endswith(suffixes)


def text_files(paths):
    """The files among `paths`, and the text files in the folders among them, each of them once."""
    found = {}  # real path → path, because two paths can lead to one file
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder — check the path")
        files = [path]
        if path.is_dir():
            files = files_in(path)
        if not files or not has_suffix(files[0], SUFFIXES):
            raise UserError(f"{path}: expected {', '.join(SUFFIXES)}, or a folder of these — "
                            f"convert it to one of them")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def files_in(folder):
    """The text files in a folder and the folders in it; prints what else is there and is not read.

    Hidden ones are left out: editors and notebooks keep older versions in them. The files are
    sorted, because a file system lists them in any order."""
    files = []
    unread = Counter()
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        names = path.relative_to(folder).parts
        if any(name.startswith(".") for name in names):
            unread["hidden"] += 1
        elif path.is_file() and has_suffix(path, SUFFIXES):
            files.append(path)
        else:
            unread[path.suffix or path.name] += 1
    if unread:
        kinds = ", ".join(f"{n} {kind}" for kind, n in unread.most_common(8))
        print(f"{folder}: {unread.total()} files are not read ({kinds}): only "
              f"{', '.join(SUFFIXES)} are")
    return files


def read_lines(path):
    """Yield (line number, line) of a UTF-8 file, plain or gzipped. Raises UserError.

    A byte-order mark at the start is dropped, and Windows line ends become \\n."""
    open_file = gzip.open if has_suffix(path, ".gz") else open
    line_number = 0
    try:
        with open_file(path, "rb") as file:
            for line_number, line in enumerate(file, 1):
                encoding = "utf-8-sig" if line_number == 1 else "utf-8"
                yield line_number, line.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {line_number}: not UTF-8 ({error.reason}) — convert the "
                        f"file, e.g. with iconv") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}, after line {line_number}: damaged gzip file ({error}) — download "
                        f"or copy it again") from None


def read_pieces(path, separator):
    """Yield the pieces (text, starts) of one file."""
    if has_suffix(path, JSON_LINES):
        return read_json_lines(path)
    return read_plain_text(path, separator)


def read_json_lines(path):
    """Each line is a document: a JSON object with the key "text". Empty lines are skipped."""
    for line_number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            text = parse_json(line)["text"]
            text.encode()  # fails for half a surrogate pair: JSON can write it, UTF-8 cannot
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'{path}, line {line_number}: expected a JSON object with a string '
                            f'"text" — fix or remove this line') from None
        if text.strip():
            yield text, True


def read_plain_text(path, separator):
    """The file is one document, or several with the separator between them."""
    held = []  # the lines of the current piece
    size = 0
    starts = True
    for _, line in read_lines(path):
        parts = line.split(separator) if separator else [line]
        for end in parts[:-1]:  # each ends a document
            text = "".join([*held, end]).strip("\n")
            if text.strip():
                yield text, starts
            held = []
            size = 0
            starts = True
        held.append(parts[-1])
        size += len(parts[-1])
        if size > PIECE_SIZE:
            yield "".join(held), starts
            held = []
            size = 0
            starts = False
    text = "".join(held)
    if text.strip():
        yield text, starts


def read_all_pieces(files, separator):
    for file in files:
        yield from read_pieces(file, separator)


class Documents:
    """What the first reading of all files finds: the length and a key of each document.

    Documents with the same words have the same key, whatever the white space between them. Raises
    UserError if a file cannot be read."""

    def __init__(self, files, separator):
        keys = array.array("Q")  # 8 bytes a document, of which there can be many millions
        lengths = array.array("Q")  # in characters
        empty = []
        is_separated = False
        with tqdm(desc="checking", unit=" characters", unit_scale=True) as bar:
            for file in files:
                before = len(keys)
                for text, starts in read_pieces(file, separator):
                    if starts:
                        keys.append(0)
                        lengths.append(0)
                    words = " ".join(text.split())
                    keys[-1] = stable_hash(f"{keys[-1]} {words}")
                    lengths[-1] += len(text)
                    bar.update(len(text))
                documents = len(keys) - before
                if documents == 0:
                    empty.append(str(file))
                if documents > 1 and not has_suffix(file, JSON_LINES):
                    is_separated = True
        if empty:
            print(f"{len(empty)} files hold no text: {', '.join(empty[:5])}")
        if separator and not is_separated:
            print(f"--separator {separator!r} separates nothing: it occurs in no .txt or .md file, "
                  f"so each of them is one document")
        self.keys = np.array(keys, dtype=np.uint64)
        self.distinct, first = np.unique(self.keys, return_index=True)
        self.is_first = np.zeros(len(keys), dtype=bool)  # not a repetition of an earlier one
        self.is_first[first] = True
        self.total = int(np.array(lengths)[self.is_first].sum())  # characters
        repeated = len(keys) - len(self.distinct)
        if repeated > 0:
            print(f"{repeated} of {len(keys)} documents repeat another one and are left out")

    def first_ones(self, pieces):
        """Yield (key, text, starts): the pieces, without those of repeated documents."""
        number = -1
        for text, starts in pieces:
            number += starts
            if number == len(self.keys):
                break
            if self.is_first[number]:
                yield self.keys[number], text, starts
        if number != len(self.keys) - 1:
            raise UserError("a file was changed while it was read — prepare the data again")

    def split(self, pieces):
        """Yield (split, text, starts): 5 % of the documents, or of a few long ones, are for
        validation."""
        if len(self.distinct) >= 20:
            threshold = self.distinct[int(len(self.distinct) * VAL_SHARE)]
            return split_by_key(self.first_ones(pieces), threshold)
        # 5 % of so few documents is at most one document, of any length
        return split_by_length(self.first_ones(pieces), self.total)


def split_by_key(pieces, threshold):
    """Yield (split, text, starts). A document is for validation if its key is small, so the order
    of the files does not matter."""
    for key, text, starts in pieces:
        yield "val" if key <= threshold else "train", text, starts


def split_by_length(pieces, total):
    """Yield (split, text, starts). The last 5 % of all `total` characters are for validation."""
    left = int(total * (1 - VAL_SHARE))  # characters that still go to training
    split = "train"
    for _, text, starts in pieces:
        if split == "train" and len(text) > left:
            cut = place_to_cut(text, left, int(total * VAL_SHARE))
            if cut > 0:
                yield "train", text[:cut], starts
            text = text[cut:]
            starts = True
            split = "val"
        left -= len(text)
        yield split, text, starts


def place_to_cut(text, end, slack):
    """The last place up to `end` after a line break, if one is within `slack` characters of it,
    else (a book in one line) after a space within them, else `end` itself."""
    start = max(0, end - slack)
    after_line = text.rfind("\n", start, end) + 1
    after_word = text.rfind(" ", start, end) + 1
    return after_line or after_word or end


class PassageCounter:
    """Counts the passages of the validation text that stand in the training text too. Whole
    documents never do; but of two versions of a text one may be on each side.

    A passage is eight words from one on that ends with h, p, x, 0 or 8 (or a sign whose code is
    divisible by 8). So the same passages are taken from a text and from its other version, however
    their lines are broken."""
    WORDS = 8

    def __init__(self, total):
        self.sums = {"train": array.array("I"), "val": array.array("I")}  # 4 bytes a passage
        self.one_in = 1 + total // 2**28  # so that those of any text fit in memory

    def watch(self, pieces):
        for split, text, starts in pieces:
            words = text.split()
            for place, word in enumerate(words):
                if ord(word[-1]) % 8 == 0:
                    passage = " ".join(words[place:place + self.WORDS])
                    checksum = zlib.crc32(passage.encode())
                    if checksum % self.one_in == 0:
                        self.sums[split].append(checksum)
            yield split, text, starts

    def report(self):
        known = np.isin(self.sums["val"], self.sums["train"])
        if known.any() and known.mean() > 0.05:
            print(f"note: {known.mean():.0%} of the passages for validation are in the training "
                  f"text too, so its loss will be too low — is a text there in two versions?")


def prepare_text(paths, out, vocab_size=DEFAULT_VOCAB_SIZE, separator=None):
    """Write the user's own text into the folder `out`.

    The text is read twice: first to check and count it, then to encode it."""
    if separator and "\n" in separator:
        raise UserError("a separator must be within one line — choose another --separator")
    tokenizer = Tokenizer(vocab_size)
    files = text_files(paths)
    documents = Documents(files, separator)
    pieces = documents.split(read_all_pieces(files, separator))
    passages = PassageCounter(documents.total)
    names = [file.name for file in files]
    source = {"name": "text", "files": names, "separator": separator}
    with new_folder(Path(out)) as folder:
        write_shards(folder, passages.watch(pieces), tokenizer, source, documents.total)
    passages.report()


# -------------------------------------------------------------------------------------------------
# The command line.

def show(text, vocab_size):
    """Print the tokens of a text: as pieces, as ids, and how many bytes each stands for."""
    tokenizer = Tokenizer(vocab_size)
    ids = tokenizer.encode(text)
    pieces = [repr(tokenizer.decode([token])) for token in ids]
    print("|".join(piece[1:-1] for piece in pieces))  # without the quotation marks
    print(*ids)
    size = len(text.encode())
    print(f"{len(text)} characters, {size} bytes, {len(ids)} tokens: "
          f"{size / max(1, len(ids)):.2f} bytes per token (vocabulary {vocab_size:,})")


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    pydocs = commands.add_parser("pydocs", help="the manuals of Python and the required packages")
    qualities = ("prose", "raw", "shuffled")
    pydocs.add_argument("--quality", default="prose", choices=qualities,
                        help="of the training shard")
    pydocs.add_argument("--val_quality", default="prose", choices=qualities,
                        help="of the validation shard")
    pydocs.add_argument("--out", type=Path, default=Path("data/pydocs"), help="folder to write")

    text = commands.add_parser("text", help="your own files, or folders of them")
    text.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=", ".join(SUFFIXES))
    text.add_argument("--separator", type=valid_text,
                      help="what stands between the documents of one .txt or .md file")
    text.add_argument("--out", type=Path,
                      help="folder to write; if not given, data/<name of the first path>")

    display = commands.add_parser("show", help="the tokens of a text")
    display.add_argument("text", type=valid_text)

    vocab_size = number(int, 257, GPT2_VOCAB_SIZE)
    for command in (pydocs, text, display):
        command.add_argument("--vocab_size", type=vocab_size, default=DEFAULT_VOCAB_SIZE,
                             help=f"257 to {GPT2_VOCAB_SIZE}")
    display.set_defaults(vocab_size=GPT2_VOCAB_SIZE)
    return parser.parse_args(argv)


@script
def main(argv=None):
    args = parse(argv)
    if args.command == "show":
        show(args.text, args.vocab_size)
        return
    start = time.monotonic()
    out = args.out
    if args.command == "pydocs":
        prepare_pydocs(out, args.vocab_size, args.quality, args.val_quality)
    else:
        if out is None:
            name = args.paths[0].resolve().name.split(".")[0]
            out = Path("data", name)
        prepare_text(args.paths, out, args.vocab_size, args.separator)
    seconds = time.monotonic() - start
    print(f"{out} is ready after {seconds:.0f} s. Next: python train.py --data {out}")


if __name__ == "__main__":
    sys.exit(main())
