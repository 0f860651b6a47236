"""Stands for the programs of nccl-tests: prints in their format, and takes their options -b, -e, -f, -n, -w, -c and -g.

The format follows NVIDIA/nccl-tests 2.19 (src/util.cu: writeDeviceReport, writeResultHeader, writeBenchmarkLineBody,
writeResultFooter; src/common.cu: main). `write_programs` makes a folder of them; each is a Python script that calls `main`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

NAMES = (
    "all_reduce_perf",
    "all_gather_perf",
    "reduce_scatter_perf",
    "alltoall_perf",
    "broadcast_perf",
    "sendrecv_perf",
)
HEADER = """\
# nccl-tests version 2.19.6 nccl-headers=22803 nccl-library=22803
# Collective test starting: {name}
# nThread 1 nGpus {gpus} minBytes 8 maxBytes 8589934592 step: 8(factor) warmup iters: 0 iters: 20 agg iters: 1 validation: 1
#
# Using devices
"""
RANK = "#  Rank %2d Group  0 Pid %6d on %10s device %2d [0000:%02x:00] NVIDIA H100 80GB HBM3"
COLUMNS = """\
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)
"""
FOOTER = """\
# Out of bounds values : {wrong} {verdict}
# Avg bus bandwidth    : 83.7
#
# Collective test concluded: {name}
#
"""


def write_programs(folder: Path, names: Iterable[str] = NAMES, does: str = "sys.exit(main(sys.argv))") -> Path:
    """Write programs of these names; `does` is the Python that each of them runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        program = folder / name
        program.write_text(
            f"#!{sys.executable} -S\nimport os, sys, time\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"from fake_nccl_tests import *\n{does}\n"
        )
        program.chmod(0o755)
    return folder


def write_srun(folder: Path, ranks: int, has_mpi: bool = True) -> Path:
    """Write a program that starts a command as srun does: with MPI, rank 0 alone prints; without, each process does."""
    folder.mkdir(parents=True, exist_ok=True)
    srun = folder / "srun"
    shared = f"FAKE_MPI_RANKS={ranks} " if has_mpi else ""
    starts = 1 if has_mpi else ranks
    srun.write_text(f'#!/bin/bash\nfor _ in $(seq {starts}); do {shared}"$@" || exit 1; done\n')
    srun.chmod(0o755)
    return srun


def row(size: int, rate: float = 180.0, wrong: str = "0", in_place_wrong: str = "0") -> str:
    """Return a row of the table at this bus bandwidth in GB/s."""
    time_us = max(12.0, size / rate / 1e3)
    half = f"  {time_us:7.2f}  {rate / 1.75:6.2f}  {rate:6.2f}  {{:>6}}"
    return f"{size:12d}  {size // 4:12d}  {'float':>8}  {'sum':>6}  {'-1':>6}{half.format(wrong)}{half.format(in_place_wrong)}"


def print_start(name: str, gpus: int = 1, columns: str = COLUMNS) -> None:
    """Print all lines before the first row."""
    ranks = int(os.environ.get("FAKE_MPI_RANKS", "1")) * gpus
    print(HEADER.format(name=name, gpus=gpus), end="")
    for rank in range(ranks):
        print(RANK % (rank, os.getpid(), "node001", rank % 8, rank % 8))
    print(columns, end="", flush=True)


def main(
    arguments: list[str],
    rate: float = 180.0,
    wrong_at: int = 0,
    hangs_after: int = 0,
    columns: str = COLUMNS,
    largest: int = 8 << 30,
) -> int:
    """Print a whole table. Return the exit code of the real program: not 0 with wrong values."""
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    name, size, factor = Path(arguments[0]).name, int(options["-b"]), int(options["-f"])
    if options["-e"] != str(8 << 30) or set(options) != {"-b", "-e", "-f", "-n", "-w", "-c", "-g"}:
        print("invalid option", options)
        return 0
    print_start(name, int(options["-g"]), columns)
    in_place = "N/A" if name in ("alltoall_perf", "sendrecv_perf") else "0"
    while size <= largest:
        print(row(size, rate, "7" if size == wrong_at else "0", in_place), flush=True)
        if size == hangs_after:
            time.sleep(1000)
        size *= factor
    print(FOOTER.format(name=name, wrong=1 if wrong_at else 0, verdict="FAILED" if wrong_at else "OK"), end="")
    return 3 if wrong_at else 0
