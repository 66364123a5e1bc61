"""prepare_data.py — turn text into shards of tokens that train.py reads.

    python prepare_data.py pydocs                # the manuals on this computer, to data/pydocs
    python prepare_data.py text book.txt notes/  # .txt, .md, .jsonl, .jsonl.gz, folders; data/book
    python prepare_data.py fineweb-edu --max_tokens 1000000000      # of its 10 billion tokens
    python prepare_data.py fineweb-edu --from *.parquet --out data/web     # files on this disk
    python prepare_data.py hellaswag             # questions for evaluate.py; also --from
    python prepare_data.py alpaca                # conversations for sft.py; also --from
    python prepare_data.py show "The tokenizer at work." --vocab_size 512

`pydocs` needs no network: its text comes with Python and the required packages (see
corpus/pydocs.py). Beside the shards it writes `cloze.jsonl`, a multiple-choice test made from the
validation text, and `instruct.json`, questions and answers in Alpaca's format.

The same sources give the same bytes, with any number of cores. A folder is written under a
temporary name and renamed when all of it is on the disk, so an incomplete folder is never visible.
"""
import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from corpus import hub, tables
from corpus.documents import Documents, PassageCounter
from corpus.pydocs import (
    PACKAGES, VAL_SHARE, build_corpus, cloze_items, dependencies, instruct_rows, shuffle_sentences)
from corpus.textfiles import PIECE_SIZE, SUFFIXES, has_suffix, read_all_pieces, text_files
from data import GPT2_VOCAB_SIZE, Tokenizer, is_of_split
from support import chat
from support.files import PROGRESS, delete, new_folder, sync, write_json
from support.flags import Parser, number, text as valid_text
from support.runs import UserError, parse_json, script
from support.shards import check_ids, check_meaning, open_shard

# With 4,096 ids a tiny model spends its arithmetic on its layers, not on the output layer (see
# data.Tokenizer).
DEFAULT_VOCAB_SIZE = 4096
SHARD_TOKENS = 100_000_000
MIN_TOKENS = 64  # in each split; the loss on fewer tokens measures nothing


# -------------------------------------------------------------------------------------------------
# Encode texts on all cores.

LARGE = 1 << 24  # characters or bytes; less is encoded before other processes have started
worker_tokenizer = None  # of this process, if it is a worker


def start_worker(vocab_size):
    """Prepare a worker process: its tokenizer, and that it ends when this process does."""
    global worker_tokenizer
    worker_tokenizer = Tokenizer(vocab_size)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def interrupts_held_back():
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode(text, starts, tokenizer=None):
    """The ids of a piece, (n,) uint16, after end-of-text if a document begins with it."""
    tokenizer = tokenizer or worker_tokenizer
    ids = tokenizer.encode_array(text)
    if starts:
        return np.concatenate((np.array([tokenizer.eot], dtype=np.uint16), ids))
    return ids


def encode_in_worker(pieces):
    return [encode(text, starts) for text, starts in pieces]


def encode_all(batches, tokenizer, parallel):
    """Yield (items, ids of each) for all batches, in order; ids as from `encode`.

    batches: lists of (item, text, starts). parallel: in processes, one for each core. (Threads are
    not enough: on two cores they were 1.6 times as fast as one, two processes 1.9 times.)"""
    if not parallel:
        for batch in batches:
            items = [item for item, _, _ in batch]
            yield items, [encode(text, starts, tokenizer) for _, text, starts in batch]
        return
    cores = os.cpu_count()
    # Enough for a second, in which a shard is written, and so few that they fit in memory.
    most = max(128, 4 * cores)
    context = multiprocessing.get_context("spawn")  # a fork would take our locks along
    workers = ProcessPoolExecutor(cores, context, start_worker, (tokenizer.vocab_size,))
    try:
        running = deque()  # (items, future), oldest first
        for batch in batches:
            items = [item for item, _, _ in batch]
            pieces = [(text, starts) for _, text, starts in batch]
            with interrupts_held_back():  # a new process inherits this: a Ctrl-C is for this one
                running.append((items, workers.submit(encode_in_worker, pieces)))
            if len(running) > most:
                items, future = running.popleft()
                yield items, future.result()
        for items, future in running:
            yield items, future.result()
    except BrokenExecutor:
        raise UserError("a process that encodes was killed, perhaps for lack of memory — close "
                        "other programs, and run the same command again") from None
    finally:
        workers.shutdown(cancel_futures=True)


def batched(pieces, size=PIECE_SIZE // 4):
    """Yield the pieces (item, text, starts) in lists of about `size` characters."""
    batch = []
    waiting = 0
    for piece in pieces:
        batch.append(piece)
        waiting += len(piece[1])
        if waiting >= size:
            yield batch
            batch = []
            waiting = 0
    if batch:
        yield batch


# -------------------------------------------------------------------------------------------------
# Shards

class ShardWriter:
    """Writes the tokens of one split to `{split}_0000.npy`, `{split}_0001.npy` and so on.

    It holds one shard in memory, 200 MB, however long the text is."""

    def __init__(self, folder, split, tokenizer, shard_tokens=None):
        self.folder = folder
        self.split = split
        self.tokenizer = tokenizer
        # uses memory only as it is filled
        self.buffer = np.empty(shard_tokens or SHARD_TOKENS, dtype=np.uint16)
        self.used = 0
        self.done = nothing_done()

    def store(self, ids):
        """Store (n,) uint16."""
        while len(ids) > 0:
            ids = ids[self.fill(ids):]
            if self.used == len(self.buffer):
                self.write_shard()

    def fill(self, ids):
        """Store what fits into the current shard; returns how many that are."""
        n = min(len(ids), len(self.buffer) - self.used)
        self.buffer[self.used:self.used + n] = ids[:n]
        self.used += n
        return n

    def write_shard(self):
        tokens = self.buffer[:self.used]
        path = self.folder / f"{self.split}_{len(self.done['shards']):04d}.npy"
        np.save(path, tokens)
        record(self.done, open_shard(path), self.tokenizer)
        self.used = 0

    def finish(self):
        """Write what is left and print a summary. Raises UserError if the split is too short."""
        if self.used > 0:
            self.write_shard()
        tokens = tokens_in(self.done)
        if tokens < MIN_TOKENS:
            raise UserError(f"too little text: {tokens} tokens for {self.split} — add text "
                            f"(validation is {VAL_SHARE:.0%} of it and needs at least "
                            f"{MIN_TOKENS} tokens)")
        print_summary(self.split, self.done)


def nothing_done():
    """What is done of a split; "shards" are their rows in meta.json."""
    return {"shards": [], "bytes": 0, "documents": 0}


def record(done, shard, tokenizer):
    """Add a shard to what is done of a split."""
    tokens = shard.tokens
    done["shards"].append({"file": shard.path.name, "tokens": len(tokens),
                           "sha256": shard.sha256()})
    for start in range(0, len(tokens), 1 << 20):
        part = tokens[start:start + (1 << 20)]
        done["bytes"] += int(tokenizer.byte_lengths[part].sum())
        done["documents"] += int(np.count_nonzero(part == tokenizer.eot))  # one before each


def tokens_in(done):
    return sum(shard["tokens"] for shard in done["shards"])


def print_summary(split, done):
    tokens = tokens_in(done)
    print(f"{split:>5}: {done['documents']:9,} documents {done['bytes'] / 1e6:9.2f} MB "
          f"{tokens:13,} tokens {done['bytes'] / tokens:6.2f} bytes/token")


def write_shards(folder, pieces, tokenizer, source, total):
    """Encode `pieces`, triples (split, text, starts), into shards, and describe them in meta.json.
    `starts` is True if a document begins with this piece.

    source: where the text is from, for meta.json. total: its characters, for the progress bar.
    Raises UserError if a split is too short."""
    train = ShardWriter(folder, "train", tokenizer)
    val = ShardWriter(folder, "val", tokenizer)
    pieces = (((split, len(text)), text, starts) for split, text, starts in pieces)
    batches = encode_all(batched(pieces), tokenizer, total > LARGE)
    bar = tqdm(total=total, desc="encoding", unit=" characters", unit_scale=True)
    with bar, closing(batches):
        for items, encoded in batches:
            for (split, length), ids in zip(items, encoded):
                writer = train if split == "train" else val
                writer.store(ids)
                bar.update(length)
    train.finish()
    val.finish()
    write_meta(folder, tokenizer, train.done, val.done, source)


def write_meta(folder, tokenizer, train, val, source):
    """Describe the shards of both splits in meta.json."""
    meta = {
        "tokenizer": "gpt2",
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "dtype": "uint16",
        "bytes": {"train": train["bytes"], "val": val["bytes"]},
        "splits": {"train": train["shards"], "val": val["shards"]},
        "source": source,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


OURS = re.compile(r"(meta|instruct|progress)\.json|(cloze|hellaswag|alpaca)\.jsonl|"
                  r"(train|val)_\d{4}\.npy")


def check_replaceable(out, name):
    """Raise UserError if `out` holds anything that this script did not write, or wrote from another
    source than `name`: the folder will be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file — choose another --out")
    names = sorted(os.listdir(out))
    listed = listed_in(out / "meta.json")
    foreign = [name for name in names if not OURS.fullmatch(name) and name not in listed]
    if "meta.json" not in names:
        foreign = names  # shards of other projects can have the same names as ours
    if foreign:
        raise UserError(f"{out} holds {foreign[0]}, which prepare_data.py did not write — choose "
                        f"another --out")
    present = source_in(out / "meta.json")
    if names and present != name:
        raise UserError(f"{out} holds what was prepared from {present} — choose another --out, or "
                        f"delete it")


def source_in(meta):
    """The name of the source in a meta.json."""
    try:
        return parse_json(meta.read_bytes())["source"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown source"


def listed_in(meta):
    """The names of the shards in a meta.json: those of --tokenized are not ours."""
    try:
        splits = parse_json(meta.read_bytes())["splits"]
        return [shard["file"] for shard in splits["train"] + splits["val"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


# -------------------------------------------------------------------------------------------------
# pydocs: the corpus on every computer that has Python.

def prepare_pydocs(out, vocab_size=DEFAULT_VOCAB_SIZE, quality="prose", val_quality="prose"):
    """Write the corpus of docstrings into the folder `out`.

    `quality` is that of the training shard, `val_quality` that of the validation shard; questions
    and instructions are prose. "prose": sentences. "raw": the docstrings with their code, tables
    and markup. "shuffled": every sentence is moved to a random place in its split."""
    tokenizer = Tokenizer(vocab_size)  # first, so that an error comes before the work
    with new_folder(Path(out), partial(check_replaceable, name="pydocs")) as folder:
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
    with new_folder(Path(out), partial(check_replaceable, name="text")) as folder:
        write_shards(folder, passages.watch(pieces), tokenizer, source, documents.total)
    passages.report()


# -------------------------------------------------------------------------------------------------
# fineweb-edu: web pages chosen for what they teach (Penedo et al. 2024, arXiv 2406.17557).

FINEWEB = "HuggingFaceFW/fineweb-edu"
TOKENIZED = "kjj0/finewebedu10B-gpt2"  # the same as tokens, in llm.c's format
TOKEN_FILES = (".bin", ".npy")


def prepare_fineweb(out, vocab_size, sample, max_tokens, paths, tokenized):
    """Write the shards of a sample of FineWeb-Edu, or of the files in `paths`, into `out`: the
    first is for validation, as in the paper.

    What is done stays there if it is stopped, and the same command goes on from the last whole
    shard."""
    tokenizer = Tokenizer(vocab_size)
    with new_folder(Path(out), partial(check_replaceable, name="fineweb-edu"), keep=True) as folder:
        downloads = folder / "downloads"
        if paths:
            files = hub.LocalFiles(files_of_rows(paths))
            source = {"name": "fineweb-edu", "files": [Path(name).name for name in files.names]}
        else:
            source, files = open_hub(folder, downloads, sample, tokenized)
        settings = {"source": source, "files": files.rows, "vocab_size": vocab_size,
                    "max_tokens": max_tokens}
        if has_suffix(Path(files.names[0]), TOKEN_FILES):
            check_whole_vocabulary(vocab_size)
            copy_shards(folder, tokenizer, settings, files)
        else:
            encode_files(folder, tokenizer, settings, files)
        delete(downloads)


def files_of_rows(paths, column="text"):
    """The files among `paths` and in the folders among them, sorted. Raises UserError if there are
    none, of two kinds, damaged ones, or parquet files without the column."""
    found = {}  # real path → path
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder — check the path")
        suffixes = (*tables.SUFFIXES, *TOKEN_FILES) if column == "text" else tables.SUFFIXES
        files = [path]
        if path.is_dir():  # a .json in it tells about the other files, rather than being one
            suffixes = tuple(suffix for suffix in suffixes if suffix != ".json")
            files = [file for file in sorted(path.rglob("*")) if file.is_file()
                     and not any(part.startswith(".") for part in file.relative_to(path).parts)]
        files = [file for file in files if has_suffix(file, suffixes)]
        if not files:
            raise UserError(f"{path}: expected {', '.join(suffixes)}, or a folder of these — "
                            f"convert it to one of them")
        for file in files:
            found.setdefault(file.resolve(), file)  # each once
    found = list(found.values())
    of_tokens = [has_suffix(file, TOKEN_FILES) for file in found]
    if any(of_tokens) and not all(of_tokens):
        raise UserError("files of text and files of tokens are mixed — give one kind with --from")
    for file in found:  # at once, not after hours
        if has_suffix(file, ".parquet"):
            tables.open_parquet(file, column)
    return found


def open_hub(folder, downloads, sample, tokenized):
    """(what is read, Downloads). A preparation that goes on stays with its commit."""
    repo = TOKENIZED if tokenized else FINEWEB
    saved = read_progress(folder)
    source = {} if saved is None else saved["settings"]["source"]
    if source.get("repo") == repo and source.get("sample") == sample:
        listed = [hub.HubFile(*row) for row in saved["settings"]["files"]]
    else:
        commit, listed = hub.list_files(repo, None if tokenized else f"sample/{sample}")
        suffix = ".bin" if tokenized else ".parquet"
        listed = [file for file in listed if file.name.endswith(suffix)]
        if not listed:
            raise UserError(f"{repo} has no {suffix} files of this sample any more — look at it on "
                            f"the hub, download its files, and give them with --from")
        source = {"name": "fineweb-edu", "repo": repo, "sample": sample, "commit": commit}
    return source, hub.Downloads(repo, source["commit"], listed, downloads)


def read_progress(folder):
    """How far an earlier process has come, or None. It is in a file that is replaced whenever a
    shard is on the disk. Raises UserError if it cannot be used."""
    file = folder / PROGRESS
    if not file.exists():
        return None
    try:
        saved = parse_json(file.read_bytes())
        place, row, stored = saved["position"]
        fits = (0 <= place <= len(saved["settings"]["files"]) and row >= 0 and stored >= 0
                and isinstance(saved["settings"]["source"], dict))
        for split in ("train", "val"):
            for shard in saved[split]["shards"]:
                open_shard(folder / shard["file"], shard["tokens"])
            fits = fits and saved[split]["bytes"] >= 0 and saved[split]["documents"] >= 0
    except UserError as why:
        raise UserError(f"{str(why).split(' — ')[0]} — delete {folder} to begin again") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"{file} is damaged — delete {folder} to begin again")
    return saved


def begin_or_go_on(folder, settings):
    """The progress to go on from. Raises UserError if it is that of another command."""
    saved = read_progress(folder)
    if saved is None:
        for leftover in folder.iterdir():  # of a process that was killed before its first shard
            if leftover.name != "downloads":
                delete(leftover)
        return {"settings": settings, "position": [0, 0, 0], "train": nothing_done(),
                "val": nothing_done()}
    now = json.loads(json.dumps(settings))  # as JSON has them: tuples are lists there
    changed = [name for name in now if saved["settings"].get(name) != now[name]]
    if changed:
        raise UserError(f"{folder} holds an unfinished preparation with other {changed[0]} (or "
                        f"they were changed) — give the same to go on, or delete this folder to "
                        f"begin again")
    return saved


def encode_files(folder, tokenizer, settings, files):
    """Encode the column "text" of the files into shards.

    Everything is read in one order, and cut where a shard is full, so a position in the texts is
    all that a later process needs to go on: [file, row, tokens of this row that are stored]."""
    wanted = settings["max_tokens"] or sys.maxsize
    shard_tokens = min(SHARD_TOKENS, max(MIN_TOKENS, wanted // 20))
    progress = begin_or_go_on(folder, settings)
    writers = {}
    for split in ("val", "train"):
        writers[split] = ShardWriter(folder, split, tokenizer, shard_tokens)
        writers[split].done = progress[split]
    total = tokens_in(progress["val"]) + tokens_in(progress["train"])
    if total > 0:
        print(f"going on after {total:,} tokens")
    first_file, first_row, stored = progress["position"]
    pieces = read_from(files, first_file, first_row)
    parallel = sum(size for _, size, *_ in files.rows) > LARGE
    batches = encode_all(batched(pieces), tokenizer, parallel)
    bar = tqdm(initial=total, desc="encoding", unit=" tokens", unit_scale=True)
    with bar, closing(batches):
        for items, encoded in batches:
            ids = np.concatenate(encoded)
            while stored < len(ids) and total < wanted:
                writer = writers["train" if writers["val"].done["shards"] else "val"]
                n = writer.fill(ids[stored:stored + wanted - total])
                stored += n  # of this batch
                total += n
                if writer.used == shard_tokens:
                    writer.write_shard()
                    position = position_at(stored, items, encoded)
                    save_progress(folder, settings, position, writers)
                    files.done_before(position[0])
            stored = 0
            file, _, share = items[-1]
            show_progress(bar, total, wanted, share)
            if total >= wanted:
                break
            # How many tokens are expected before the next file begins: will it be needed?
            expected = total / share * (file + 1) / len(files.names)
            if share * len(files.names) - file > 0.05 and expected < wanted:
                files.expect(file + 1)
    finish_files(folder, tokenizer, settings["source"], writers)


def position_at(stored, items, encoded):
    """[file, row, tokens of this row that are stored] after `stored` tokens of a batch."""
    for (file, row, _), ids in zip(items, encoded):
        if stored <= len(ids):
            return [file, row, stored]
        stored -= len(ids)


def read_from(files, file, row):
    """Yield ((file, row, share of all files read), text, True) of all texts from a row of a file
    on. Texts of blanks, and rows without one, are left out."""
    n_files = len(files.names)
    for i in range(file, n_files):
        path = files.get(i)
        for first, texts, share in tables.read_rows(path, "text", row if i == file else 0):
            for place, text in enumerate(texts):
                if text is not None and text.strip():
                    yield (i, first + place, (i + share) / n_files), text, True


def save_progress(folder, settings, position, writers):
    """Note that the shards written so far are whole."""
    for writer in writers.values():
        for shard in writer.done["shards"][-1:]:
            sync(folder / shard["file"])
    note_progress(folder, settings, position, {name: w.done for name, w in writers.items()})


def note_progress(folder, settings, position, done):
    write_json(folder / PROGRESS, {"settings": settings, "position": position, **done})


def show_progress(bar, total, wanted, share):
    """Tell the bar how far it is, and how many tokens there will be, as far as that is known."""
    bar.total = min(wanted, int(total / share))
    bar.update(total - bar.n)


def finish_files(folder, tokenizer, source, writers):
    """Write the last shard and meta.json. Of texts that do not fill the first shard a twentieth is
    for validation."""
    val = writers["val"]
    if not val.done["shards"]:
        tokens = val.buffer[:val.used]
        val.used = len(tokens) // 20
        writers["train"].store(tokens[val.used:])
    for writer in writers.values():
        writer.finish()
    write_meta(folder, tokenizer, writers["train"].done, val.done, source)


def copy_shards(folder, tokenizer, settings, files):
    """Take files of tokens as they are, whole ones until there are enough. Those with the word
    "val" in their name are for validation. Raises UserError if one cannot be read, holds other ids
    than GPT-2's, or a split has none."""
    names = files.names
    wanted = settings["max_tokens"] or sys.maxsize
    progress = begin_or_go_on(folder, settings)
    done = {split: progress[split] for split in ("val", "train")}
    repeated = [name for name, n in Counter(Path(name).name for name in names).items() if n > 1]
    if repeated:
        raise UserError(f"two files have the name {repeated[0]} — rename one of them")
    ready = [shard["file"] for split in done.values() for shard in split["shards"]]
    # Those for validation first, so that --max_tokens does not leave them out.
    order = sorted(range(len(names)), key=lambda i: not is_of_split(Path(names[i]), "val"))
    for name in names:  # before anything is copied
        if not is_of_split(Path(name), "train") and not is_of_split(Path(name), "val"):
            raise UserError(f"{name}: its name has neither the word \"train\" nor \"val\" — "
                            f"rename it")
    for i in tqdm(order, desc="copying", unit=" files"):
        target = folder / Path(names[i]).name
        enough = tokens_in(done["val"]) + tokens_in(done["train"]) >= wanted
        split = "val" if is_of_split(target, "val") else "train"
        if target.name in ready or enough and done[split]["shards"]:
            continue
        shard = open_shard(files.get(i))
        check_ids(shard, tokenizer.vocab_size)
        check_meaning(shard, tokenizer)
        files.take(i, target)
        record(done[split], open_shard(target), tokenizer)
        sync(target)
        note_progress(folder, settings, [0, 0, 0], done)  # the position is that of texts
    for split, found in done.items():
        if not found["shards"]:
            raise UserError(f"no file for {split} among {', '.join(names[:3])} … — their names "
                            f"need the word \"train\" or \"val\"")
        print_summary(split, found)
    write_meta(folder, tokenizer, done["train"], done["val"], settings["source"])


# -------------------------------------------------------------------------------------------------
# hellaswag, alpaca: questions for evaluate.py, and conversations for sft.py, one in a line.

def prepare_hellaswag(out, paths):
    """Write the validation questions of HellaSwag (Zellers et al. 2019, arXiv 1905.07830)."""
    with new_folder(out, partial(check_replaceable, name="hellaswag")) as folder:
        rows = rows_of(folder, paths, "Rowan/hellaswag", "validation")
        write_rows(folder / "hellaswag.jsonl", (question_of(row, place) for place, row in rows))


def question_of(row, place):
    """The fields of a question that evaluate.py reads. Raises UserError if one is missing."""
    texts = ("ctx", "ctx_a", "ctx_b", "activity_label")
    try:
        endings = row["endings"]
        label = int(str(row["label"]))  # a string in some releases; "" in the test split
        fits = (all(isinstance(row[name], str) for name in texts)
                and isinstance(endings, list)
                and all(isinstance(ending, str) and ending.strip() for ending in endings)
                and 0 <= label < len(endings)
                and len(endings) >= 2)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"{place}: not a question in HellaSwag's format with its answer — give the "
                        f"validation split")
    return {**{name: row[name] for name in texts}, "endings": endings, "label": label}


def prepare_alpaca(out, paths):
    """Write the instructions of alpaca-cleaned, or others in its form. Rows that cannot be trained
    on, without an answer for example, are left out and counted."""
    with new_folder(out, partial(check_replaceable, name="alpaca")) as folder:
        rows = rows_of(folder, paths, "yahma/alpaca-cleaned", "")
        write_rows(folder / "alpaca.jsonl", usable(rows))


def usable(rows):
    """Yield the fields that sft.py reads of each row that it can use; tell how many it cannot."""
    bad = []
    for place, row in rows:
        row = {name: row[name] for name in ("instruction", "input", "output", "messages", "split")
               if name in row}
        try:
            chat.messages_of(row)
            if not isinstance(row.get("split"), str | None):
                raise ValueError('"split" must be a string')
            yield row
        except ValueError as why:
            bad.append(f"{place}: {why}")
    if bad:
        print(f"{len(bad)} rows cannot be used and are left out; the first is {bad[0]}")


def rows_of(folder, paths, repo, word):
    """Yield (place, row as a dict) of all rows of local files, or of those files of a dataset on
    the hub whose name has the word, which are downloaded into the folder for now."""
    downloads = folder / "downloads"
    if paths:
        files = hub.LocalFiles(files_of_rows(paths, column=None))
    else:
        commit, listed = hub.list_files(repo)
        listed = [file for file in listed
                  if word in file.name and has_suffix(Path(file.name), tables.SUFFIXES)
                  and "infos" not in file.name]
        if not listed:
            raise UserError(f"{repo} has no such files any more — look at it on the hub, download "
                            f"its files, and give them with --from")
        files = hub.Downloads(repo, commit, listed, downloads)
    for i, name in enumerate(files.names):
        for first, rows, _ in tables.read_rows(files.get(i)):
            for place, row in enumerate(rows, first):
                yield f"{name}, row {place}", row
    delete(downloads)


def write_rows(file, rows):
    """Write rows as JSON lines, and a meta.json beside them. Raises UserError if there is none."""
    n = 0
    with open(file, "w", encoding="utf-8") as lines:
        for row in tqdm(rows, desc=f"writing {file.name}", unit=" rows"):
            lines.write(json.dumps(row) + "\n")
            n += 1
    if n == 0:
        raise UserError("no usable row in these files — give others with --from")
    write_json(file.with_name("meta.json"), {"source": {"name": file.stem}, "rows": n})
    print(f"{file.name}: {n:,} rows")


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

    text = commands.add_parser("text", help="your own files, or folders of them")
    text.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=", ".join(SUFFIXES))
    text.add_argument("--separator", type=valid_text,
                      help="what stands between the documents of one .txt or .md file")

    fineweb = commands.add_parser("fineweb-edu", help="a sample of FineWeb-Edu, from the hub")
    fineweb.add_argument("--sample", default="10BT", choices=("10BT", "100BT", "350BT"),
                         help="how many tokens, about: 10, 100 or 350 billion")
    fineweb.add_argument("--max_tokens", type=number(int, 20 * MIN_TOKENS, 2**40),
                         help="only the first so many; a shard is then a twentieth of them, at "
                              "most 100 million")
    fineweb.add_argument("--tokenized", action="store_true", help="10BT as tokens, 20 GB that "
                         "others have prepared")

    hellaswag = commands.add_parser("hellaswag", help="questions for evaluate.py, from the hub")
    alpaca = commands.add_parser("alpaca", help="conversations for sft.py, from the hub")

    display = commands.add_parser("show", help="the tokens of a text")
    display.add_argument("text", type=valid_text)

    for command in (fineweb, hellaswag, alpaca):
        kinds = tables.SUFFIXES if command is not fineweb else (*tables.SUFFIXES, *TOKEN_FILES)
        command.add_argument("--from", dest="paths", nargs="+", type=Path, metavar="PATH",
                             help=f"files on this disk instead, or folders of them: "
                                  f"{', '.join(kinds)}")
    for command in (pydocs, text, fineweb, hellaswag, alpaca):
        command.add_argument("--out", type=Path, help="folder to write; if not given, data/ and "
                             "the name of the source")
    vocab_size = number(int, 257, GPT2_VOCAB_SIZE)
    for command, default in ((pydocs, DEFAULT_VOCAB_SIZE), (text, DEFAULT_VOCAB_SIZE),
                             (fineweb, GPT2_VOCAB_SIZE), (display, GPT2_VOCAB_SIZE)):
        command.add_argument("--vocab_size", type=vocab_size, default=default,
                             help=f"257 to {GPT2_VOCAB_SIZE}")
    args = parser.parse_args(argv)
    if args.command == "fineweb-edu":
        check_fineweb(args)
    return args


def check_whole_vocabulary(vocab_size):
    if vocab_size != GPT2_VOCAB_SIZE:
        raise UserError("these are tokens of GPT-2's whole vocabulary — leave out --vocab_size")


def check_fineweb(args):
    """Raise UserError for flags that do not go together."""
    if args.tokenized and args.paths:
        raise UserError("--tokenized downloads — leave it out: files given with --from are known "
                        "by their suffix")
    if args.tokenized and args.sample != "10BT":
        raise UserError("--tokenized is there for --sample 10BT only")
    if args.tokenized:
        check_whole_vocabulary(args.vocab_size)


NEXT = {  # what to do with the result
    "hellaswag": "evaluate.py --benchmark {out}/hellaswag.jsonl",
    "alpaca": "sft.py --instructions {out}/alpaca.jsonl",
}


@script
def main(argv=None):
    args = parse(argv)
    if args.command == "show":
        show(args.text, args.vocab_size)
        return
    start = time.monotonic()
    name = args.command
    if name == "text":
        name = args.paths[0].resolve().name.split(".")[0]
    out = args.out or Path("data", name)
    if args.command == "pydocs":
        prepare_pydocs(out, args.vocab_size, args.quality, args.val_quality)
    elif args.command == "text":
        prepare_text(args.paths, out, args.vocab_size, args.separator)
    elif args.command == "fineweb-edu":
        prepare_fineweb(out, args.vocab_size, args.sample, args.max_tokens, args.paths,
                        args.tokenized)
    elif args.command == "hellaswag":
        prepare_hellaswag(out, args.paths)
    else:
        prepare_alpaca(out, args.paths)
    seconds = time.monotonic() - start
    following = NEXT.get(args.command, "train.py --data {out}").format(out=shlex.quote(str(out)))
    print(f"{out} is ready after {seconds:.0f} s. Next: python {following}")


if __name__ == "__main__":
    sys.exit(main())
