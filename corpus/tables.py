"""tables.py — files of rows, read in batches, from any row on: parquet, JSON lines, a JSON array.

Of a parquet file only the wanted column is read, and little of it at a time: FineWeb-Edu's files
have 2 GB each. pyarrow is imported where it is used: without parquet it is not needed.
"""
from corpus.textfiles import find_files, has_suffix, read_lines
from support.runs import UserError, first_line_of, parse_json

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json")
ROWS_AT_ONCE = 64  # 300 kB of FineWeb-Edu; but a text may have millions of characters


def find(paths, column=None):
    """The files of rows among `paths` and in the folders among them. Raises UserError if there are
    none, or parquet files that are damaged or have no such column of text."""
    # A .json in a folder tells about the other files, rather than being one.
    in_folders = tuple(suffix for suffix in SUFFIXES if suffix != ".json")
    files = find_files(paths, SUFFIXES, in_folders)
    for file in files:
        if has_suffix(file, ".parquet"):
            open_parquet(file, column)  # at once, not after hours
    return files


def rows_of(files):
    """Yield (place, row as a dict) of all rows of all files."""
    for i, name in enumerate(files.names):
        for first, rows, _ in read_rows(files.get(i)):
            for place, row in enumerate(rows, first):
                yield f"{name}, row {place}", row


def read_rows(path, column=None, start=0):
    """Yield (number of the first row, values, share) in batches. The values are those of `column`,
    or without one the whole rows as dicts; None where the file has null. share: how much of the
    file has been read, from 0 to 1.

    Raises UserError, naming file and row, if the file is damaged or has no such column."""
    if has_suffix(path, ".parquet"):
        return read_parquet(path, column, start)
    if has_suffix(path, ".json"):
        return read_json_array(path, column, start)
    return read_json_rows(path, column, start)


def import_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("pyarrow is missing, which reads parquet files — run: pip install -r "
                        "requirements-extras.txt") from None
    return pyarrow


def open_parquet(path, column):
    """The pyarrow ParquetFile. Raises UserError if it cannot be read, or has no such column of
    text."""
    pyarrow = import_parquet()
    try:
        # Without pre_buffer, and with a buffer, a row group is read page by page.
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        schema = file.schema_arrow
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file ({first_line_of(error)}) — download or "
                        f"copy it again") from None
    if column is None:
        return file
    if column not in schema.names:
        raise UserError(f"{path}: no column \"{column}\", it has {', '.join(schema.names[:8])} — "
                        f"rename the one with the text")
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f"{path}: the column \"{column}\" holds {kind}, not text — convert it")
    return file


def read_parquet(path, column, start):
    pyarrow = import_parquet()
    file = open_parquet(path, column)
    total = file.metadata.num_rows
    group, row = group_of(file.metadata, start)
    groups = list(range(group, file.num_row_groups))
    columns = None if column is None else [column]
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, groups, columns, use_threads=False):
            values = batch.to_pylist() if column is None else batch.column(0).to_pylist()
            skipped = min(len(values), max(0, start - row))
            row += len(values)
            if skipped < len(values):
                yield row - len(values) + skipped, values[skipped:], row / total
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}, after row {row}: damaged parquet file ({first_line_of(error)}) — "
                        f"download or copy it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}, after row {row}: text that is not UTF-8 — fix or remove this "
                        f"row") from None


def group_of(metadata, start):
    """(the row group with row `start`, its first row)."""
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if start < first + rows:
            return group, first
        first += rows
    return metadata.num_row_groups, first


def read_json_rows(path, column, start):
    size = max(1, path.stat().st_size)
    read = 0  # characters; of a gzipped file more than it has bytes
    values = []
    row = 0
    for line_number, line in read_lines(path):
        read += len(line)
        if not line.strip():
            continue
        if row >= start:
            values.append(parse_row(line, f"{path}, line {line_number}", column))
        row += 1
        if len(values) == ROWS_AT_ONCE:
            yield row - len(values), values, min(1, read / size)
            values = []
    if values:
        yield row - len(values), values, 1


def parse_row(line, place, column):
    """The row in a JSON line, or its value under `column`. Raises UserError naming the place."""
    try:
        row = parse_json(line)
    except ValueError as why:
        raise UserError(f"{place}: not valid JSON ({why}) — fix or remove this line") from None
    return value_of(row, place, column)


def read_json_array(path, column, start):
    try:
        rows = parse_json(path.read_text(encoding="utf-8-sig"))
        if not isinstance(rows, list):
            raise ValueError("not an array")
    except ValueError as why:
        raise UserError(f"{path}: not a JSON array ({first_line_of(why)}) — fix it, or, if it is "
                        f"JSON lines, rename it to .jsonl") from None
    for first in range(start, len(rows), ROWS_AT_ONCE):
        part = rows[first:first + ROWS_AT_ONCE]
        values = [value_of(row, f"{path}, row {first + i}", column) for i, row in enumerate(part)]
        yield first, values, (first + len(part)) / len(rows)


def value_of(row, place, column):
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object — fix or remove it")
    if column is None:
        return row
    value = row.get(column)
    try:
        if not isinstance(value, str | None) or column not in row:
            raise ValueError
        (value or "").encode()  # fails for half a surrogate pair
    except ValueError:
        raise UserError(f"{place}: expected a string \"{column}\" — fix or remove it") from None
    return value
