"""measure.py — time and memory, of a call or of a whole process, and the fastest matrix product."""
import json
import os
import re
import subprocess
import time
from functools import partial
from pathlib import Path

import torch

from support import cpu
from support.runs import UserError


def seconds_of(call, device):
    """Seconds until all that `call` starts is done, on a GPU too."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    """Wait for the GPU: a call only puts its work in a queue there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(rows, inner, columns, dtype, device):
    """FLOP/s of the product (rows, inner) · (inner, columns): 2 for each number that meets
    another."""
    a = torch.randn(rows, inner, dtype=dtype, device=device)
    b = torch.randn(inner, columns, dtype=dtype, device=device)
    out = torch.empty(rows, columns, dtype=dtype, device=device)  # no new memory in each call
    multiply = partial(torch.mm, a, b, out=out)
    multiply()  # the first call prepares more
    return 2 * rows * inner * columns / min(seconds_of(multiply, device) for _ in range(5))


def peak_bytes(device):
    """The most memory that this process has held: on CUDA what PyTorch allocated there, else
    resident memory of any kind."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux ru_maxrss is at least the memory of the process that started this one; VmHWM is not.
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1))
    import resource  # on macOS, where ru_maxrss is in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_fresh_process(command, **environment):
    """Run a command that ends with `report`, in the environment that the user gave to this
    process, with more variables. Returns {"first_step": seconds from its start to its first step,
    "seconds": of a step, "peak_bytes"}. Raises UserError if it fails."""
    given = {name: value for name, value in os.environ.items() if name not in cpu.added}
    start = time.time()
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env={**given, **environment},
                          capture_output=True, text=True)
    if done.returncode != 0:
        last_line = done.stderr.strip().split("\n")[-1]
        raise UserError(f"{' '.join(command)} ended with exit code {done.returncode}: {last_line}")
    measured = json.loads(done.stdout.splitlines()[-1])
    measured["first_step"] = measured.pop("first_step_at") - start
    return measured


def report(first_step_at, seconds, device):
    """Print what `in_fresh_process` reads: when the first step was done (seconds since 1970), the
    seconds of a step, and the memory's peak so far."""
    print(json.dumps({"first_step_at": first_step_at, "seconds": seconds,
                      "peak_bytes": peak_bytes(device)}))
