"""devices.py — where a script runs: device, precision, one process or several, and stop signals."""
import os
import platform
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from support.runs import UserError

# -------------------------------------------------------------------------------------------------
# Device and precision

def choose_device(name=None):
    """The torch.device of that name; without a name cuda if there is one. Raises UserError if this
    machine has no such device."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # a build without CUDA raises the second one
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"no device {name} here — use --device cpu, or a build of torch that sees "
                        f"your GPU")
    return device


def choose_dtype(name, device):
    """The dtype of matrix products. "auto": bf16 only where the hardware has it, since emulated it
    is slower than fp32; without it fp16 on a GPU, fp32 on a CPU."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name != "auto":
        return named[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # an older PyTorch cannot tell: fp32
        if cpu.get("avx512_bf16") or cpu.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def environment(device, dtype, world, micro_batch, compiled):
    """What the speed of a run and its last bits depend on: the "env" of its log."""
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"torch": str(torch.__version__), "python": platform.python_version(), "device": name,
            "device_count": world, "world_size": world, "micro_batch": micro_batch,
            "dtype": str(dtype).removeprefix("torch."), "compile": compiled,
            "threads": torch.get_num_threads()}


PEAK_FLOPS = {"A100": 312e12, "A6000": 154.8e12, "H100": 989e12, "H200": 989e12,
              "RTX 4090": 165.2e12}  # dense bf16, data sheets


def peak_rate(env, flops_per_token):
    """Tokens per second if all devices used all of their FLOPs; None where these are not known."""
    for name, flops in PEAK_FLOPS.items():
        if name in env["device"]:
            return flops * env["world_size"] / flops_per_token
    return None


# -------------------------------------------------------------------------------------------------
# Stop signals

class StopSignals:
    """Ctrl-C, SIGTERM and a closed terminal set `requested`, so that the loop finishes its step and
    saves. A second Ctrl-C, or any second signal after 10 seconds, ends the process at once. (Before
    that it is ignored: a cluster may send one stop twice, by itself and through torchrun.)"""

    def __init__(self, log):
        self.log = log
        self.requested = False
        self.first = None  # the time of the first signal
        self.before = {}
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        names = ["SIGINT", "SIGTERM"]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            names.append("SIGHUP")  # not on Windows; nohup ignores it
        for name in names:
            number = getattr(signal, name)
            self.before[number] = signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.requested:
            late = time.monotonic() - self.first > 10
            if late or number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.requested = True
        self.first = time.monotonic()
        self.log.say("\nstopping after this step, to save; a second Ctrl-C stops at once and loses "
                     "the steps since the last checkpoint")

    def restore(self):
        """Put back the handlers that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------------------
# Processes: one, or as many as torchrun started

def start_processes(args):
    """Join the other processes, if there are any: (rank, world, device)."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return rank, world, device


def processes():
    """(rank, world) of this process."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_rank_0(value=None):
    """The value that rank 0 has, on every rank: they wait for it here."""
    box = [value]
    if dist.is_initialized():
        try:
            dist.broadcast_object_list(box, src=0)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:100]
            raise UserError(f"another process has ended, see its message ({reason})") from None
    return box[0]


def wait_for_rank_0():
    """Return when rank 0 has come here too."""
    from_rank_0()


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, on every one of them; in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_process(flag, device):
    """Whether the flag is set on at least one process."""
    return sum_over_processes(torch.tensor(float(flag), device=device)).item() > 0


def complete_rows(rows, device):
    """`rows` is a CPU tensor in which each process has filled in its own rows and left the others
    0; returns it with all of them. The same numbers are then added in the same order, whatever the
    number of processes."""
    if not dist.is_initialized():
        return rows
    return sum_over_processes(rows.to(device)).cpu()


def end_processes(code):
    """Return the exit code; with several processes each of them exits here, at the same time."""
    if dist.is_initialized():
        wait_for_rank_0()
        dist.destroy_process_group()
        # Threads of gloo may outlive their group, and one that does aborts the interpreter on its
        # way out (pytorch issue 190489; here in 1 of 20 runs). Everything is written by now.
        sys.stdout.flush()
        os._exit(code)
    return code
