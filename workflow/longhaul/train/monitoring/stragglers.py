"""Detects slow ranks by a timed matrix product and data waits (straggler_threshold, three checks in a row).

In a step every rank takes as long as the slowest, because they meet in its collectives. So each rank times work that needs no
other rank: a fixed matrix product, and how long it waited for its data. The matrices have the sizes of a transformer's, and the
product takes some milliseconds.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from longhaul.train.distributed_context import DistributedContext
from longhaul.train.monitoring.events import EventWriter

_CPU_SIZE, _CPU_PRODUCTS = 512, 4
_GPU_SIZE, _GPU_PRODUCTS = 4096, 32
SLOW_CHECKS = 3
"""A rank is a straggler when it is slow in this many checks in a row; once may be another process of the node."""


@dataclass(frozen=True)
class RankTiming:
    """Seconds of one rank: for the matrix product, and of waiting for data per step."""

    host: str
    compute_s: float
    data_wait_s: float


class StragglerDetector:
    """Compares the timings of the ranks.

    threshold: by which fraction a rank may be slower than the median of the others
    """

    def __init__(self, context: DistributedContext, threshold: float, events: EventWriter) -> None:
        self._context, self._threshold, self._events = context, threshold, events
        self._waits_s: list[float] = []
        self._slow_in_a_row: dict[tuple[int, str], int] = {}

    def record_wait(self, seconds: float) -> None:
        """Record how long a step waited for its data."""
        self._waits_s.append(seconds)

    def check(self, step: int, step_s: float) -> None:
        """Time all ranks; rank 0 reports stragglers. Every rank calls this.

        step_s: duration of a step, against which waiting for data is compared
        """
        if self._context.rank.world_size == 1:
            return
        wait_s = statistics.fmean(self._waits_s) if self._waits_s else 0.0
        self._waits_s.clear()
        own = RankTiming(self._context.rank.host, matrix_product_s(self._context.device), wait_s)
        timings = self._context.gather(own)
        slow = slow_ranks(timings, self._threshold, step_s)
        self._slow_in_a_row = {key: self._slow_in_a_row.get(key, 0) + 1 for key in slow}
        for (rank, what), times in self._slow_in_a_row.items():
            if times == SLOW_CHECKS and self._context.is_main:
                self._report(step, rank, timings[rank].host, what, slow[rank, what])

    def _report(self, step: int, rank: int, host: str, what: str, seconds: tuple[float, float]) -> None:
        own_s, others_s = seconds
        text = f"{own_s * 1e3:.1f} ms, the others' median is {others_s * 1e3:.1f} ms"
        print(f"straggler at step {step}: rank {rank} on {host}: {what} takes {text}", flush=True)
        self._events.write(
            "straggler", step=step, rank=rank, host=host, what=what, seconds=own_s, others_median_s=others_s
        )


def slow_ranks(
    timings: list[RankTiming], threshold: float, step_s: float
) -> dict[tuple[int, str], tuple[float, float]]:
    """Return (rank, "compute" | "reading data") -> (its seconds, the others' median) of the ranks that are too slow.

    Computing is too slow by more than `threshold` of the others' median, waiting for data by more than `threshold` of a step.
    """
    slow = {}
    for rank, timing in enumerate(timings):
        others = [other for index, other in enumerate(timings) if index != rank]
        compute_s = statistics.median(other.compute_s for other in others)
        if timing.compute_s > (1 + threshold) * compute_s:
            slow[rank, "compute"] = (timing.compute_s, compute_s)
        wait_s = statistics.median(other.data_wait_s for other in others)
        if timing.data_wait_s > wait_s + threshold * step_s:
            slow[rank, "reading data"] = (timing.data_wait_s, wait_s)
    return slow


def matrix_product_s(device: torch.device) -> float:
    """Return the seconds of a fixed number of products of two square matrices on `device`."""
    on_gpu = device.type == "cuda"
    size, products = (_GPU_SIZE, _GPU_PRODUCTS) if on_gpu else (_CPU_SIZE, _CPU_PRODUCTS)
    matrix = torch.full((size, size), 0.5, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device)
    torch.mm(matrix, matrix)  # the first call loads kernels
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(products):
        torch.mm(matrix, matrix)
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
