"""tables.py — files of rows, read in batches, from any row on: parquet, JSON lines, a JSON array.

Of a parquet file only the wanted columns are read, and little of it at a time: FineWeb-Edu's files
have 2 GB each. pyarrow is imported where it is used: without parquet it is not needed.
"""
from collections import Counter

from corpus.textfiles import find_files, has_suffix
from support.rows import fields_of, listed, read_json_rows
from support.runs import UserError, first_line_of

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json")
ROWS_AT_ONCE = 64  # 300 kB of FineWeb-Edu; but a text may have millions of characters


def find(paths, needed=None):
    """The files of rows among `paths` and in the folders among them. Raises UserError if there are
    none, or parquet files that are damaged or have no column `needed` with text."""
    files = find_files(paths, SUFFIXES)
    for file in files:
        if has_suffix(file, ".parquet"):
            open_parquet(file, needed)  # at once, not after hours
    return files


def rows_of(files, names):
    """Yield (place, row with those of the fields `names` that it has) of all rows of all files;
    prints which fields are not read."""
    unread = Counter()
    for i in range(len(files.names)):
        for _, rows, _ in read_rows(files.get(i), names, unread=unread):
            yield from rows
    if unread:
        print(f"fields that are not read: {listed(unread)}")


def read_rows(path, names, start=0, unread=None):
    """Yield (number of the first row, [(place, row)], share) in batches. A row is a dict with those
    of the fields `names` that it has; null is as if the field were absent. share: how much of the
    file has been read, from 0 to 1. unread: a Counter of other fields.

    Raises UserError, naming file and row, if the file is damaged."""
    unread = Counter() if unread is None else unread
    if has_suffix(path, ".parquet"):
        return read_parquet(path, names, start, unread)
    return read_json(path, names, start, unread)


def import_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("pyarrow is missing, which reads parquet files — run: pip install -r "
                        "requirements-extras.txt") from None
    return pyarrow


def open_parquet(path, needed=None):
    """The pyarrow ParquetFile. Raises UserError if it cannot be read, has two columns of one name,
    or has no column `needed` with text."""
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
    twice = [name for name, n in Counter(schema.names).items() if n > 1]
    if twice:
        raise UserError(f"{path}: two columns have the name \"{twice[0]}\" — rename or remove one")
    if needed is None:
        return file
    if needed not in schema.names:
        raise UserError(f"{path}: no column \"{needed}\", it has {', '.join(schema.names[:8])} — "
                        f"rename the one with the text")
    kind = schema.field(needed).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f"{path}: the column \"{needed}\" holds {kind}, not text — convert it")
    return file


def read_parquet(path, names, start, unread):
    pyarrow = import_parquet()
    file = open_parquet(path)
    total = file.metadata.num_rows
    group, row = group_of(file.metadata, start)
    groups = list(range(group, file.num_row_groups))
    columns = [name for name in file.schema_arrow.names if name in names]
    unread.update({name: total for name in file.schema_arrow.names if name not in names})
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, groups, columns, use_threads=False):
            rows = batch.to_pylist()
            skipped = min(len(rows), max(0, start - row))
            row += len(rows)
            if skipped < len(rows):
                first = row - len(rows) + skipped
                yield first, [(f"{path}, row {number}", fields_of(found, path, names, unread))
                              for number, found in enumerate(rows[skipped:], first)], row / total
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


def read_json(path, names, start, unread):
    rows = []
    for number, (place, row, share) in enumerate(read_json_rows(path)):
        if number >= start:
            rows.append((place, fields_of(row, place, names, unread)))
        if len(rows) == ROWS_AT_ONCE:
            yield number + 1 - len(rows), rows, share
            rows = []
    if rows:
        yield number + 1 - len(rows), rows, 1
