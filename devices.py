"""devices.py — where a script runs: device, precision, one process or several; signals; memory and disk."""
import os
import platform
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from errors import UserError


def choose_device(name=None):
    """torch.device of that name; by default cuda if there is one. Raises UserError if this machine has no such device."""
    try:
        device = torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
        assert device.type in ("cpu", "cuda", "mps")
        return device
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {name} here — use --device cpu, or a build of torch that sees your GPU") from None


def choose_dtype(name, device):
    """The dtype of matrix products. bf16 only where the hardware has it: emulated, it is slower than fp32."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    x86 = device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    return torch.bfloat16 if x86 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()) else torch.float32


def environment(device, dtype, world, micro_batch, compiled):
    """What a run's speed depends on, and its last bits: the "env" of its log."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {"torch": str(torch.__version__), "python": platform.python_version(), "device": name, "device_count": world, "world_size": world,
            "micro_batch": micro_batch, "dtype": str(dtype).removeprefix("torch."), "compile": compiled, "threads": torch.get_num_threads()}


PEAK_FLOPS = {"A100": 312e12, "A6000": 154.8e12, "H100": 989e12, "H200": 989e12, "RTX 4090": 165.2e12}  # dense bf16, data sheets


def peak_flops(env):
    """Of all its devices together; None where we do not know it."""
    return next((flops * env["world_size"] for name, flops in PEAK_FLOPS.items() if name in env["device"]), None)


def listen_for_stops(log):
    """(asked, stop_listening): Ctrl-C, SIGTERM and a closed terminal fill the list, so that the loop finishes the step and
    saves. A second time they end the process at once. stop_listening() puts back what was there before."""
    asked = []

    def ask(signum, frame):
        asked.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        log.say("\nstopping after this step, to save; once more stops at once and goes back to the last checkpoint")

    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not on Windows; nohup ignores it
        signals.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, ask) for signum in signals}
    return asked, lambda: [signal.signal(signum, handler) for signum, handler in before.items()]


@contextmanager
def memory_advice(settings, accumulation, else_smaller="--preset or --seq_len"):
    """Turn "out of memory" into the next smaller micro-batch that still divides the step; where there is none, into another flag."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; on the CPU it is a plain one
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        B = settings["micro_batch"]
        advice = [f"--micro_batch {n}" for n in range(B - 1, 0, -1) if B * accumulation % n == 0] + [f"a smaller {else_smaller}"]
        raise UserError(f"out of memory with micro_batch {B} x seq_len {settings['seq_len']} — use {advice[0]}") from None


def check_room(run, model, settings):
    """Raise UserError if the disk cannot hold what a run keeps: full states (weights and two moments), one more while it is
    being written, and the weights of step 0, the powers of two and the multiples of keep_every."""
    weights = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    steps, every = settings["max_steps"] or 0, settings["keep_every"]
    held = sum(file.stat().st_size for file in Path(run).rglob("*") if file.is_file())
    whole = weights * (3 * (settings["keep_last"] + 1) + steps.bit_length() + 1 + (steps // every if every else 0))
    free = shutil.disk_usage(run).free
    if free < max(3 * weights, whole - held):
        raise UserError(f"{run}: its checkpoints, {whole / 1e6:,.0f} MB in all, do not fit, {free / 1e6:,.0f} MB are free — make room, "
                        f"lower --keep_last or raise --keep_every, or choose a --run on another disk")


# ---------------------------------------------------------------------------------------------------------------------
# Processes: one, or as many as torchrun started.

def start_processes(settings):
    """Join the other processes, if there are any: (rank, world, device)."""
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = choose_device(settings["device"])
    if world > 1:
        device = torch.device("cuda", local_rank) if device.type == "cuda" else device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    if settings["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return rank, world, device


def from_rank_0(value=None):
    """The value that rank 0 has, on every rank; also a place where all wait for each other."""
    box = [value]
    if dist.is_initialized():
        try:
            dist.broadcast_object_list(box, src=0)
        except RuntimeError as error:
            raise UserError(f"another process has ended, see what it said ({str(error).splitlines()[0][:100]})") from None
    return box[0]


def end_processes(code):
    """Leave the other processes, all at the same time, and return `code`; of several processes each exits here with it."""
    if dist.is_initialized():
        from_rank_0()
        dist.destroy_process_group()
        # Threads of gloo may outlive their group; one that does aborts the interpreter on its way out (pytorch issue
        # 190489; here in 1 of 20 runs). All is written by now, so we leave without tidying up.
        sys.stdout.flush()
        os._exit(code)
    return code


def processes():
    """(rank, world) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(rows, device):
    """Fill in on every rank what the others have filled in of `rows`: each row is one rank's, and 0 on all others. So the
    same numbers are added in the same order whatever the number of processes."""
    if dist.is_initialized():
        rows = rows.to(device)
        dist.all_reduce(rows)
    return rows.cpu()
