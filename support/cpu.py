"""cpu.py — two settings of PyTorch on Linux. To be imported before torch, which reads them once.

How threads wait. An operation on several threads ends when the last of them has finished. GNU's
OpenMP lets the others wait in a loop, for up to 15 ms, before they sleep. If another program uses
one of the cores, a waiting thread takes the time from the one that it waits for, and a training
step takes many times as long. A shorter loop avoids most of this, and costs little when the machine
is idle. README.md has the figures.

How memory is handed out. A large tensor is new memory, which Linux gives in pages of 4 KiB, each
at its first use and with an interruption: for the 0.1 GB of a chunk of logits 25,000 of them. In
pages of 2 MiB there are 50.
"""
import os

if "OMP_WAIT_POLICY" not in os.environ:  # the user's choice
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
