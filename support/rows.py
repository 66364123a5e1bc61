"""rows.py — the lines of a text file and the rows of a JSON file, whichever program wrote it: plain
or gzipped, with a byte-order mark or without, JSON lines or one array."""
import gzip
import json
import zlib
from pathlib import Path

from support.runs import UserError, parse_json

GZIP = b"\x1f\x8b"  # how such a file begins, whatever its name
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_bytes(path):
    """Yield (line number, line as bytes). Raises UserError for a damaged gzip file."""
    number = 0
    with open(path, "rb") as file:  # once: it may be a pipe
        begin = file.peek(4)
        if begin.startswith(b"PAR1"):
            raise UserError(f"{path}: a parquet file, not text — give it to prepare_data.py --from")
        lines = gzip.GzipFile(fileobj=file) if begin.startswith(GZIP) else file
        try:
            for number, line in enumerate(lines, 1):
                yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}, after line {number}: damaged gzip file ({error}) — download "
                            f"or copy it again") from None


def read_lines(path):
    """Yield (line number, line) of a UTF-8 file; Windows line ends become \\n. Raises UserError."""
    for number, line in read_bytes(path):
        try:
            yield number, line.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}) — convert the "
                            f"file, e.g. with iconv") from None


def read_json_rows(path):
    """Yield (place, row, share) for each row of a file of JSON lines or of one array. place:
    "FILE, line 7" or "FILE, row 6" of an array, from 0. share: how much has been read, 0 to 1.

    The row of a line that is not valid JSON is the ValueError that tells why. Raises UserError if
    the file is an array and not valid JSON: then no row can be read."""
    size = max(1, Path(path).stat().st_size)
    lines = read_bytes(path)
    read = 0  # bytes; of a gzipped file more than it has
    is_first = True
    for number, line in lines:
        read += len(line)
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith(b"["):
            content = line + b"".join(rest for _, rest in lines)
            yield from read_array(path, content, number)
            return
        try:
            row = parse(line, number)
        except ValueError as why:
            hint = ": a file is one array, or has one object in each line" if is_first else ""
            row = ValueError(f"{why}{hint}")
        is_first = False
        yield f"{path}, line {number}", row, min(1, read / size)


def read_array(path, content, first_line):
    try:
        rows = parse(content, first_line)
    except ValueError as why:
        raise UserError(f"{path}: {why} — fix it: the file is one JSON array, of which no row can "
                        f"be read") from None
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row, (number + 1) / len(rows)


def parse(content, first_line):
    """The value of JSON text, which begins at `first_line` of its file. Raises ValueError, in a few
    words."""
    try:
        return parse_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = first_line + content[:error.start].count(b"\n")
        raise ValueError(f"not valid UTF-8 (line {line})") from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        where = f"line {line} column {error.colno}"
        raise ValueError(f"not valid JSON ({error.msg}: {where})") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None


def fields_of(row, place, names, unread):
    """Those of the fields `names` that a row has, in this order; null is as if one were absent. The
    Counter `unread` counts the others. Raises UserError naming the place if the row is not a JSON
    object."""
    if isinstance(row, ValueError):
        raise UserError(f"{place}: {row} — fix or remove it")
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object — fix or remove it")
    present = {name: value for name, value in row.items() if value is not None}
    unread.update(name for name in present if name not in names)
    return {name: present[name] for name in names if name in present}


def text_of(row, place, name):
    """The text in a field, None without one. Raises UserError naming the place for another value,
    or for half a surrogate pair: JSON can write it, UTF-8 cannot."""
    text = row.get(name)
    try:
        if not isinstance(text, str | None):
            raise ValueError
        (text or "").encode()
    except ValueError:
        raise UserError(f"{place}: expected a string \"{name}\" — fix or remove it") from None
    return text


def listed(unread):
    """The counted fields as text."""
    return ", ".join(f"{name} ({n:,} rows)" for name, n in unread.most_common(8))
