"""Times collectives and send/recv at growing sizes, and computes bus bandwidth; fabric.py compares it with the limits.

Bandwidths follow NVIDIA/nccl-tests, doc/PERFORMANCE.md. For n ranks, S bytes and t seconds:
algorithm bandwidth = S / t
bus bandwidth       = algorithm bandwidth x 2 (n - 1) / n for all_reduce,
                      x (n - 1) / n for all_gather, reduce_scatter and all_to_all, x 1 for broadcast and send/recv
S is the buffer of each rank for all_reduce, all_to_all, broadcast and send/recv. For all_gather and reduce_scatter it is the
whole buffer.
"""

from __future__ import annotations

import math
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from longhaul.artifacts.fabric_report import CollectiveResult
from longhaul.checks.hung_steps import COLLECTIVES_OF_RANKS
from longhaul.checks.pair_tournament import BrokenLinkError
from longhaul.checks.run_parts_in_child import announce
from longhaul.errors import first_line

_CHECKED_ROUNDS, _WARMUP_ROUNDS, _FEWEST_ROUNDS, _FEWEST_SINGLE_ROUNDS = 1, 3, 3, 5
_MOST_ROUNDS, _MOST_SINGLE_ROUNDS = 200, 100
"""The 99th percentile of 100 rounds is the second largest."""
_ROUNDS_S, _SINGLE_ROUNDS_S = 0.2, 0.05
"""Durations of the rounds in a row, and of those that are timed one by one, of one collective at one size."""
_ALWAYS_MEASURED_BYTES = 2**20
"""Up to this size the time hardly depends on the size, so that larger sizes cannot be predicted from it."""
_FLOAT_BYTES = 4
# The names since torch 2.13, or those of older releases.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


Prepared = tuple[Callable[[], object], Callable[[], bool]]


@dataclass(frozen=True)
class MeasuredGroup:
    """The ranks that measure together.

    rank:   this rank's number in the group
    device: of the buffers
    group:  None: all ranks
    scope:  "all", or "node" for the ranks of one node
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    scope: str = "all"


@dataclass(frozen=True)
class Collective:
    """A collective that can be measured.

    prepare:    (group, elements of fp32) -> (function that runs it once, function that checks its result)
    bus_factor: n ranks -> bus bandwidth divided by algorithm bandwidth
    """

    name: str
    prepare: Callable[[MeasuredGroup, int], Prepared]
    bus_factor: Callable[[int], float]


def largest_message(group: MeasuredGroup) -> int:
    """Return the largest message in bytes for which every rank has memory: a rank needs at most two buffers of its size."""
    _announce("free memory of the ranks", group)
    on_gpu = group.device.type == "cuda"
    free = torch.cuda.mem_get_info(group.device)[0] if on_gpu else psutil.virtual_memory().available // group.size
    fewest = torch.tensor([free], device=group.device)
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN, group=group.group)
    return int(fewest.item()) // 3


def _announce(text: str, group: MeasuredGroup) -> None:
    """Tell the process that watches that this step begins."""
    index = group.device.index
    announce(text, [] if index is None else [index], COLLECTIVES_OF_RANKS)


def measure_sizes(
    collective: Collective, group: MeasuredGroup, sizes_bytes: Iterable[int], budget_s: float
) -> Iterator[CollectiveResult]:
    """Measure one collective at growing sizes. Sizes above 1 MiB that would not fit into the time budget are left out."""
    left_s = budget_s
    last: CollectiveResult | None = None
    for size_bytes in sizes_bytes:
        if last and size_bytes <= last["bytes"]:
            continue  # the smallest message that all ranks can share is larger
        if last and size_bytes > _ALWAYS_MEASURED_BYTES and _least_seconds(last, size_bytes) > left_s:
            return
        last = measure(collective, group, size_bytes)
        left_s -= last["time_us"] / 1e6 * last["rounds"]
        yield last


def _least_seconds(last: CollectiveResult, size_bytes: int) -> float:
    """Return how long the fewest rounds at a size take, if the time grows as the size does. It is the same on all ranks."""
    rounds = _CHECKED_ROUNDS + _WARMUP_ROUNDS + _FEWEST_ROUNDS + _FEWEST_SINGLE_ROUNDS
    return last["time_us"] / 1e6 * size_bytes / last["bytes"] * rounds


def measure(collective: Collective, group: MeasuredGroup, size_bytes: int) -> CollectiveResult:
    """Check one round of a collective at one size; then time it on the slowest rank.

    Many rounds in a row give the bandwidth, and rounds one by one the percentiles. GB = 10^9 bytes.

    Raises:
        BrokenLinkError: a rank that takes part has ended, or does not answer.
    """
    where = "all ranks" if group.scope == "all" else "the ranks of this node"
    text = f"{collective.name} of {size_bytes:,} bytes between {where}"
    _announce(text, group)
    try:
        return _measure(collective, group, size_bytes)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of gloo or NCCL
        message = f"rank {dist.get_rank()} on {socket.gethostname()}: {text}: {first_line(error)}"
        raise BrokenLinkError(message, COLLECTIVES_OF_RANKS.remedy) from None


def _measure(collective: Collective, group: MeasuredGroup, size_bytes: int) -> CollectiveResult:
    elements = max(group.size, size_bytes // _FLOAT_BYTES)
    elements -= elements % group.size
    run_once, is_correct = collective.prepare(group, elements)
    run_once()
    correct = _all_agree(group, is_correct())
    first_s = _slowest(group, [_seconds(group, run_once, _WARMUP_ROUNDS)])[0]
    rounds = int(min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, _ROUNDS_S / max(first_s, 1e-6))))
    seconds = _slowest(group, [_seconds(group, run_once, rounds)])[0]
    single_rounds = int(min(_MOST_SINGLE_ROUNDS, max(_FEWEST_SINGLE_ROUNDS, _SINGLE_ROUNDS_S / max(first_s, 1e-6))))
    single_s = _slowest(group, [_seconds(group, run_once, 1) for _ in range(single_rounds)])
    single_us = sorted(round(seconds * 1e6, 1) for seconds in single_s)
    algorithm_gbps = elements * _FLOAT_BYTES / seconds / 1e9
    return {
        "collective": collective.name,
        "scope": group.scope,
        "bytes": elements * _FLOAT_BYTES,
        "world_size": group.size,
        "rounds": _CHECKED_ROUNDS + _WARMUP_ROUNDS + rounds + single_rounds,
        "time_us": round(seconds * 1e6, 1),
        "median_us": round(statistics.median(single_us), 1),
        "p95_us": _percentile(single_us, 95),
        "p99_us": _percentile(single_us, 99),
        "min_us": single_us[0],
        "max_us": single_us[-1],
        "algorithm_bandwidth_gbps": round(algorithm_gbps, 4),
        "bus_bandwidth_gbps": round(algorithm_gbps * collective.bus_factor(group.size), 4),
        "correct": correct,
    }


def _percentile(ascending: Sequence[float], percent: int) -> float:
    """Return the percentile by the nearest rank."""
    return ascending[math.ceil(percent * len(ascending) / 100) - 1]


def _seconds(group: MeasuredGroup, run_once: Callable[[], object], rounds: int) -> float:
    """Return the mean time of a round on this rank."""
    dist.barrier(group.group)
    _synchronise(group)
    started = time.perf_counter()
    for _ in range(rounds):
        run_once()
    _synchronise(group)
    return (time.perf_counter() - started) / rounds


def _synchronise(group: MeasuredGroup) -> None:
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)


def _slowest(group: MeasuredGroup, seconds: list[float]) -> list[float]:
    """Return of each value the largest of all ranks."""
    values = torch.tensor(seconds, dtype=torch.float64, device=group.device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group.group)
    return values.tolist()


def _all_agree(group: MeasuredGroup, correct: bool) -> bool:
    """Return whether the value is true on all ranks."""
    value = torch.tensor([int(correct)], device=group.device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN, group=group.group)
    return bool(value.item())


def _addend(rank: int) -> float:
    """Return the value of a rank in sums. It is small: fp32 holds no odd number above 2^24, so sums of 1 to n are not exact."""
    return float(rank % 7 + 1)


def _all_reduce(group: MeasuredGroup, elements: int) -> Prepared:
    """Reduce in place. Later rounds add sums to sums, up to infinity: filling the buffer again would be timed, too."""
    buffer = torch.full((elements,), _addend(group.rank), device=group.device)

    def is_correct() -> bool:
        return bool((buffer == sum(map(_addend, range(group.size)))).all())

    return lambda: dist.all_reduce(buffer, group=group.group), is_correct


def _all_gather(group: MeasuredGroup, elements: int) -> Prepared:
    part = torch.full((elements // group.size,), float(group.rank + 1), device=group.device)
    whole = torch.empty(elements, device=group.device)

    def is_correct() -> bool:
        return _holds_part_of_each_rank(group, whole)

    return lambda: _all_gather_single(whole, part, group=group.group), is_correct


def _reduce_scatter(group: MeasuredGroup, elements: int) -> Prepared:
    addends = torch.tensor([_addend(rank) for rank in range(group.size)], device=group.device)
    whole = addends.repeat_interleave(elements // group.size)
    part = torch.empty(elements // group.size, device=group.device)

    def is_correct() -> bool:
        return bool((part == _addend(group.rank) * group.size).all())

    return lambda: _reduce_scatter_single(part, whole, group=group.group), is_correct


def _all_to_all(group: MeasuredGroup, elements: int) -> Prepared:
    outgoing = torch.full((elements,), float(group.rank + 1), device=group.device)
    incoming = torch.empty_like(outgoing)

    def is_correct() -> bool:
        return _holds_part_of_each_rank(group, incoming)

    return lambda: dist.all_to_all_single(incoming, outgoing, group=group.group), is_correct


def _broadcast(group: MeasuredGroup, elements: int) -> Prepared:
    buffer = torch.full((elements,), float(group.rank + 1), device=group.device)
    return lambda: dist.broadcast(buffer, group_src=0, group=group.group), lambda: bool((buffer == 1).all())


def _send_recv(group: MeasuredGroup, elements: int) -> Prepared:
    """Let every rank send to the next rank of a ring and receive from the one before."""
    outgoing = torch.full((elements,), float(group.rank + 1), device=group.device)
    incoming = torch.empty(elements, device=group.device)
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size

    def run_once() -> None:
        both = [
            dist.P2POp(dist.isend, outgoing, group=group.group, group_peer=after),
            dist.P2POp(dist.irecv, incoming, group=group.group, group_peer=before),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return run_once, lambda: bool((incoming == before + 1).all())


def _holds_part_of_each_rank(group: MeasuredGroup, whole: torch.Tensor) -> bool:
    parts = whole.view(group.size, -1)
    return all(bool((parts[rank] == rank + 1).all()) for rank in range(group.size))


COLLECTIVES = (
    Collective("all_reduce", _all_reduce, lambda n: 2 * (n - 1) / n),
    Collective("all_gather", _all_gather, lambda n: (n - 1) / n),
    Collective("reduce_scatter", _reduce_scatter, lambda n: (n - 1) / n),
    Collective("all_to_all", _all_to_all, lambda n: (n - 1) / n),
    Collective("broadcast", _broadcast, lambda n: 1.0),
    Collective("send_recv", _send_recv, lambda n: 1.0),
)
