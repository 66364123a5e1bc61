"""checkpoint.py — the full state of a run: captured, restored, and kept safe on disk.

A run is more than its weights. AdamW carries two numbers of memory for every weight; without them a resumed run is
another run (arXiv 2412.13335 reports it as its practical lesson; `train.py --resume --reset_optimizer` shows it).

    runs/NAME/checkpoints/step_00000500/model.pt         {"config", "model": {name: fp32 tensor}}
                                        train_state.pt   optimizer moments, scaler, generators, step, settings, data
                                        meta.json        step, and size and SHA-256 of the two files
"""
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from data import Tokenizer
from errors import UserError
from lora import merge
from model import Llama, ModelConfig


# ---------------------------------------------------------------------------------------------------------------------
# What the next step depends on. With the settings, the data and `step` (the position in the data), this is all of it.

def capture(model, optimizer, scaler):
    """(weights, state): two plain dicts. Everything is kept by parameter name, so that the order in which the code
    makes its parameters, or the number of processes, may change."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}  # of LoRA: the base
    weights = {"config": asdict(model.config), "model": {name: t for name, t in model.state_dict().items() if name not in frozen}}
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {"optimizer": {names[parameter]: moments for parameter, moments in optimizer.state.items()},
             "scaler": scaler.state_dict(),
             "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}}
    return weights, state


def restore(weights, state, model, optimizer, scaler, reset_optimizer=False):
    """The inverse, in place. Raises UserError naming parameters that are missing, unknown or of another shape."""
    restore_weights(weights, model)
    if not reset_optimizer:
        check_names(state["optimizer"], model, "optimizer state", of=lambda moments: moments["exp_avg"])
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = optimizer.state_dict()["param_groups"]  # numbers its parameters in the order of the groups
        ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.load_state_dict({"param_groups": groups, "state":
                                   {i: state["optimizer"][name] for i, name in enumerate(ordered) if state["optimizer"]}})
        scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"]["cpu"])
    if state["rng"]["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng"]["cuda"])


def restore_weights(weights, model):
    check_names(weights["model"], model, "weights")
    model.load_state_dict({**model.state_dict(), **weights["model"]})  # what is frozen stays


def check_names(saved, model, what, of=lambda tensor: tensor):
    """Raise UserError unless `saved` (before the first step: nothing) has the parameters that are trained, name by name."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if model.config.tie_embeddings and "lm_head.weight" in saved:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    found = {name: tuple(of(value).shape) for name, value in saved.items()}
    if found and found != expected:
        differ = [f"{name} ({found.get(name, 'absent')} saved, {expected.get(name, 'absent')} in the code)"
                  for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
        raise UserError(f"the checkpoint's {what} differ from the network in {len(differ)} parameters: {', '.join(differ[:4])} — "
                        f"use the code and the preset that wrote it")


# ---------------------------------------------------------------------------------------------------------------------
# Durability: a checkpoint is either whole or not there. It is written under a temporary name, forced to the disk, and
# renamed: the rename is the commit. A reader trusts nothing: it compares the hash before it loads.

class Damaged(Exception):
    """Why a checkpoint folder cannot be used, in a few words."""


def fsync_folder(folder):
    """Make renames in `folder` durable. Windows cannot open a folder, and needs no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


class HashedFile:
    """A file that hashes what is written to it, so that nothing is read again, and remembers why a write failed: of a full
    disk torch.save says only "unexpected pos"."""

    def __init__(self, file):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

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
    """torch.save to the disk, not only to its cache; returns {"bytes", "sha256"}."""
    with open(path, "wb") as file:
        hashed = HashedFile(file)
        try:
            torch.save(obj, hashed)
        except RuntimeError as error:
            raise hashed.error or error
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": hashed.sha256.hexdigest()}


def write_json(path, obj):
    """Write or replace a small JSON file in one atomic step."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(obj, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def named_tensors(weights, state):
    """{name: tensor} of all weights and moments."""
    moments = {f"{name}.{key}": value for name, kept in (state or {"optimizer": {}})["optimizer"].items() for key, value in kept.items()}
    return weights["model"] | moments


def save(run, step, weights, state=None):
    """Write checkpoints/step_… of `run`: weights alone, or with `state` all that a resume needs.

    A folder of that step which is there already (damaged, or from before a resume) is replaced. Raises UserError with exit
    code 3 if a number is not finite, with 4 if it cannot be written; the checkpoints of other steps stay as they are."""
    tensors = named_tensors(weights, state)
    # One inf or NaN makes a sum inf or NaN; and a sum, unlike isfinite(tensor), needs no memory.
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.sum())]
    if bad:
        raise UserError(f"step {step}: {len(bad)} tensors are no longer finite numbers ({', '.join(bad[:3])}) — the checkpoint before is "
                        f"the last good one; try a lower --lr in another --run", code=3)
    folder = Path(run) / "checkpoints"
    final, temporary = folder / f"step_{step:08d}", folder / f".tmp_step_{step:08d}"
    try:
        discard(temporary)
        temporary.mkdir(parents=True)
        parts = {"model.pt": weights} | ({"train_state.pt": state} if state else {})
        files = {name: write_file(temporary / name, part) for name, part in parts.items()}
        write_json(temporary / "meta.json", {"step": step, "files": files})
        if final.exists() or final.is_symlink():
            remove(final)
        os.rename(temporary, final)
        fsync_folder(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(run).free
        raise UserError(f"{final}: not saved ({error}); it needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free — make room, then run "
                        f"again with --resume", code=4) from error


def discard(path):
    """Delete a folder, or a file or link in its place: of a link only itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove(folder):
    """Remove a checkpoint, or all of them, so that it is never half there: out of sight first, then file by file."""
    hidden = folder.with_name(f".tmp_removed_{folder.name}")
    discard(hidden)
    os.rename(folder, hidden)
    fsync_folder(folder.parent)
    discard(hidden)


def checkpoints(run):
    """{step: folder} of what looks like a checkpoint of `run`, oldest first."""
    folders = {int(f.name[5:]): f for f in Path(run).glob("checkpoints/step_*") if re.fullmatch(r"step_\d{8}", f.name)}
    return dict(sorted(folders.items()))


def read_meta(folder):
    """The folder's meta.json; raises Damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["step"] == int(folder.name[5:]) and "model.pt" in meta["files"]
        assert all(f.keys() == {"bytes", "sha256"} for f in meta["files"].values())
        return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise Damaged("meta.json is missing, broken or of another step") from None


def verify(folder, name, meta):
    """Raise Damaged unless file `name` has the size and the SHA-256 that meta.json promises."""
    try:
        size, promised = (folder / name).stat().st_size, meta["files"][name]
        if size != promised["bytes"]:
            raise Damaged(f"{name} has {size} bytes instead of {promised['bytes']}")
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != promised["sha256"]:
                raise Damaged(f"{name} is not what was written: its SHA-256 differs")
    except OSError as error:
        raise Damaged(f"{name}: {error.strerror}") from None


def load_file(path):
    """torch.load that can only make tensors and plain containers: a file that would run code is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors and plain values, so it is not loaded — "
                        f"use a checkpoint that train.py wrote") from None


def find(run, step=None, full=False):
    """Folder of the newest checkpoint of `run` that verifies, or of `step`; full: only those that can be resumed.

    Damaged ones are named on stderr and passed over. None if there is no checkpoint at all. Raises UserError if there
    are some but none can be used, or if `step` is absent or damaged."""
    every, damaged = checkpoints(run), {}
    if not every:
        return None
    if step is not None and step not in every:
        raise UserError(f"{run} has no checkpoint of step {step} — choose one of {', '.join(map(str, every))}")
    for number, folder in reversed(every.items()) if step is None else [(step, every[step])]:
        try:
            meta = read_meta(folder)
            if full and "train_state.pt" not in meta["files"]:
                continue  # weights alone: kept to be sampled, not to be resumed
            for name in ("model.pt", "train_state.pt")[:1 + full]:
                verify(folder, name, meta)
        except Damaged as why:
            damaged[number] = why
            print(f"checkpoint {folder} is damaged: {why}", file=sys.stderr)
        else:
            return folder
    listed = "; ".join(f"step {number}: {why}" for number, why in damaged.items()) or "they hold weights alone"
    raise UserError(f"{run}: no usable checkpoint ({listed}) — " + (
        "choose another --step" if step is not None else "start over with --overwrite, or in another --run"))


def power_of_two(step):
    return step > 0 and step & (step - 1) == 0


NEEDED = "needed_by_adapters"  # sft.py --lora leaves a file of this name beside the weights that it adapts


def prune(run, now, keep_last, keep_every):
    """Keep the newest `keep_last` full states up to step `now` (what is newer was left damaged). Older ones shrink to their
    weights if they belong to the trajectory (step 0, powers of two, multiples of keep_every) or adapters need them (they hold
    a file NEEDED), else they go."""
    full = []
    for step, folder in checkpoints(run).items():
        try:
            meta = read_meta(folder)
        except Damaged:
            continue  # not ours to judge: `find` names it
        if "train_state.pt" not in meta["files"]:
            (folder / "train_state.pt").unlink(missing_ok=True)  # a kill came before it could go
        elif step <= now:
            full.append((step, folder, meta))
    try:
        for step, folder, meta in full[:-keep_last]:
            if step == 0 or power_of_two(step) or (keep_every and step % keep_every == 0) or (folder / NEEDED).exists():
                del meta["files"]["train_state.pt"]
                write_json(folder / "meta.json", meta)  # first the word that it is gone, so that no kill leaves a broken one
                (folder / "train_state.pt").unlink()
            else:
                remove(folder)
    except OSError as error:
        raise UserError(f"{run}/checkpoints: an old state was not removed ({error}) — make room, then run again with --resume", code=4) from None


# ---------------------------------------------------------------------------------------------------------------------
# Loading, verified

def load_full(folder):
    """(weights, state) in the folder of a full checkpoint; (None, None) where there is no folder."""
    return tuple(load_file(folder / name) for name in ("model.pt", "train_state.pt")) if folder else (None, None)


def load_weights(run, step=None, sha256=None):
    """(weights, step) of a run's newest valid checkpoint, or of `step`; of a LoRA run, its base with the adapters merged in.
    Raises UserError if there is none that can be used, or if its model.pt has not the hash that is asked for."""
    folder = find(run, step)
    if folder is None:
        raise UserError(f"{run}: no such run, or one without checkpoints — train it first: python train.py --run {run}")
    if sha256 not in (None, read_meta(folder)["files"]["model.pt"]["sha256"]):
        raise UserError(f"{folder} holds other weights now")
    weights = load_file(folder / "model.pt")
    if "lora" in weights:
        base = load_base(run, weights["lora"]["base"])
        merge(base["model"], weights["model"], weights["lora"]["scale"])
        weights = base
    return weights, int(folder.name[5:])


def load_base(run, base):
    """Weights that the adapters of `run` are for; base: {"run": path from the run's folder, "step", "sha256" of its model.pt}."""
    path = Path(os.path.normpath(Path(run) / base["run"]))
    if not checkpoints(path):
        raise UserError(f"{run} holds adapters of {path} step {base['step']}, and there is no such run — put it back; the two move together")
    try:
        return load_weights(path, base["step"], base["sha256"])[0]
    except UserError as why:
        raise UserError(f"{run} holds adapters of {path} step {base['step']}, and is nothing without these: {why}") from None


def load_model(run, step=None, device="cpu"):
    """(model, tokenizer, step) of a run's newest valid checkpoint, or of `step`; UserError as `load_weights`."""
    weights, step = load_weights(run, step)
    model = Llama(ModelConfig(**weights["config"]))
    restore_weights(weights, model)
    return model.to(device).eval(), Tokenizer(model.config.vocab_size), step
