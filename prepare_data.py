"""prepare_data.py — turn text into shards of tokens that train.py reads.

    python prepare_data.py pydocs                # the manuals on this computer, to data/pydocs
    python prepare_data.py text book.txt notes/  # .txt, .md, .jsonl, .jsonl.gz, folders; data/book
    python prepare_data.py fineweb-edu --max_tokens 1000000000      # of its 10 billion tokens
    python prepare_data.py fineweb-edu --from *.parquet --out data/web     # files on this disk
    python prepare_data.py adopt SHARDS --out data/mine    # of nanoGPT, build-nanogpt or llm.c
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
import json
import os
import re
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from corpus import alpaca, fineweb, hellaswag, hub, pydocs, tables
from corpus.documents import Documents, PassageCounter
from corpus.encode import batched, encode_all
from corpus.foreign_shards import check_meaning, foreign_shards, open_foreign, split_of
from corpus.textfiles import SUFFIXES, find_files, has_suffix, read_all_pieces
from data import GPT2_VOCAB_SIZE, Tokenizer, check_range, open_shard
from support.files import OF_THE_SYSTEM, PROGRESS, delete, new_folder, sha256_of, sync, write_json
from support.flags import Parser, number
from support.flags import text as valid_text
from support.progress import tqdm
from support.runs import UserError, parse_json, quoted, script

# With 4,096 ids a tiny model spends its arithmetic on its layers, not on the output layer (see
# data.Tokenizer).
DEFAULT_VOCAB_SIZE = 4096
SHARD_TOKENS = 100_000_000
MIN_TOKENS = 64  # in each split; the loss on fewer tokens measures nothing
LARGE = 1 << 24  # characters or bytes; less is encoded before other processes have started


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
        record(self.done, open_shard(path, len(tokens)), self.tokenizer)
        self.used = 0

    def finish(self):
        """Write what is left and print a summary. Raises UserError if the split is too short."""
        if self.used > 0:
            self.write_shard()
        tokens = tokens_in(self.done)
        if tokens < MIN_TOKENS:
            raise UserError(f"too little text: {tokens} tokens for {self.split} — add text "
                            f"(validation is {pydocs.VAL_SHARE:.0%} of it and needs at least "
                            f"{MIN_TOKENS} tokens)")
        print_summary(self.split, self.done)


def nothing_done():
    """What is done of a split; "shards" are their rows in meta.json."""
    return {"shards": [], "bytes": 0, "documents": 0}


def record(done, shard, tokenizer, file=None, offset=None):
    """Add a shard to what is done of a split. file: what meta.json calls it, if not its name;
    offset: where its ids begin, if it is not a .npy. Raises UserError for an id outside the
    vocabulary."""
    row = {"file": file or shard.path.name, "tokens": len(shard.tokens),
           "sha256": sha256_of(shard.path)}
    if offset is not None:
        row["offset"] = offset
    done["shards"].append(row)
    for start in range(0, len(shard.tokens), 1 << 20):
        part = shard.tokens[start:start + (1 << 20)]
        check_range(shard, start, part, tokenizer.vocab_size)
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
    names = sorted(set(os.listdir(out)) - OF_THE_SYSTEM)
    present, _, listed = described(out)
    foreign = [name for name in names if not OURS.fullmatch(name) and name not in listed]
    if "meta.json" not in names:
        foreign = names  # shards of other projects can have the same names as ours
    if foreign:
        raise UserError(f"{out} holds {foreign[0]}, which prepare_data.py did not write — choose "
                        f"another --out")
    if names and present != name:
        raise UserError(f"{out} holds what was prepared from {present} — choose another --out, or "
                        f"delete it")


def default_out(name, paths):
    """data/NAME. Raises UserError if it was prepared from other paths, or took hours: it would be
    replaced."""
    out = Path("data", name)
    source, before, _ = described(out)
    if before is not None and (before != resolved(paths) or source == "fineweb-edu"):
        raise UserError(f"{out} holds what was prepared from {', '.join(before[:3]) or 'the hub'} "
                        f"— choose another folder with --out, or delete it")
    return out


def resolved(paths):
    """Whole paths, as meta.json tells them."""
    return sorted({str(path.resolve()) for path in paths or []})


def described(out):
    """What the meta.json in a folder tells: (the name of its source, the paths that were given or
    None, the names of its shards: those of --tokenized are not ours)."""
    try:
        meta = parse_json((out / "meta.json").read_bytes())
        splits = meta.get("splits", {})
        shards = [str(shard["file"]) for split in splits for shard in splits[split]]
        paths = meta["source"].get("paths")
        return str(meta["source"]["name"]), paths and list(map(str, paths)), shards
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "an unknown source", None, []


# -------------------------------------------------------------------------------------------------
# The sources that are encoded at once

def prepare_pydocs(out, vocab_size=DEFAULT_VOCAB_SIZE, quality="prose", val_quality="prose"):
    """Write the manuals on this computer into the folder `out`: the training shard in one quality
    of `pydocs.pieces_of`, the validation shard in another; questions and instructions are prose."""
    tokenizer = Tokenizer(vocab_size)  # first, so that an error comes before the work
    with new_folder(Path(out), partial(check_replaceable, name="pydocs")) as folder:
        absent = [package for package, version in pydocs.dependencies().items() if version is None]
        if absent:
            print(f"not installed, so not in the training text: {', '.join(absent)}")
        documents = pydocs.build_corpus()
        pieces = pydocs.pieces_of(documents, quality, val_quality)
        source = {"name": "pydocs", "quality": quality, "val_quality": val_quality,
                  **pydocs.source_of(pieces)}
        total = sum(len(text) for _, text, _ in pieces)
        write_shards(folder, pieces, tokenizer, source, total)
        pydocs.write_questions(folder, documents)


def prepare_text(paths, out, vocab_size=DEFAULT_VOCAB_SIZE, separator=None):
    """Write the user's own text into the folder `out`.

    The text is read twice: first to check and count it, then to encode it."""
    if separator and "\n" in separator:
        raise UserError("a separator must be within one line — choose another --separator")
    tokenizer = Tokenizer(vocab_size)
    paths = [Path(path) for path in paths]
    files = find_files(paths, SUFFIXES)
    documents = Documents(files, separator)
    pieces = documents.split(read_all_pieces(files, separator))
    passages = PassageCounter(documents.total)
    names = [file.name for file in files]
    source = {"name": "text", "files": names, "paths": resolved(paths), "separator": separator}
    with new_folder(Path(out), partial(check_replaceable, name="text")) as folder:
        write_shards(folder, passages.watch(pieces), tokenizer, source, documents.total)
    passages.report()


# -------------------------------------------------------------------------------------------------
# fineweb-edu, which takes hours: what is done stays if it is stopped, and the same command goes on.

def prepare_fineweb(out, vocab_size, sample, max_tokens, paths, tokenized):
    """Write the shards of a sample of FineWeb-Edu, or of the files in `paths`, into `out`: the
    first is for validation, as in the paper."""
    tokenizer = Tokenizer(vocab_size)
    with new_folder(Path(out), partial(check_replaceable, name="fineweb-edu"), keep=True) as folder:
        downloads = folder / "downloads"
        if paths:
            source, files = fineweb.from_disk(paths)
        else:
            saved = read_progress(folder)
            source, files = fineweb.from_hub(sample, tokenized, downloads,
                                             saved and saved["settings"])
        source["paths"] = resolved(paths)
        settings = {"source": source, "files": files.rows, "vocab_size": vocab_size,
                    "max_tokens": max_tokens}
        progress = begin_or_go_on(folder, settings)
        if tokenized:
            take_shards(folder, tokenizer, settings, progress, files)
        else:
            encode_files(folder, tokenizer, settings, progress, files)
        delete(downloads)


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
                and isinstance(saved["settings"]["source"], dict)
                and all(isinstance(row[0], str) for row in saved["settings"]["files"]))
        for split in ("train", "val"):
            for shard in saved[split]["shards"]:
                open_shard(folder / shard["file"], shard["tokens"], shard.get("offset"))
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


def encode_files(folder, tokenizer, settings, progress, files):
    """Encode the column "text" of the files into shards.

    Everything is read in one order, and cut where a shard is full, so a position in the texts is
    all that a later process needs to go on: [file, row, tokens of this row that are stored]."""
    wanted = settings["max_tokens"] or sys.maxsize
    shard_tokens = min(SHARD_TOKENS, max(MIN_TOKENS, wanted // 20))
    writers = {}
    for split in ("val", "train"):
        writers[split] = ShardWriter(folder, split, tokenizer, shard_tokens)
        writers[split].done = progress[split]
    total = tokens_in(progress["val"]) + tokens_in(progress["train"])
    if total > 0:
        print(f"going on after {total:,} tokens")
    first_file, first_row, stored = progress["position"]
    pieces = fineweb.read_from(files, first_file, first_row)
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
            _, _, share = items[-1]
            show_progress(bar, total, wanted, share)
            if total >= wanted:
                break
    finish_files(folder, tokenizer, settings["source"], writers)


def position_at(stored, items, encoded):
    """[file, row, tokens of this row that are stored] after `stored` tokens of a batch."""
    for (file, row, _), ids in zip(items, encoded):
        if stored <= len(ids):
            return [file, row, stored]
        stored -= len(ids)


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


def take_shards(folder, tokenizer, settings, progress, files):
    """Download files of tokens and keep them as they are: whole ones until there are enough. Those
    with the word "val" in their name are for validation."""
    wanted = settings["max_tokens"] or sys.maxsize
    done = {split: progress[split] for split in ("val", "train")}
    ready = [shard["file"] for split in done.values() for shard in split["shards"]]
    # Those for validation first, so that --max_tokens does not leave them out.
    order = sorted(range(len(files.names)), key=lambda i: split_of(Path(files.names[i])) != "val")
    for i in tqdm(order, desc="downloading", unit=" files"):
        target = folder / Path(files.names[i]).name
        split = split_of(target)
        enough = tokens_in(done["val"]) + tokens_in(done["train"]) >= wanted
        if target.name in ready or split is None or enough and done[split]["shards"]:
            continue
        shard = open_foreign(files.get(i))
        check_meaning(shard, tokenizer)
        os.replace(shard.path, target)
        record(done[split], open_shard(target, len(shard.tokens), shard.offset), tokenizer,
               offset=shard.offset)
        sync(target)
        note_progress(folder, settings, [0, 0, 0], done)  # the position is that of texts
    for split, found in done.items():
        if not found["shards"]:
            raise UserError(f"no file for {split} among {', '.join(files.names[:3])} … — look at "
                            f"{settings['source']['repo']} on the hub")
        print_summary(split, found)
    write_meta(folder, tokenizer, done["train"], done["val"], settings["source"])


# -------------------------------------------------------------------------------------------------
# adopt: shards that other projects have made

def prepare_adopted(out, shards_of, trust=False):
    """Let meta.json in the folder `out` point to the shards of another project in the folder
    `shards_of`: nothing is copied. trust: do not ask what their ids stand for. Raises UserError if
    they cannot be used."""
    if not shards_of.is_dir():
        raise UserError(f"{shards_of}: not a folder — give the one with the shards")
    if (shards_of / "meta.json").exists():
        raise UserError(f"{shards_of} has a meta.json, so it is a data folder already — give it to "
                        f"train.py --data")
    tokenizer = Tokenizer()
    with new_folder(Path(out), partial(check_replaceable, name="adopt")) as folder:
        done = {}
        digests = {}
        for split, shards in foreign_shards(shards_of.resolve(), tokenizer, trust).items():
            done[split] = nothing_done()
            for found in tqdm(shards, desc=f"reading {split}", unit=" files"):
                shard = open_shard(found.path, len(found.tokens), found.offset)
                record(done[split], shard, tokenizer, file=str(found.path), offset=found.offset)
                same = digests.setdefault(done[split]["shards"][-1]["sha256"], found.path)
                if same != found.path:
                    raise UserError(f"{same} and {found.path} have the same content — remove one "
                                    f"of them")
        for split, found in done.items():
            print_summary(split, found)
        source = {"name": "adopt", "paths": resolved([shards_of]), "trusted": trust}
        write_meta(folder, tokenizer, done["train"], done["val"], source)


# -------------------------------------------------------------------------------------------------
# hellaswag, alpaca: questions for evaluate.py, and conversations for sft.py, one in a line

def prepare_hellaswag(out, paths):
    """Write the validation questions of HellaSwag."""
    with new_folder(out, partial(check_replaceable, name="hellaswag")) as folder:
        rows = rows_from(folder, paths, hellaswag.REPO, hellaswag.SPLIT, hellaswag.FIELDS)
        questions = (hellaswag.question_of(row, place) for place, row in rows)
        write_rows(folder / "hellaswag.jsonl", questions, paths)


def prepare_alpaca(out, paths):
    """Write the instructions of alpaca-cleaned, or others in its form."""
    with new_folder(out, partial(check_replaceable, name="alpaca")) as folder:
        rows = rows_from(folder, paths, alpaca.REPO, "", alpaca.FIELDS)
        write_rows(folder / "alpaca.jsonl", alpaca.usable(rows), paths)


def rows_from(folder, paths, repo, word, names):
    """Yield (place, row with the fields `names`) of all rows of local files, or of those files of a
    dataset on the hub whose name has the word, which are downloaded into the folder for now."""
    downloads = folder / "downloads"
    if paths:
        files = hub.LocalFiles(tables.find(paths))
    else:
        commit, listed = hub.list_files(repo)
        listed = [[name, size] for name, size in listed
                  if word in name and has_suffix(Path(name), tables.SUFFIXES)
                  and "infos" not in name]
        if not listed:
            raise UserError(f"{repo} has no such files any more — look at it on the hub, download "
                            f"its files, and give them with --from")
        files = hub.Downloads(repo, commit, listed, downloads)
    yield from tables.rows_of(files, names)
    delete(downloads)


def write_rows(file, rows, paths):
    """Write rows as JSON lines, and a meta.json beside them. Raises UserError if there is none."""
    n = 0
    with open(file, "w", encoding="utf-8") as lines:
        for row in tqdm(rows, desc=f"writing {file.name}", unit=" rows"):
            # str: a field that nobody reads may be a date, which JSON does not have.
            lines.write(json.dumps(row, default=str) + "\n")
            n += 1
    if n == 0:
        raise UserError("no usable row in these files — give others with --from")
    source = {"name": file.stem, "paths": resolved(paths)}
    write_json(file.with_name("meta.json"), {"source": source, "rows": n})
    print(f"{file.name}: {n:,} rows")


# -------------------------------------------------------------------------------------------------
# The command line

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


COMMANDS = {
    "pydocs": "the manuals of Python and the required packages",
    "text": "your own files, or folders of them",
    "fineweb-edu": "a sample of FineWeb-Edu, from the hub",
    "adopt": "shards of GPT-2's tokens that nanoGPT, build-nanogpt or llm.c have made",
    "hellaswag": "questions for evaluate.py, from the hub",
    "alpaca": "conversations for sft.py, from the hub",
    "show": "the tokens of a text",
}


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(dest="command", required=True,
                                    metavar=f"{{{','.join(COMMANDS)}}}")
    add = {name: parsers.add_parser(name, help=text, description=text).add_argument
           for name, text in COMMANDS.items()}

    qualities = ("prose", "raw", "shuffled")
    add["pydocs"]("--quality", default="prose", choices=qualities, help="of the training shard")
    add["pydocs"]("--val_quality", default="prose", choices=qualities,
                  help="of the validation shard")

    add["text"]("paths", nargs="+", type=Path, metavar="PATH", help=", ".join(SUFFIXES))
    add["text"]("--separator", type=valid_text,
                help="what stands between the documents of one .txt or .md file")

    add["fineweb-edu"]("--sample", default="10BT", choices=("10BT", "100BT", "350BT"),
                       help="how many tokens, about: 10, 100 or 350 billion")
    add["fineweb-edu"]("--max_tokens", type=number(int, 20 * MIN_TOKENS, 2**40),
                       help="only the first so many; a shard is then a twentieth of them, at most "
                            "100 million")
    add["fineweb-edu"]("--tokenized", action="store_true",
                       help="10BT as tokens, 20 GB that others have prepared")

    add["adopt"]("folder", type=Path, metavar="FOLDER", help="the one with the shards")
    add["adopt"]("--trust", action="store_true", help="do not decode and encode ids again to see "
                 "whether they are GPT-2's")

    add["show"]("text", type=valid_text)

    for name in ("fineweb-edu", "hellaswag", "alpaca"):
        add[name]("--from", dest="paths", nargs="+", action="extend", type=Path, metavar="PATH",
                  help="files on this disk instead, or folders of them: "
                  f"{', '.join(tables.SUFFIXES)}")
    for name in ("pydocs", "text", "fineweb-edu", "adopt", "hellaswag", "alpaca"):
        add[name]("--out", type=Path, help="folder to write; if not given, data/ and the name of "
                  "the source")
    for name, default in (("pydocs", DEFAULT_VOCAB_SIZE), ("text", DEFAULT_VOCAB_SIZE),
                          ("fineweb-edu", GPT2_VOCAB_SIZE), ("show", GPT2_VOCAB_SIZE)):
        add[name]("--vocab_size", type=number(int, 257, GPT2_VOCAB_SIZE), default=default,
                  help=f"257 to {GPT2_VOCAB_SIZE}")
    args = parser.parse_args(argv)
    if args.command == "fineweb-edu" and args.tokenized:
        check_tokenized(args)
    return args


def check_tokenized(args):
    """Raise UserError for flags that do not go together with --tokenized."""
    if args.paths:
        raise UserError("--tokenized downloads — give files on this disk to: python "
                        "prepare_data.py adopt FOLDER")
    if args.sample != "10BT":
        raise UserError("--tokenized is there for --sample 10BT only")
    if args.vocab_size != GPT2_VOCAB_SIZE:
        raise UserError("these are tokens of GPT-2's whole vocabulary — leave out --vocab_size")


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
    if name == "text":  # .notes.txt → notes
        name = args.paths[0].resolve().name.lstrip(".").split(".")[0] or "text"
    if name == "adopt":
        name = args.folder.resolve().name
    paths = [args.folder] if args.command == "adopt" else getattr(args, "paths", None)
    out = args.out or default_out(name, paths)
    if args.command == "pydocs":
        prepare_pydocs(out, args.vocab_size, args.quality, args.val_quality)
    elif args.command == "text":
        prepare_text(args.paths, out, args.vocab_size, args.separator)
    elif args.command == "fineweb-edu":
        prepare_fineweb(out, args.vocab_size, args.sample, args.max_tokens, args.paths,
                        args.tokenized)
    elif args.command == "adopt":
        prepare_adopted(out, args.folder, args.trust)
    elif args.command == "hellaswag":
        prepare_hellaswag(out, args.paths)
    else:
        prepare_alpaca(out, args.paths)
    seconds = time.monotonic() - start
    following = NEXT.get(args.command, "train.py --data {out}").format(out=quoted(out))
    print(f"{out} is ready after {seconds:.0f} s. Next: python {following}")


if __name__ == "__main__":
    sys.exit(main())
