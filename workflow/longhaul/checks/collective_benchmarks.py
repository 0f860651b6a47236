"""Times all_reduce, all_gather, reduce_scatter and send/recv, and computes bus bandwidth; fabric.py compares it with the limits.

Bandwidths follow NVIDIA/nccl-tests, doc/PERFORMANCE.md. For n ranks, S bytes and t seconds:
algorithm bandwidth = S / t
bus bandwidth       = algorithm bandwidth x 2 (n - 1) / n for all_reduce, x (n - 1) / n for all_gather and reduce_scatter,
                      x 1 for send/recv
S is the buffer of each rank for all_reduce and send/recv. For all_gather and reduce_scatter it is the whole buffer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from longhaul.artifacts.fabric_report import CollectiveResult

_WARMUP_ROUNDS = 3
_FLOAT_BYTES = 4
# The names since torch 2.13, or those of older releases.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


Prepared = tuple[Callable[[], object], Callable[[], bool]]


@dataclass(frozen=True)
class MeasuredGroup:
    """The ranks that measure together. `device` holds their buffers."""

    rank: int
    size: int
    device: torch.device


@dataclass(frozen=True)
class Collective:
    """A collective that can be measured.

    prepare:    (group, elements of fp32) -> (function that runs it once, function that checks its result)
    bus_factor: n ranks -> bus bandwidth divided by algorithm bandwidth
    """

    name: str
    prepare: Callable[[MeasuredGroup, int], Prepared]
    bus_factor: Callable[[int], float]


def measure(collective: Collective, group: MeasuredGroup, size_bytes: int, budget_s: float) -> CollectiveResult:
    """Time one collective at one size on the slowest rank, in as many rounds as fit into `budget_s` seconds.

    Returns {"collective", "bytes", "world_size", "rounds", "time_us", "algorithm_bandwidth_gbps",
    "bus_bandwidth_gbps", "correct"}; GB = 10^9 bytes.
    """
    elements = max(group.size, size_bytes // _FLOAT_BYTES)
    elements -= elements % group.size
    run_once, is_correct = collective.prepare(group, elements)
    first_s = _slowest(group, _seconds(group, run_once, _WARMUP_ROUNDS))
    correct = _all_agree(group, is_correct())
    rounds = int(min(200, max(3, budget_s / max(first_s, 1e-6))))
    seconds = _slowest(group, _seconds(group, run_once, rounds))
    algorithm_gbps = elements * _FLOAT_BYTES / seconds / 1e9
    return {
        "collective": collective.name,
        "bytes": elements * _FLOAT_BYTES,
        "world_size": group.size,
        "rounds": rounds,
        "time_us": round(seconds * 1e6, 1),
        "algorithm_bandwidth_gbps": round(algorithm_gbps, 4),
        "bus_bandwidth_gbps": round(algorithm_gbps * collective.bus_factor(group.size), 4),
        "correct": correct,
    }


def _seconds(group: MeasuredGroup, run_once: Callable[[], object], rounds: int) -> float:
    """Return the mean time of a round on this rank."""
    dist.barrier()
    _synchronise(group)
    started = time.perf_counter()
    for _ in range(rounds):
        run_once()
    _synchronise(group)
    return (time.perf_counter() - started) / rounds


def _synchronise(group: MeasuredGroup) -> None:
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)


def _slowest(group: MeasuredGroup, seconds: float) -> float:
    """Return the largest value of all ranks."""
    value = torch.tensor([seconds], dtype=torch.float64, device=group.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def _all_agree(group: MeasuredGroup, correct: bool) -> bool:
    """Return whether the value is true on all ranks."""
    value = torch.tensor([int(correct)], device=group.device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value.item())


def _all_reduce(group: MeasuredGroup, elements: int) -> Prepared:
    buffer = torch.full((elements,), float(group.rank + 1), device=group.device)
    expected = group.size * (group.size + 1) / 2

    def is_correct() -> bool:
        buffer.fill_(group.rank + 1)
        dist.all_reduce(buffer)
        return bool((buffer == expected).all())

    return lambda: dist.all_reduce(buffer.fill_(1.0)), is_correct


def _all_gather(group: MeasuredGroup, elements: int) -> Prepared:
    part = torch.full((elements // group.size,), float(group.rank + 1), device=group.device)
    whole = torch.empty(elements, device=group.device)

    def is_correct() -> bool:
        parts = whole.view(group.size, -1)
        return all(bool((parts[rank] == rank + 1).all()) for rank in range(group.size))

    return lambda: _all_gather_single(whole, part), is_correct


def _reduce_scatter(group: MeasuredGroup, elements: int) -> Prepared:
    whole = torch.arange(1.0, group.size + 1, device=group.device).repeat_interleave(elements // group.size)
    part = torch.empty(elements // group.size, device=group.device)

    def is_correct() -> bool:
        return bool((part == (group.rank + 1) * group.size).all())

    return lambda: _reduce_scatter_single(part, whole), is_correct


def _send_recv(group: MeasuredGroup, elements: int) -> Prepared:
    """Let every rank send to the next rank of a ring and receive from the one before."""
    outgoing = torch.full((elements,), float(group.rank + 1), device=group.device)
    incoming = torch.empty(elements, device=group.device)
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size

    def run_once() -> None:
        both = [dist.P2POp(dist.isend, outgoing, after), dist.P2POp(dist.irecv, incoming, before)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return run_once, lambda: bool((incoming == before + 1).all())


COLLECTIVES = (
    Collective("all_reduce", _all_reduce, lambda n: 2 * (n - 1) / n),
    Collective("all_gather", _all_gather, lambda n: (n - 1) / n),
    Collective("reduce_scatter", _reduce_scatter, lambda n: (n - 1) / n),
    Collective("send_recv", _send_recv, lambda n: 1.0),
)
