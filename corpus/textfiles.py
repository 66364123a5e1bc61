"""textfiles.py — files of plain text and JSON lines, read in pieces of documents.

A piece is (text, starts): a document, or a part of a long one, so that any file fits in memory.
`starts` is True if a document begins with this piece.
"""
import os
from collections import Counter
from pathlib import Path

from support.files import OF_THE_SYSTEM
from support.rows import fields_of, read_json_rows, read_lines, text_of
from support.runs import UserError, warn

PIECE_SIZE = 1 << 20  # characters, about
JSON = (".jsonl", ".jsonl.gz", ".json")
SUFFIXES = (".txt", ".md", *JSON)


def has_suffix(path, suffixes):
    return path.name.lower().endswith(suffixes)


def find_files(paths, suffixes):
    """The files among `paths`, and those in the folders among them, each of them once and in an
    order that does not depend on that of `paths`. Raises UserError if a path gives none."""
    found = {}  # real path → path, because two paths can lead to one file
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder — check the path")
        files = [path]
        if path.is_dir():
            files = files_in(path, suffixes)
        if not files or not has_suffix(files[0], suffixes):
            raise UserError(f"{path}: expected {', '.join(suffixes)}, or a folder of these — "
                            f"convert it to one of them")
        for file in files:
            found.setdefault(file.resolve(), file)
    return [found[real] for real in sorted(found)]


def files_in(folder, suffixes):
    """The files with one of these suffixes in a folder and the folders in it; prints what else is
    there and is not read. A .json beside others tells about them, rather than being one.

    Hidden ones are left out: editors and notebooks keep older versions in them. The files are
    sorted, because a file system lists them in any order."""
    every = []
    for inner, _, names in os.walk(folder, onerror=raise_it):
        every += [Path(inner, name) for name in names if name not in OF_THE_SYSTEM]
    every.sort()
    files = [path for path in every if path.is_file() and has_suffix(path, suffixes)
             and not is_hidden(path, folder)]
    others = [path for path in files if not has_suffix(path, (".json",))]
    read = others or files
    named = ", ".join(suffix for suffix in suffixes if suffix != ".json")
    report_unread(folder, sorted(set(every) - set(read)),
                  f"only {named} are, and .json if there is nothing else; no hidden ones")
    return read


def raise_it(error):
    """For os.walk, which leaves out what it cannot open."""
    raise error


def is_hidden(path, folder):
    """Whether a file, or a folder between it and `folder`, has a name that begins with a dot."""
    return any(name.startswith(".") for name in path.relative_to(folder).parts)


def report_unread(folder, unread, why):
    """Print how many files in a folder are not read, of which kinds, and why."""
    kinds = Counter()
    for path in unread:
        kinds["hidden" if is_hidden(path, folder) else path.suffix or path.name] += 1
    if unread:
        listed = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(8))
        print(f"{folder}: {len(unread)} files are not read ({listed}): {why}")


def read_pieces(path, separator):
    """Yield the pieces (text, starts) of one file."""
    if has_suffix(path, JSON):
        return read_json_texts(path)
    return read_plain_text(path, separator)


def read_json_texts(path):
    """Each row is a document: a JSON object with the key "text". Rows without text are passed over
    and counted. Raises UserError if no row has any."""
    without = 0
    n = 0
    for place, row, _ in read_json_rows(path):
        n += 1
        text = text_of(fields_of(row, place, ("text",), Counter()), place, "text")
        if text is not None and text.strip():
            yield text, True
        else:
            without += 1
    report_empty(path, without, n)


def report_empty(path, without, n):
    """Print, once, how many of n rows have no text. Raises UserError if none has."""
    if 0 < n == without:
        raise UserError(f"{path}: no row has a string \"text\" — rename the field with the text")
    if without > 0:
        warn(f"{path}: {without:,} of {n:,} rows have no text and are passed over")


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
