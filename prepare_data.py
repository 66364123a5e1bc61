"""prepare_data.py — turn text into shards of tokens that train.py reads.

    python prepare_data.py pydocs                                   # the manuals on this computer, into data/pydocs
    python prepare_data.py text book.txt notes/ --out data/mine     # .txt, .md, .jsonl, .jsonl.gz, or folders of these
    python prepare_data.py show "The tokenizer at work." --vocab_size 512

`pydocs` needs no network: its text is on every computer that has Python (see pydocs.py). Beside the shards it writes
`cloze.jsonl`, a multiple-choice test from the validation text, and `instruct.json`, questions and answers in Alpaca's
format. The same sources give the same bytes, whatever the number of cores; and a folder is written
under a temporary name and renamed once, when all of it is on the disk: there is never half a folder.
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
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import GPT2_VOCAB_SIZE, Tokenizer
from errors import UserError, script
from pydocs import PACKAGES, VAL_SHARE, build_corpus, cloze_items, instruct_rows, shuffle_sentences, stable_hash

# With 4,096 pieces a tiny model spends its arithmetic on the network, not on the output layer (see data.Tokenizer).
DEFAULT_VOCAB_SIZE = 4096
SHARD_TOKENS = 100_000_000
MIN_TOKENS = 64  # in a split; fewer are no measure of anything



# ---------------------------------------------------------------------------------------------------------------------
# Writing: one folder, one rename.

OURS = re.compile(r"meta\.json|cloze\.jsonl|instruct\.json|(train|val)_\d{4}\.npy")


def check_replaceable(out):
    """UserError if `out` holds anything that an earlier run of this script did not write: nobody's files get lost."""
    names = sorted(os.listdir(out)) if out.is_dir() else [out.name] if out.exists() else []
    foreign = [name for name in names if not OURS.fullmatch(name)]
    if foreign or (names and "meta.json" not in names):
        raise UserError(f"{out}: holds what prepare_data.py did not write ({(foreign or names)[0]}) — choose another --out")


def sync(path):
    """Ask the system to put a file or a folder on the disk now."""
    with contextlib.suppress(PermissionError):  # Windows cannot open a folder
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


@contextlib.contextmanager
def new_folder(out):
    """A temporary folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not."""
    out = out.resolve()
    check_replaceable(out)
    folder, older = out.with_name(f".{out.name}.preparing"), out.with_name(f".{out.name}.replaced")
    for leftover in (folder, older):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in [*folder.iterdir(), folder]:
            sync(path)
        if out.exists():
            out.rename(older)  # a kill between the two renames leaves no folder at `out`, never a half one
        folder.rename(out)
        sync(out.parent)
    finally:
        for leftover in (folder, older):
            shutil.rmtree(leftover, ignore_errors=True)


class ShardWriter:
    """Tokens of one split, as they come, into `{split}_0000.npy` and on: 200 MB of memory however long the text."""

    def __init__(self, folder, split, tokenizer):
        self.folder, self.split, self.tokenizer = folder, split, tokenizer
        self.buffer, self.used = np.empty(SHARD_TOKENS, dtype=np.uint16), 0  # the system maps its pages when they are used
        self.shards, self.bytes, self.documents = [], 0, 0

    def write(self, pieces):
        """Encode pieces [(text, starts a document)] on all cores; threads suffice, tiktoken works outside the GIL."""
        encoded = self.tokenizer.bpe.encode_ordinary_batch([text for text, _ in pieces], num_threads=os.cpu_count() or 1)
        for (text, starts), ids in zip(pieces, encoded):
            ids = np.array([self.tokenizer.eot] * starts + ids, dtype=np.uint16)
            self.bytes += len(text.encode())
            self.documents += starts
            while len(ids):
                part, ids = np.split(ids, [SHARD_TOKENS - self.used])
                self.buffer[self.used:self.used + len(part)] = part
                self.used += len(part)
                if self.used == SHARD_TOKENS:
                    self.flush()

    def flush(self):
        if self.used:
            path = self.folder / f"{self.split}_{len(self.shards):04d}.npy"
            np.save(path, self.buffer[:self.used])
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            self.shards.append({"file": path.name, "tokens": self.used, "sha256": digest})
            self.used = 0


def write_shards(folder, pieces, vocab_size, source, total):
    """Encode `pieces`, triples (split, text, starts a document), into shards and meta.json. `total` is the number of
    characters to come, for the progress bar. Raises UserError if a split stays too short."""
    tokenizer = Tokenizer(vocab_size)
    writers = {split: ShardWriter(folder, split, tokenizer) for split in ("train", "val")}
    waiting = {"train": [], "val": []}
    with tqdm(total=total, desc="encoding", unit="B", unit_scale=True) as bar:
        for split, text, starts in pieces:
            waiting[split].append((text, starts))
            bar.update(len(text))
            if len(waiting[split]) >= 4096 or len(text) > 1 << 18:  # a few megabytes at a time
                writers[split].write(waiting[split])
                waiting[split] = []
    for split, writer in writers.items():
        writer.write(waiting[split])
        writer.flush()
        tokens = sum(shard["tokens"] for shard in writer.shards)
        if tokens < MIN_TOKENS:
            raise UserError(f"too little text: {tokens} tokens for {split} — give more (validation is {VAL_SHARE:.0%} of it "
                            f"and needs at least {MIN_TOKENS} tokens)")
        print(f"{split:>5}: {writer.documents:9,} documents {writer.bytes / 1e6:9.2f} MB {tokens:13,} tokens "
              f"{writer.bytes / tokens:6.2f} bytes/token")
    meta = {"tokenizer": "gpt2", "vocab_size": vocab_size, "eot": tokenizer.eot, "dtype": "uint16",
            "bytes": {split: writer.bytes for split, writer in writers.items()},
            "splits": {split: writer.shards for split, writer in writers.items()}, "source": source}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# pydocs: the embedded corpus.

def prepare_pydocs(out, vocab_size=DEFAULT_VOCAB_SIZE, quality="prose"):
    """Write the corpus of docstrings into folder `out`. `quality` changes the training shard only: "prose", "shuffled"
    (its sentences dealt out at random over all documents) or "raw" (the docstrings with their code, tables, markup)."""
    Tokenizer(vocab_size)  # complains now rather than after the work
    with new_folder(Path(out)) as folder:
        documents = build_corpus()
        training = [d for d in documents if d.split == "train"]
        validation = [d for d in documents if d.split == "val"]
        texts = (shuffle_sentences(training) if quality == "shuffled" else
                 [f"{d.name}\n{d.raw}" if quality == "raw" else d.text() for d in training])
        pieces = [("train", text, True) for text in texts] + [("val", d.text(), True) for d in validation]
        fingerprint = hashlib.sha256("\0".join(text for _, text, _ in pieces).encode()).hexdigest()
        source = {"name": "pydocs", "quality": quality, "python": sys.version.split()[0],
                  **{package: importlib.metadata.version(package) for package in PACKAGES}, "fingerprint": fingerprint}
        write_shards(folder, pieces, vocab_size, source, sum(len(text) for _, text, _ in pieces))
        items, rows = cloze_items(validation), instruct_rows(documents)
        (folder / "cloze.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        (folder / "instruct.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"cloze.jsonl: {len(items):,} questions; instruct.json: {len(rows):,} rows")


# ---------------------------------------------------------------------------------------------------------------------
# text: your own files.

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz")


def text_files(paths):
    """The files that are named, and those of a known kind in the folders that are named, sorted within each."""
    found = []
    for path in paths:
        files = sorted(f for f in path.rglob("*") if f.name.endswith(SUFFIXES)) if path.is_dir() else [path]
        if not path.exists():
            raise UserError(f"{path}: no such file or folder — check the path")
        if not files or not files[0].name.endswith(SUFFIXES):
            raise UserError(f"{path}: expected {', '.join(SUFFIXES)}, or a folder of these — convert it to one of them")
        found += files
    return found


def read_lines(path):
    """Yield (number, line) of a UTF-8 file, plain or gzipped, without byte-order mark, the line's end being one \n."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}) — convert the file, e.g. with iconv") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}, after line {number}: damaged gzip file ({error}) — fetch it again") from None


def read_pieces(path, separator=None):
    """Yield (text, starts a document) of one file, a long document in pieces of a megabyte, so that any file fits."""
    if ".jsonl" in path.suffixes[-2:]:
        for number, line in read_lines(path):
            try:
                text = json.loads(line)["text"] if line.strip() else ""
                text.encode()  # JSON can spell half a character (a lone surrogate), UTF-8 cannot
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f'{path}, line {number}: expected a JSON object with a string "text" — mend or remove '
                                "this line") from None
            if text:
                yield text, True
        return
    held, size, starts = [], 0, True
    for _, line in read_lines(path):
        *ends, line = line.split(separator) if separator else [line]
        for text in ends:
            if text := "".join([*held, text]).strip("\n"):
                yield text, starts
            held, size, starts = [], 0, True
        held.append(line)
        size += len(line)
        if size > 1 << 20:
            yield "".join(held), starts
            held, size, starts = [], 0, False
    if text := "".join(held):
        yield text, starts


def split_pieces(pieces, total, threshold):
    """Yield (split, text, starts a document). Validation is the documents with the smallest hashes or, without a
    threshold, the last 5 % of all `total` characters, cut at a line break."""
    seen, split, train_share = 0, "train", int(total * (1 - VAL_SHARE))
    for text, starts in pieces:
        if threshold is not None:
            split = ("train", "val")[stable_hash(text) <= threshold] if starts else split
        elif split == "train" and seen + len(text) > train_share:
            end = train_share - seen
            # a line break nearby, else (a book in one line) a space, else anywhere
            cut = text.rfind("\n", max(0, end - int(total * VAL_SHARE)), end) + 1 or text.rfind(" ", 0, end) + 1 or end
            if cut:
                yield "train", text[:cut], starts
            seen, text, starts, split = seen + cut, text[cut:], True, "val"
        seen += len(text)
        if text:
            yield split, text, starts


def prepare_text(paths, out, vocab_size=DEFAULT_VOCAB_SIZE, separator=None):
    """Write the user's own text into folder `out`. It is read twice: once to check and count, once to encode."""
    Tokenizer(vocab_size)
    files, total, hashes = text_files(paths), 0, array.array("Q")
    with tqdm(desc="checking", unit="B", unit_scale=True) as bar:
        for text, starts in (piece for file in files for piece in read_pieces(file, separator)):
            total += len(text)
            bar.update(len(text))
            if starts:
                hashes.append(stable_hash(text))
    # Of fewer than 20 documents, 5 % by count would be one, whatever its size.
    threshold = sorted(hashes)[int(len(hashes) * VAL_SHARE)] if len(hashes) >= 20 else None
    source = {"name": "text", "files": [file.name for file in files], "separator": separator}
    with new_folder(Path(out)) as folder:
        pieces = (piece for file in files for piece in read_pieces(file, separator))
        write_shards(folder, split_pieces(pieces, total, threshold), vocab_size, source, total)


# ---------------------------------------------------------------------------------------------------------------------
# The command line.

def show(text, vocab_size):
    """Print how a text is cut into tokens."""
    tokenizer, text = Tokenizer(vocab_size), text.encode("utf-8", errors="replace").decode()  # argv may hold what is no UTF-8
    ids = tokenizer.encode(text)
    print("|".join(repr(tokenizer.decode([i]))[1:-1] for i in ids))
    print(*ids)
    size = len(text.encode())
    print(f"{len(text)} characters, {size} bytes, {len(ids)} tokens: {size / max(1, len(ids)):.2f} bytes per token "
          f"(vocabulary {vocab_size:,})")


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pydocs = commands.add_parser("pydocs", help="the documentation of Python and of the required packages")
    pydocs.add_argument("--quality", default="prose", choices=("prose", "raw", "shuffled"), help="of the training shard")
    text = commands.add_parser("text", help="your own .txt, .md, .jsonl, .jsonl.gz files or folders of these")
    text.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    text.add_argument("--separator", help="stands between the documents of one .txt or .md file, e.g. '<|endoftext|>'")
    for command, default in ((pydocs, "data/pydocs"), (text, "data/<name of the first path>")):
        command.add_argument("--out", type=Path, help=f"folder to write (default: {default})")
    display = commands.add_parser("show", help="how a text is cut into tokens")
    display.add_argument("text")
    for command, default in ((pydocs, DEFAULT_VOCAB_SIZE), (text, DEFAULT_VOCAB_SIZE), (display, GPT2_VOCAB_SIZE)):
        command.add_argument("--vocab_size", type=int, default=default, help="257 to 50257 (default: %(default)s)")
    args = parser.parse_args(argv)

    start = time.time()
    if args.command == "show":
        return show(args.text, args.vocab_size)
    if args.command == "pydocs":
        out = args.out or Path("data", "pydocs")
        prepare_pydocs(out, args.vocab_size, args.quality)
    else:
        out = args.out or Path("data", args.paths[0].resolve().name.split(".")[0])
        prepare_text(args.paths, out, args.vocab_size, args.separator)
    print(f"{out} is ready after {time.time() - start:.0f} s. Next: python train.py --data {out}")


if __name__ == "__main__":
    main()
