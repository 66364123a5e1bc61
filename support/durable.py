"""durable.py — checkpoint files that are whole or not there, and are verified before they are used.

A checkpoint is written into a temporary folder, forced to the disk, and renamed: the rename is the
commit. meta.json holds size and SHA-256 of its files, and a reader compares them before it loads.

    runs/NAME/checkpoints/step_00000500/{model.pt, train_state.pt, meta.json}
"""
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.serialization import config as serialization

from support.files import sha256_of, sync, write_json
from support.runs import (UserError, due, first_line_of, holds_steps, is_out_of_memory,
                          parse_json, warn)
from support.trees import named_tensors


class Damaged(Exception):
    """Why a file or a checkpoint cannot be used, in a few words."""


# -------------------------------------------------------------------------------------------------
# Writing

def write_checkpoint(run, step, contents):
    """Write checkpoints/step_… of `run`; contents: {file name: object for torch.save}.

    A damaged folder of the same step is replaced. Raises UserError with code 3 if a tensor holds a
    NaN or an infinity, with 4 if the disk refuses. The checkpoints of other steps stay as they
    are."""
    tensors = named_tensors(contents)
    # One NaN or infinity makes the sum NaN or infinite, and a sum needs no memory.
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.sum())]
    if bad:
        raise UserError(f"step {step}: NaN or infinity in {len(bad)} tensors "
                        f"({', '.join(bad[:3])}), not saved; the checkpoint before this one is the "
                        f"last good one — try a lower --lr in another --run", code=3)
    final = folder_of(run, step)
    temporary = final.with_name(f".tmp_{final.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {name: write_file(temporary / name, obj) for name, obj in contents.items()}
        write_json(temporary / "meta.json", {"step": step, "files": files})
        if final.exists():
            remove(final)
        os.rename(temporary, final)
        sync(final.parent)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(tensor.nbytes for tensor in tensors.values())
        free = shutil.disk_usage(run).free
        raise UserError(f"{final}: not saved ({error}); it needs {needed / 1e6:,.1f} MB, "
                        f"{free / 1e6:,.1f} MB are free — make room, then run the same "
                        f"command again (a training with --resume)", code=4) from error


class HashedFile:
    """A file that hashes what is written to it, so that 20 GB need not be read again. It keeps the
    system's error: of a full disk torch.save only says "unexpected pos"."""

    def __init__(self, file):
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error = None

    def write(self, data):
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        return len(data)

    def flush(self):
        self.file.flush()


def write_file(path, obj):
    """torch.save, forced to the disk; returns {"bytes", "sha256"}."""
    with open(path, "wb") as file:
        hashed = HashedFile(file)
        try:
            # PyTorch's own checksum takes as long as the SHA-256, which tells all that it would.
            with serialization.patch("save.compute_crc32", False):
                torch.save(obj, hashed)
        except RuntimeError as error:
            raise hashed.error or error
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": hashed.sha256.hexdigest()}


# -------------------------------------------------------------------------------------------------
# Reading

def folder_of(run, step):
    """checkpoints/step_00000500 of `run`."""
    return Path(run) / "checkpoints" / f"step_{step:08d}"


def step_of(folder):
    """500 of checkpoints/step_00000500."""
    return int(folder.name.removeprefix("step_"))


def checkpoints(run):
    """{step: folder} of what is named like a checkpoint of `run`, oldest first."""
    folders = sorted(Path(run).glob("checkpoints/step_*"))
    return {step_of(f): f for f in folders if re.fullmatch(r"step_\d{8}", f.name)}


def read_meta(folder):
    """meta.json of a checkpoint; raises Damaged."""
    try:
        meta = parse_json((folder / "meta.json").read_bytes())
        fits = meta["step"] == step_of(folder) and isinstance(meta["files"]["model.pt"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise Damaged("meta.json is missing, broken or of another step")
    return meta


def verify(folder, name, files):
    """Raise Damaged unless a file has the size and the SHA-256 in files[name]."""
    path = folder / name
    try:
        promised = (files[name]["bytes"], files[name]["sha256"])
        size = path.stat().st_size
        if size != promised[0]:
            raise Damaged(f"{name} has {size} bytes instead of {promised[0]}")
        sha256 = sha256_of(path)
    except OSError as error:
        raise Damaged(f"{name}: {error.strerror}") from None
    except (KeyError, TypeError):
        raise Damaged(f"meta.json does not tell the hash of {name}") from None
    if sha256 != promised[1]:
        raise Damaged(f"{name} is not what was written: its SHA-256 differs")


def load_file(path):
    """torch.load, restricted to tensors and plain containers: a file cannot run code.

    With several processes the file is mapped instead of read, so that those of a machine share one
    copy of 20 GB in memory. What a process changes in its tensors does not reach the others."""
    mapped = torch.distributed.is_initialized()
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors and plain values, so it is not loaded — "
                        f"use a checkpoint that train.py wrote") from None
    except Exception as error:  # of a file that is not one of torch.save: almost any
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: cannot be read ({error}) — use a checkpoint that train.py "
                        f"wrote") from None


def newest(run):
    """The folder of the newest undamaged full state of `run`; None if the run has not begun.

    Raises UserError if it has begun and no state can be used: a run never starts over by itself."""
    folder = find(run, full=True)
    if folder is None and holds_steps(run):
        raise UserError(f"{run} holds a run but no checkpoint of it — restore its checkpoints, or "
                        f"start over with --overwrite")
    return folder


def load_weights(path):
    """{"config": …, "model": {name: tensor}} in a model.pt. Raises UserError if it is something
    else."""
    contents = load_file(path)
    with one_line_error(path):
        config = dict(contents["config"])
        model = dict(contents["model"])
        if config.get("n_layers", 1) > len(model):  # it would take for ever to make so many
            raise ValueError(f"{config['n_layers']} layers, {len(model)} tensors")
        return {"config": config, "model": model}


def load_rest(path):
    """The dict in a train_state.pt. Raises UserError if a number in it is something else, or if its
    settings cannot be logged."""
    rest = load_file(path)
    with one_line_error(path):
        for name in ("step", "tokens", "updates", "log_bytes"):
            rest[name] = int(rest[name])
        rest["seconds"] = float(rest["seconds"])
        json.dumps([{**rest["config"], **rest["env"]}, rest["data"]])
    return rest


@contextmanager
def one_line_error(what):
    """`with one_line_error("the checkpoint"):` turns any error into one line. It is for the content
    of files whose hash is right: if that cannot be used, other code has written it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"{what} cannot be used ({type(error).__name__}: {first_line_of(error)}) — "
                        f"use the code that wrote it") from None


def find(run, step=None, full=False):
    """The folder of the newest checkpoint of `run` that verifies, or of `step`. None if there is no
    checkpoint at all. full: only one that holds all that a resume needs.

    A damaged one is reported on stderr and skipped. Raises UserError if none can be used, or if
    `step` is absent or damaged."""
    every = checkpoints(run)
    if not every:
        return None
    if step is not None and step not in every:
        listed = ", ".join(map(str, every))
        raise UserError(f"{run} has no checkpoint of step {step} — choose one of {listed}")
    candidates = [step] if step is not None else reversed(every)
    needed = ["model.pt", "train_state.pt"] if full else ["model.pt"]
    damaged = []
    for number in candidates:
        folder = every[number]
        try:
            files = read_meta(folder)["files"]
            if full and "train_state.pt" not in files:
                continue  # weights alone: kept to be sampled, not to be resumed
            for name in needed:
                verify(folder, name, files)
            return folder
        except Damaged as why:
            damaged.append(f"step {number}: {why}")
            print(f"checkpoint {folder} is damaged: {why}", file=sys.stderr)
    reasons = "; ".join(damaged)
    advice = "start over with --overwrite, or in another --run"
    if not damaged:
        reasons = "they hold weights alone"
        advice = f"start from them in another --run, with --init_from {run}"
    if step is not None:
        advice = "choose another --step"
    raise UserError(f"{run}: no usable checkpoint ({reasons}) — {advice}")


# -------------------------------------------------------------------------------------------------
# Removing

def remove(folder):
    """Delete a checkpoint. It is renamed first, so that it is never half there. What the file
    system keeps (a network drive keeps an open file) is tried again at the next start."""
    aside = folder.with_name(f".tmp_removed_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def set_aside_newer(run, step):
    """Rename the checkpoints of later steps, which a resume from `step` passed over as damaged:
    `prune` would count them as good ones. They are not deleted, since perhaps a drive only failed
    to deliver them."""
    for newer, folder in checkpoints(run).items():
        if newer > step:
            aside = folder.with_name(f".damaged_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
            sync(folder.parent)
            warn(f"{folder} is {aside} now; delete it, or, if it is good after all, stop and "
                 f"rename it back")


def prune(run, keep_last, keep_every):
    """Keep the newest `keep_last` full states.

    Of an older one the weights stay if they belong to the trajectory (`due`), to be sampled and
    scored; otherwise it is deleted. A refusal is said: the new state is on the disk."""
    full = []
    for step, folder in checkpoints(run).items():
        try:
            meta = read_meta(folder)
        except Damaged:
            continue  # find() reports it
        if "train_state.pt" not in meta["files"]:
            with refusal_is_said(folder):
                (folder / "train_state.pt").unlink(missing_ok=True)  # left by a kill, see below
        else:
            full.append((step, folder, meta))
    for step, folder, meta in full[:-keep_last]:
        with refusal_is_said(folder):
            if due(step, keep_every, last=None):
                # meta.json first, so that a kill in between leaves a valid checkpoint.
                del meta["files"]["train_state.pt"]
                write_json(folder / "meta.json", meta)
                (folder / "train_state.pt").unlink()
            else:
                remove(folder)


@contextmanager
def refusal_is_said(folder):
    """If the file system refuses what is done within, print it and go on."""
    try:
        yield
    except OSError as error:
        warn(f"{folder}: not removed ({error.strerror}); it takes room, and is tried again after "
             f"the next save")
