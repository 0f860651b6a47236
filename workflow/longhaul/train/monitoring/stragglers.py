"""Names a rank that is slower than the others: all wait for it in every step, and nothing else tells which one it is.

In a step every rank takes as long as the slowest, since they meet in its collectives. So each rank times work that needs no
other: a fixed product of matrices, and how long it waited for its data. The sizes are those of a transformer's, small
enough to cost some milliseconds.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from longhaul.train.distributed_context import DistributedContext
from longhaul.train.monitoring.events import Events

_CPU_SIZE, _CPU_PRODUCTS = 512, 4
_GPU_SIZE, _GPU_PRODUCTS = 4096, 32
_LOOKS = 3
"""Slow this many times in a row: once may be another process that passed by."""


@dataclass(frozen=True)
class Pace:
    """One rank's seconds: for the product, and of waiting for data, a step."""

    host: str
    compute_s: float
    data_wait_s: float


class Stragglers:
    """Compares the ranks' paces; `share` is by how much one may be slower than the median of the others."""

    def __init__(self, processes: DistributedContext, share: float, events: Events) -> None:
        self._processes, self._share, self._events = processes, share, events
        self._waits: list[float] = []
        self._slow_in_a_row: dict[tuple[int, str], int] = {}

    def waited(self, seconds: float) -> None:
        """Before a step, for its data."""
        self._waits.append(seconds)

    def look(self, step: int, step_s: float) -> None:
        """A collective: every rank measures, rank 0 tells. step_s: what a step takes, against which waiting is judged."""
        if self._processes.rank.world_size == 1:
            return
        wait_s = statistics.fmean(self._waits) if self._waits else 0.0
        self._waits.clear()
        paces = self._processes.gather(Pace(self._processes.rank.host, product_s(self._processes.device), wait_s))
        slow = slow_ranks(paces, self._share, step_s)
        self._slow_in_a_row = {key: self._slow_in_a_row.get(key, 0) + 1 for key in slow}
        for (rank, what), times in self._slow_in_a_row.items():
            if times == _LOOKS and self._processes.is_main:
                self._tell(step, rank, paces[rank].host, what, slow[rank, what])

    def _tell(self, step: int, rank: int, host: str, what: str, seconds: tuple[float, float]) -> None:
        own_s, others_s = seconds
        text = f"{own_s * 1e3:.1f} ms, the others' median is {others_s * 1e3:.1f} ms"
        print(f"straggler at step {step}: rank {rank} on {host}: {what} takes {text}", flush=True)
        self._events.write(
            "straggler", step=step, rank=rank, host=host, what=what, seconds=own_s, others_median_s=others_s
        )


def slow_ranks(paces: list[Pace], share: float, step_s: float) -> dict[tuple[int, str], tuple[float, float]]:
    """(rank, "compute" | "reading data") -> (its seconds, the others' median) of those too slow by more than `share`."""
    found = {}
    for rank, pace in enumerate(paces):
        others = [other for index, other in enumerate(paces) if index != rank]
        compute_s = statistics.median(other.compute_s for other in others)
        if pace.compute_s > (1 + share) * compute_s:
            found[rank, "compute"] = (pace.compute_s, compute_s)
        wait_s = statistics.median(other.data_wait_s for other in others)
        if pace.data_wait_s > wait_s + share * step_s:
            found[rank, "reading data"] = (pace.data_wait_s, wait_s)
    return found


def product_s(device: torch.device) -> float:
    """Seconds for a fixed number of products of two square matrices on `device`."""
    on_gpu = device.type == "cuda"
    size, products = (_GPU_SIZE, _GPU_PRODUCTS) if on_gpu else (_CPU_SIZE, _CPU_PRODUCTS)
    matrix = torch.full((size, size), 0.5, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device)
    torch.mm(matrix, matrix)  # loads what the first call loads
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(products):
        torch.mm(matrix, matrix)
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
