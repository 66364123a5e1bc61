"""devices.py — where a script runs: device, precision, one process or several, and stop signals."""
import contextlib
import os
import platform
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from support.runs import AT_END, UserError, first_line_of, print_anyway, warn

# -------------------------------------------------------------------------------------------------
# Device and precision

NVIDIA = Path("/dev/nvidia0")  # the first GPU, on Linux; it is there without a working driver too


def choose_device(name=None):
    """The torch.device of that name; without a name cuda if there is one. Raises UserError if this
    machine has no such device."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            note_unused_gpu()
    try:
        device = torch.empty(0, device=name).device
        why = f"{device.type} is not supported"
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises the second one
        device = None
        why = first_line_of(error)
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name} cannot be used here ({why}) — use --device cpu, or a build "
                        f"of torch that sees your GPU")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what asks for "the GPU" then means this one, not GPU 0
        choose_attention()
    return device


def note_unused_gpu():
    """Say it if there is a GPU, but this build of PyTorch finds no driver that it can use."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # by the user
    if NVIDIA.exists() and not is_hidden:
        warn(f"torch {torch.__version__} cannot use this machine's GPU, so the CPU does the work — "
             f"install a newer driver, or a build of torch for an older CUDA (nvidia-smi shows "
             f"which one the driver supports)")


def choose_attention():
    """Switch cuDNN's attention off. On an H100 it is PyTorch's first choice, but there are reports
    of NaN in its backward (pytorch issues 139298, 196678), and for each new length of a text it
    makes a plan, which takes tens of milliseconds. Without it PyTorch takes flash attention. cuDNN
    may be some percent faster: CUDNN_ATTENTION=1 before a command leaves it on."""
    torch.backends.cuda.enable_cudnn_sdp(os.environ.get("CUDNN_ATTENTION") == "1")


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


def can_compile(device):
    """Whether torch.compile works here. If not, say why: there may be no C++ compiler, no headers
    of Python, no OpenMP."""
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # each cause has its own class
        warn(f"torch.compile does not work here, so this is slower ({first_line_of(error)})")
        return False
    return True


def environment(machine, micro_batch, fast, code):
    """What the speed of a run and its last bits depend on: the "env" of its log. fast: the parts of
    support/fast.py in use; code: {file: hash of its text}."""
    env = {"torch": str(torch.__version__), "python": platform.python_version(),
           "device": platform.machine(), "device_count": machine.world,
           "world_size": machine.world, "micro_batch": micro_batch,
           "dtype": str(machine.dtype).removeprefix("torch."), "fast": fast,
           "threads": torch.get_num_threads(), **code}
    if machine.device.type == "cuda":
        env["device"] = torch.cuda.get_device_name(machine.device)
        env["cuda"] = torch.version.cuda
        env["cudnn_attention"] = torch.backends.cuda.cudnn_sdp_enabled()
    return env


# Dense bf16 and fp16 FLOPs per second, from the data sheets. The first name that is a part of the
# device's name counts, so a special model stands above the general one. None: not the whole chip,
# or another chip, whose name only has this one in it.
PEAK_FLOPS = {"MIG": None, "Laptop": None, "RTX 4090 D": None, "A1000": None,
              "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12,
              "H100": 989e12, "H200": 989e12, "A100": 312e12,
              "RTX A6000": 154.8e12, "RTX 4090": 165.2e12}


def peak_rate(env, flops_per_token):
    """Tokens per second if all devices used all of their FLOPs; None where these are not known, as
    for products in fp32."""
    if env["dtype"] == "float32":
        return None
    for name, flops in PEAK_FLOPS.items():
        if name in env["device"]:
            return flops and flops * env["world_size"] / flops_per_token
    return None


# -------------------------------------------------------------------------------------------------
# To the device, and its memory

def to_device(array, device):
    """A NumPy batch as a tensor on the device. A GPU copies it from pinned memory while it still
    computes earlier work; from ordinary memory the program would wait for the copy."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def peak_memory(device):
    """The most bytes that tensors on a GPU have taken at once so far; None without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return None


def random_state():
    """That of PyTorch's generators: {"cpu", "cuda"}, the second None without a GPU."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state):
    """The opposite of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# -------------------------------------------------------------------------------------------------
# Stop signals

class StopSignals:
    """Ctrl-C, SIGTERM, SIGUSR1 (SLURM can send it before the time is up) and a closed terminal set
    `requested`, so that the loop finishes its step and saves. A second Ctrl-C, or any second signal
    after 10 seconds, ends the process at once. (Before that it is ignored: a cluster may send one
    stop twice, by itself and through torchrun.)"""

    def __init__(self, log):
        self.log = log
        self.requested = False
        self.first = None  # the time of the first signal
        self.before = {}
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        AT_END.append(lambda code: self.restore())
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has only the first two
            if number is None or name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue  # SIGHUP is ignored after nohup
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
        while self.before:
            signal.signal(*self.before.popitem())


# -------------------------------------------------------------------------------------------------
# Processes: one, or as many as torchrun started

@dataclass
class Machine:
    """Where the script runs: as process `rank` of `world`, on which device, with matrix products of
    which dtype."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    @property
    def is_main(self):
        """Whether this is the process that prints and writes."""
        return self.rank == 0


def start_processes(name):
    """Join the other processes, if there are any; returns the torch.device. name: of the device
    that was asked for, or None. Raises UserError."""
    rank, world, local_rank = ranks()
    on_gpus = torch.cuda.is_available() if name is None else name.startswith("cuda")
    if world > 1 and on_gpus:
        if torch.cuda.device_count() == 0:
            choose_device(name)  # this raises, and says why
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"LOCAL_RANK is {local_rank}, but there are "
                            f"{torch.cuda.device_count()} GPUs — start as many processes as GPUs")
        name = f"cuda:{local_rank}"
        torch.cuda.set_device(name)  # before all else: whatever touches GPU 0 takes memory there
    device = choose_device(name)
    if world > 1:
        join(rank, world, backend="nccl" if device.type == "cuda" else "gloo")
        watch_others()
    return device


def use_machine(args, device):
    """Apply the settings of the machine, on a resume the saved ones; returns the Machine. device:
    on which the processes have joined."""
    rank, world = processes()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.deterministic)
    if world == 1:
        device = choose_device(args.device)
    return Machine(rank, world, device, choose_dtype(args.dtype, device))


def refuse_processes():
    """Raise UserError if torchrun started several processes: each would do all of the work."""
    _, world, _ = ranks()
    if world > 1:
        raise UserError("this script runs in one process — start it without torchrun, or unset "
                        "RANK and WORLD_SIZE")


def ranks():
    """(rank, world, local rank), as torchrun puts them into the environment; (0, 1, 0) without it.

    Raises UserError if the environment has only some of them, or other values: left there by
    another program, they would make this process wait for others that do not exist."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if found.get("RANK", "0") == "0" and found.get("WORLD_SIZE", "1") == "1":
        return 0, 1, 0
    try:
        rank = int(found["RANK"])
        world = int(found["WORLD_SIZE"])
        local_rank = int(found["LOCAL_RANK"])
        port = int(found["MASTER_PORT"])
        fits = (0 <= rank < world
                and 0 <= local_rank < world
                and 0 < port < 65_536
                and found["MASTER_ADDR"] != "")
    except (KeyError, ValueError):
        fits = False
    if not fits:
        shown = ", ".join(f"{name}={found.get(name, '(not set)')}" for name in names)
        raise UserError(f"the environment has {shown}, which is not what torchrun sets — start "
                        f"several processes with torchrun, or unset RANK and WORLD_SIZE")
    return rank, world, local_rank


# How long one process waits for another before it fails: rank 0 may take minutes to verify or to
# write 20 GB on a slow disk, and NCCL's own 10 minutes are less. `watch_others` sees a process that
# has failed within seconds, so only one that hangs is noticed this late.
PATIENCE = timedelta(minutes=60)


def join(rank, world, backend):
    """Wait for the other processes, and say so if it takes long. Raises UserError."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = f"rank {rank} of {world} is waiting for the others at {place}"
    reminder = threading.Timer(5, print, [text], {"file": sys.stderr, "flush": True})
    reminder.daemon = True
    reminder.start()
    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread:  # Python would handle Ctrl-C only after the waiting
        handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # errors of the network are RuntimeErrors
        raise UserError(f"rank {rank} of {world} did not reach the others at {place} "
                        f"({first_line_of(error)}) — start all of them, with torchrun") from None
    finally:
        reminder.cancel()
        if is_main_thread:
            signal.signal(signal.SIGINT, handler)


def watch_others():
    """From now on, when one process fails, the others end too, within seconds and with its exit
    code. Otherwise they would wait for it in their next exchange, as long as PATIENCE."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                          is_master=False)  # a connection of its own to what all have joined at
    key = f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    ended = threading.Event()  # this process, by itself

    def tell(code):
        ended.set()
        if code not in (0, 75):
            store.set(key, str(code or 1))  # None: a traceback
            time.sleep(3)  # the store may end with this process: let the others read it

    def watch():
        while not ended.wait(1):
            try:
                failed = store.check([key])
            except RuntimeError:
                return  # the store has ended: so has the training, or the next exchange fails
            if failed:
                code = int(store.get(key))
                with contextlib.suppress(OSError):  # the terminal may be gone
                    print(f"another process failed with exit code {code}, see its message",
                          file=sys.stderr, flush=True)
                os._exit(code)

    AT_END.append(tell)
    threading.Thread(target=watch, daemon=True).start()


def processes():
    """(rank, world) of this process."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def say(text):
    """Print a line, on rank 0 only."""
    rank, _ = processes()
    if rank == 0:
        print_anyway(text)


def remark(text):
    """Print a line on stderr, once, on rank 0 only."""
    rank, _ = processes()
    if rank == 0:
        warn(text)


def from_rank_0(value=None):
    """The value that rank 0 has, on every rank: they wait for it here."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_rank_0():
    """Return when rank 0 has come here too."""
    from_rank_0()


def check_equal(settings):
    """Raise UserError unless all processes have the settings of rank 0: with another number of
    steps, for example, one would wait for ever for the others."""
    first = from_rank_0(settings)
    differ = [name for name, value in settings.items() if value != first.get(name)]
    if differ:
        raise UserError(f"this process has other settings or data than rank 0 "
                        f"({', '.join(differ)}) — start all of them with the same command and data")


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
