"""Measures collectives in a network of its own, and counts the bytes that the loopback interface sent meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from longhaul.checks.collective_benchmarks import COLLECTIVES, MeasuredGroup, measure
from longhaul.runtime.process_rank import this_rank
from longhaul.runtime.rendezvous import process_group

BYTES = 2**23


def sent_bytes() -> int:
    """Return what the loopback interface has sent (proc(5), /proc/net/dev)."""
    (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.partition(":")[2].split()[8])


def main() -> None:
    rank = this_rank()
    rows = []
    with process_group(rank, "gloo", 60.0):
        group = MeasuredGroup(rank.rank, rank.world_size, torch.device("cpu"))
        for collective in COLLECTIVES:
            dist.barrier()
            before = sent_bytes()
            row = measure(collective, group, BYTES)
            dist.barrier()
            rows.append({**row, "sent_per_rank": (sent_bytes() - before) / rank.world_size / row["rounds"]})
    if rank.is_main:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
