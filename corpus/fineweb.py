"""fineweb.py — FineWeb-Edu: web pages chosen for what they teach (Penedo et al. 2024, arXiv
2406.17557), from the hub or from files on this disk."""
from corpus import hub, tables
from corpus.textfiles import report_empty
from support.rows import text_of
from support.runs import UserError

REPO = "HuggingFaceFW/fineweb-edu"
TOKENIZED = "kjj0/finewebedu10B-gpt2"  # the same as tokens, in llm.c's format


def from_disk(paths):
    """(where the text is from, files) of files and folders on this disk."""
    files = hub.LocalFiles(tables.find(paths, needed="text"))
    return {"name": "fineweb-edu", "files": [path.name for path in files.paths]}, files


def from_hub(sample, tokenized, downloads, saved):
    """(where the text is from, files) of a sample; they are fetched into the folder `downloads`.

    saved: {"source", "files"} of a preparation that goes on: it stays with its commit."""
    repo = TOKENIZED if tokenized else REPO
    source = {} if saved is None else saved["source"]
    if source.get("repo") == repo and source.get("sample") == sample:
        listed = saved["files"]
    else:
        commit, listed = hub.list_files(repo, None if tokenized else f"sample/{sample}")
        suffix = ".bin" if tokenized else ".parquet"
        listed = [[name, size] for name, size in listed if name.endswith(suffix)]
        if not listed:
            raise UserError(f"{repo} has no {suffix} files of this sample any more — look at it on "
                            f"the hub, download its files, and give them with --from")
        source = {"name": "fineweb-edu", "repo": repo, "sample": sample, "commit": commit}
    return source, hub.Downloads(repo, source["commit"], listed, downloads)


def read_from(files, file, row):
    """Yield ((file, row, share of all files read), text, True) of all texts from a row of a file
    on. Rows without text are passed over, and counted; a file of such rows is a UserError."""
    n_files = len(files.names)
    for i in range(file, n_files):
        path = files.get(i)
        begin = row if i == file else 0
        without = 0
        number = begin - 1
        for first, rows, share in tables.read_rows(path, ("text",), begin):
            for number, (place, found) in enumerate(rows, first):
                text = text_of(found, place, "text")
                if text is not None and text.strip():
                    yield (i, number, (i + share) / n_files), text, True
                else:
                    without += 1
        report_empty(files.names[i], without, number + 1 - begin)
