"""Measures collectives in a network of its own; meanwhile counts the bytes that the loopback interface sends, and the time of the
timed rounds by a clock of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from longhaul.checks.collective_benchmarks import COLLECTIVES, Collective, MeasuredGroup, Prepared, measure
from longhaul.runtime.process_rank import this_rank
from longhaul.runtime.rendezvous import process_group

BYTES = 2**23
TIMED_BLOCK = 2
"""A block of rounds begins with a barrier: the checked round has none, then come the warm-up and the timed rounds."""


def sent_bytes() -> int:
    """Return what the loopback interface has sent (proc(5), /proc/net/dev)."""
    (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.partition(":")[2].split()[8])


class Clock:
    """Notes when each round of a collective begins and ends, in blocks between barriers."""

    def __init__(self) -> None:
        self.blocks: list[list[tuple[float, float]]] = [[]]

    def timed(self, collective: Collective) -> Collective:
        """Return the collective with a clock around each round."""

        def prepare(group: MeasuredGroup, elements: int) -> Prepared:
            run_once, is_correct = collective.prepare(group, elements)
            return lambda: self._note(run_once), is_correct

        return replace(collective, prepare=prepare)

    def _note(self, run_once: Callable[[], object]) -> None:
        started = time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
        run_once()
        self.blocks[-1].append((started, time.clock_gettime(time.CLOCK_MONOTONIC_RAW)))

    def seconds_per_round(self) -> float:
        """Return the time from the first timed round's begin to the last one's end, by the number of rounds."""
        rounds = self.blocks[TIMED_BLOCK]
        return (rounds[-1][1] - rounds[0][0]) / len(rounds)


def slowest(seconds: float) -> float:
    """Return the largest value of all ranks."""
    values = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.item()


def main() -> None:
    rank = this_rank()
    rows = []
    barrier = dist.barrier
    with process_group(rank, "gloo", 60.0):
        group = MeasuredGroup(rank.rank, rank.world_size, torch.device("cpu"))
        for collective in COLLECTIVES:
            clock = Clock()

            def noted_barrier(*arguments: object, clock: Clock = clock) -> None:
                barrier(*arguments)  # type: ignore[arg-type]
                clock.blocks.append([])

            barrier()
            before = sent_bytes()
            dist.barrier = noted_barrier
            row = measure(clock.timed(collective), group, BYTES)
            dist.barrier = barrier
            barrier()
            counted = {
                "sent_bytes": (sent_bytes() - before) / row["rounds"],
                "seconds": slowest(clock.seconds_per_round()),
            }
            rows.append({**row, **counted})
    if rank.is_main:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
