"""threads.py — how PyTorch's threads wait for each other. To be imported before torch.

An operation on several threads ends when the last of them has finished. GNU's OpenMP, which PyTorch
uses on Linux, lets the others wait in a loop, for up to 15 ms, before they sleep. If another
program uses one of the cores, a waiting thread takes the time from the one that it waits for, and
a training step takes many times as long. A shorter loop avoids most of this, and costs little when
the machine is idle. Milliseconds of a step of `tiny` on two cores of an Intel Xeon with AMX, each
the median of three runs of `python -m pytest -m slow -k busy_core -s`:

                                 idle    beside one busy program
    without this file              74    510
    with it                        75    185
    OMP_WAIT_POLICY=PASSIVE       112    126    (no loop at all)
"""
import os

if "OMP_WAIT_POLICY" not in os.environ:  # the user's choice
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
