"""cpu.py — four settings of Linux and PyTorch. To be imported before torch, which reads them once.
PLAIN_PYTORCH=1 leaves them as they are.

How threads wait. An operation on several threads ends when the last of them has finished. GNU's
OpenMP lets the others wait in a loop, for up to 15 ms, before they sleep. If another program uses
one of the cores, a waiting thread takes the time from the one that it waits for, and a training
step takes many times as long. A shorter loop avoids much of this, and costs little when the machine
is idle. docs/speed.md has the figures.

How memory is used again. A step makes and frees the same large tensors as the step before. The C
library gives such memory back to Linux, and gets it anew, filled with zeros, page by page, each
with an interruption: up to 14,000 in a step. Kept by the process, the memory is there. And when it
is new, it comes in pages of 2 MiB instead of 4 KiB.

How the compiler begins. For each instruction set that the processor names, torch.compile first
compiles and loads a library, to see whether it works: 7 s in the first run on a machine. Here the
processor is believed. If that is wrong, devices.can_compile notices, and says so.
"""
import ctypes
import os
import sys

# From malloc.h of the GNU C library. Others do not have mallopt.
M_TRIM_THRESHOLD = -1  # bytes free at the end of the heap above which they are given back
M_MMAP_THRESHOLD = -3  # bytes of a block above which it is apart from the heap, and given back

added = []  # names of the environment variables that set_up adds


def set_up():
    """Change the settings. An environment variable that the user has set stays."""
    chosen = {"THP_MEM_ALLOC_ENABLE": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
    if "OMP_WAIT_POLICY" not in os.environ:
        chosen["GOMP_SPINCOUNT"] = "2000"
    for name, value in chosen.items():
        if name not in os.environ:
            os.environ[name] = value
            added.append(name)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


if os.environ.get("PLAIN_PYTORCH") != "1":
    set_up()
