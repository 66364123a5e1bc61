"""threads.py — how PyTorch's threads wait for each other. To be imported before torch.

An operation on several threads ends when the last of them has finished. GNU's OpenMP, which PyTorch
uses on Linux, lets the others wait in a loop, for up to 15 ms, before they sleep. If another
program uses one of the cores, a waiting thread takes the time from the one that it waits for, and
a training step takes ten times as long. With a shorter loop it does not. Milliseconds of a step of
`tiny` (`python train.py` shows them) on two cores of an Intel Xeon with AMX, medians of 1 to 7 runs
of 60 or 80 steps without evaluations, with 0, 1 and 2 other programs that are always busy:

    GOMP_SPINCOUNT            57   909   125    (as it is without this file)
    GOMP_SPINCOUNT=10000      57   206   219
    GOMP_SPINCOUNT=5000       58   152   153
    GOMP_SPINCOUNT=2000       67   120   119
    OMP_WAIT_POLICY=PASSIVE   97    94   101    (no loop at all)
    one thread                91    86   136
"""
import os

if "OMP_WAIT_POLICY" not in os.environ:  # the user's choice
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
