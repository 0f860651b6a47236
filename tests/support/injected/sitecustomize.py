"""Gives a process NaN losses, a wrong clock or a slow disk: Python imports this file at its start if its folder is on the path.

NAN_BATCHES: trainers compute NaN in these batches
WRONG_CLOCK: while this file exists, the clock of a node is an hour ahead in the environment check
SLOW_DISK:   while this file exists, a node writes 4 MiB in 1.5 s past the page cache in the environment check

The node is the one that the file names; if it is empty, the last node.
"""

import fcntl
import os
import sys
import time
from pathlib import Path

variables = os.environ
if "train" in sys.orig_argv and "NAN_BATCHES" in variables and "SLURM_PROCID" in variables:
    from tests.support.injected_faults import poison_batches

    poison_batches({int(batch): float("nan") for batch in variables["NAN_BATCHES"].split(",")})


def is_on_this_node(fault: str) -> bool:
    path = Path(variables.get(fault, "none"))
    if "environment" not in sys.orig_argv or not path.exists():
        return False
    if host := path.read_text():
        return variables["SLURMD_NODENAME"] == host
    return int(variables["SLURM_PROCID"]) == int(variables["SLURM_NTASKS"]) - 1


if is_on_this_node("WRONG_CLOCK"):
    right_time = time.time
    time.time = lambda: right_time() + 3600

if is_on_this_node("SLOW_DISK"):
    write = os.write

    def slow_write(handle: int, data: bytes) -> int:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            time.sleep(1.5)
        return write(handle, data)

    os.write = slow_write  # type: ignore[assignment]
