"""files.py — files and folders that are written as a whole or not at all.

They are written under a temporary name beside the final one, forced to the disk, and renamed.
"""
import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from support.runs import UserError, lock, warn

# What operating systems leave in folders that somebody has looked at.
OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}

# In a temporary folder with a file of this name something was begun that can be gone on with.
PROGRESS = "progress.json"


@contextlib.contextmanager
def new_folder(out, check=None, keep=False):
    """A temporary folder beside `out`, which becomes `out` when the block succeeds.

    If the block fails, `out` stays as it was. After a kill `out` is the old folder, the new one, or
    absent, but never incomplete. `check(out)` raises UserError if `out` must not be replaced;
    without it nothing is replaced. keep: what a failed block has written stays in the temporary
    folder, for the next one to go on with. Raises UserError if another process is writing it, or if
    something unfinished would be lost."""
    try:
        out = out.resolve()
    except RuntimeError:
        raise UserError(f"{out}: links that lead in a circle — choose another folder") from None
    if check is not None:
        check(out)
    elif out.exists() and not (out.is_dir() and set(os.listdir(out)) <= OF_THE_SYSTEM):
        raise UserError(f"{out} exists — choose another folder")
    folder = out.with_name(f".{out.name}.preparing")
    older = out.with_name(f".{out.name}.replaced")
    in_use = f"{out} is being prepared by another process — wait for it, or choose another folder"
    folder.mkdir(parents=True, exist_ok=True)
    locked = lock(folder, in_use)
    # The process that held the lock before may have renamed or deleted this folder by now.
    if not folder.exists() or not os.path.samestat(os.fstat(locked), folder.stat()):
        os.close(locked)
        raise UserError(in_use)
    try:
        if not keep:
            if (folder / PROGRESS).exists():
                keep = True
                raise UserError(f"{folder} holds a preparation that was stopped — finish it with "
                                f"its own command, or delete this folder")
            for leftover in folder.iterdir():  # of a killed process
                delete(leftover)
        if older.exists() and not out.exists():  # killed between the two renames
            older.rename(out)
        delete(older)
        yield folder
        for file in folder.iterdir():
            sync(file)
        sync(folder)
        replace(out, folder, older)
        delete(out / PROGRESS)  # not before: a kill in between would begin again
        sync(out.parent)
        delete(older)
    except BaseException:
        if not keep or not any(folder.glob("*")):  # nothing to go on with
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


def delete(path):
    """Delete a folder with all that is in it, or a file, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path):
    """Ask the operating system to put a file or a folder on the disk now. Network drives may refuse
    this for a folder, and Windows cannot open one."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not Path(path).is_dir():
            raise OSError(error.errno, error.strerror, str(path)) from None  # fsync tells no path
        warn(f"folders cannot be forced to the disk here ({error.strerror}): a power cut may lose "
             f"what was written last")


# -------------------------------------------------------------------------------------------------
# Files

BLOCKS = 64     # that `blocks_sha256` reads
BLOCK = 65_536  # bytes of each


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blocks_sha256(path):
    """The SHA-256 of 64 evenly spaced blocks of 64 KiB, so that even a terabyte is recognized in
    seconds. A file below 4 MiB is hashed whole."""
    size = path.stat().st_size
    if size < BLOCKS * BLOCK:
        return sha256_of(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in range(BLOCKS):
            file.seek((size - BLOCK) * block // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def link_or_copy(source, target):
    """A hard link, which costs no room; a copy on another file system, or on one without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def write_json(path, obj):
    """Write or replace a small JSON file in one atomic step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(obj, indent=1) + "\n")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
