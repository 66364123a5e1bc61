"""runs.py — the folder of a run: held by one process at a time, given up, found again, and the settings in it."""
import json
import os
import sys
from pathlib import Path

from checkpoint import NEEDED, discard, find, remove
from errors import UserError


def lock(run):
    """Hold `run` for this process until it ends (however it ends); returns the open file. Also sweeps temporaries that
    a killed process left. Raises UserError if another process holds it. A system without locks: a warning."""
    file = open(Path(run) / ".lock", "w")
    try:
        import fcntl  # not on Windows
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run} is in use by another process — wait for it, or choose another --run") from None
    except (ImportError, OSError):
        print(f"warning: {run} cannot be locked here; do not train twice into it", file=sys.stderr)
    for left in [*Path(run).glob(".tmp_*"), *Path(run).glob("checkpoints/.tmp_*")]:
        discard(left)
    return file


def claim(run, given):
    """Hold the run folder; returns (lock, folder of the checkpoint to resume or None). Deletes nothing yet."""
    run.mkdir(parents=True, exist_ok=True)
    held = lock(run)
    used = (run / "metrics.jsonl").exists() or (run / "checkpoints").exists()
    if used and not given.get("resume") and not given.get("overwrite"):
        raise UserError(f"{run} already holds a run — continue it with --resume, start over with --overwrite, or choose another --run")
    if given.get("overwrite") and (others := needing(run)):
        raise UserError(f"{run} holds the weights that the adapters in {', '.join(others)} are for — choose another --run, or delete those first")
    folder = find(run, full=True) if given.get("resume") else None
    if given.get("resume") and not folder and (any(run.glob("checkpoints/*")) or any(b'"train"' in log.read_bytes() for log in run.glob("metrics.jsonl"))):
        raise UserError(f"{run} holds a run and no checkpoint of it — put its checkpoints back, or start over with --overwrite")
    return held, folder


def clear(run):
    """Give up what an earlier run left in the folder."""
    if (run / "checkpoints").exists():
        remove(run / "checkpoints")
    for name in ("metrics.jsonl", "evaluations.jsonl", "trajectory.md", "dynamics.png", "non_finite.json"):
        (run / name).unlink(missing_ok=True)


def need(folder, run):
    """Note in the folder of a checkpoint that the adapters in `run` are for its weights, so that these stay."""
    try:
        with open(folder / NEEDED, "a") as file:
            file.write(os.path.relpath(run, folder) + "\n")
    except OSError as error:
        print(f"warning: {folder} cannot be marked as needed ({error.strerror}); if it is removed, the adapters in {run} are lost", file=sys.stderr)


def needing(run):
    """Other runs, those that still exist, whose adapters are for weights in `run`."""
    noted = {os.path.normpath(mark.parent / line) for mark in run.glob(f"checkpoints/step_*/{NEEDED}") for line in mark.read_text().splitlines()}
    return sorted(os.path.relpath(path) for path in noted if Path(path, "checkpoints").exists())


def newest_run(root="runs", pretrained=False):
    """The run folder whose checkpoints changed last; pretrained: of those that sft.py did not make. Raises UserError if
    there is none."""
    runs = [folder.parent for folder in Path(root).glob("*/checkpoints")]
    runs = [run for run in runs if not pretrained or not (run / "config.json").exists() or "base" not in settings_of(run)]
    if runs:
        return max(runs, key=lambda run: (run / "checkpoints").stat().st_mtime)
    raise UserError(f"no runs in {root} — train one first: python train.py")


def settings_of(run):
    """The settings that `run` was trained with. Raises UserError if its config.json cannot be used."""
    try:
        settings = json.loads((run / "config.json").read_text())
        if [type(settings[name]) for name in ("data", "seq_len", "sample_prompt")] != [str, int, str]:
            raise TypeError
        return settings
    except (OSError, ValueError, TypeError, KeyError):
        if not run.is_dir():
            raise UserError(f"{run}: no such run — train it first: python train.py --run {run}") from None
        raise UserError(f"{run}/config.json is missing or damaged — train with --resume writes it again") from None
