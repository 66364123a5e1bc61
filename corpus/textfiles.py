"""textfiles.py — files of plain text and JSON lines, read in pieces of documents.

A piece is (text, starts): a document, or a part of a long one, so that any file fits in memory.
`starts` is True if a document begins with this piece.
"""
import gzip
import zlib
from collections import Counter

from support.runs import UserError, parse_json

PIECE_SIZE = 1 << 20  # characters, about
JSON_LINES = (".jsonl", ".jsonl.gz")
SUFFIXES = (".txt", ".md", *JSON_LINES)


def has_suffix(path, suffixes):
    return path.name.lower().endswith(suffixes)


def find_files(paths, suffixes, in_folders=None):
    """The files among `paths`, and those in the folders among them, each of them once. in_folders:
    the suffixes that count there, if not all. Raises UserError if a path gives none."""
    found = {}  # real path → path, because two paths can lead to one file
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder — check the path")
        wanted = suffixes
        files = [path]
        if path.is_dir():
            wanted = in_folders or suffixes
            files = files_in(path, wanted)
        if not files or not has_suffix(files[0], wanted):
            raise UserError(f"{path}: expected {', '.join(wanted)}, or a folder of these — "
                            f"convert it to one of them")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def files_in(folder, suffixes):
    """The files with one of these suffixes in a folder and the folders in it; prints what else is
    there and is not read.

    Hidden ones are left out: editors and notebooks keep older versions in them. The files are
    sorted, because a file system lists them in any order."""
    files = []
    unread = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        if path.is_file() and has_suffix(path, suffixes) and not is_hidden(path, folder):
            files.append(path)
        else:
            unread.append(path)
    report_unread(folder, unread, f"only {', '.join(suffixes)} are")
    return files


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
