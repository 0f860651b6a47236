"""The collectives that training uses, timed and checked; bandwidths by nccl-tests' formulas.

Source: NVIDIA/nccl-tests, doc/PERFORMANCE.md. n ranks, S bytes, t seconds:
algorithm bandwidth = S / t; bus bandwidth = that x 2 (n - 1) / n for all_reduce, x (n - 1) / n for all_gather and
reduce_scatter, x 1 for send/recv. S is each rank's buffer for all_reduce and send/recv, and the whole (gathered, or to be
scattered) buffer for the other two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

_WARMUP_ROUNDS = 3
_FLOAT_BYTES = 4
# torch 2.13's names; releases before it know only the older ones.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Group:
    """The ranks that measure together; device is what their buffers lie on."""

    rank: int
    size: int
    device: torch.device


@dataclass(frozen=True)
class Collective:
    """A measurable collective: `prepare(group, elements)` gives a function that runs it once, and one that checks it.

    bus_factor(n): bus bandwidth over algorithm bandwidth for n ranks.
    """

    name: str
    prepare: Callable[[Group, int], tuple[Callable[[], object], Callable[[], bool]]]
    bus_factor: Callable[[int], float]


def measure(collective: Collective, group: Group, size_bytes: int, budget_s: float) -> dict:
    """Times one collective at one size, as the slowest rank sees it, over as many rounds as fit `budget_s`.

    Returns {"collective", "bytes", "world_size", "rounds", "time_us", "algorithm_bandwidth_gbps",
    "bus_bandwidth_gbps", "correct"}; GB = 10^9 bytes.
    """
    elements = max(group.size, size_bytes // _FLOAT_BYTES)
    elements -= elements % group.size
    once, is_correct = collective.prepare(group, elements)
    first_s = _slowest(group, _seconds(group, once, _WARMUP_ROUNDS))
    correct = _all_agree(group, is_correct())
    rounds = int(min(200, max(3, budget_s / max(first_s, 1e-6))))
    seconds = _slowest(group, _seconds(group, once, rounds))
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


def _seconds(group: Group, once: Callable[[], object], rounds: int) -> float:
    """Mean time of a round."""
    dist.barrier()
    _synchronise(group)
    started = time.perf_counter()
    for _ in range(rounds):
        once()
    _synchronise(group)
    return (time.perf_counter() - started) / rounds


def _synchronise(group: Group) -> None:
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)


def _slowest(group: Group, seconds: float) -> float:
    value = torch.tensor([seconds], dtype=torch.float64, device=group.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def _all_agree(group: Group, correct: bool) -> bool:
    value = torch.tensor([int(correct)], device=group.device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value.item())


def _all_reduce(group: Group, elements: int):
    buffer = torch.full((elements,), float(group.rank + 1), device=group.device)
    expected = group.size * (group.size + 1) / 2

    def is_correct() -> bool:
        buffer.fill_(group.rank + 1)
        dist.all_reduce(buffer)
        return bool((buffer == expected).all())

    return lambda: dist.all_reduce(buffer.fill_(1.0)), is_correct


def _all_gather(group: Group, elements: int):
    part = torch.full((elements // group.size,), float(group.rank + 1), device=group.device)
    whole = torch.empty(elements, device=group.device)

    def is_correct() -> bool:
        parts = whole.view(group.size, -1)
        return all(bool((parts[rank] == rank + 1).all()) for rank in range(group.size))

    return lambda: _all_gather_single(whole, part), is_correct


def _reduce_scatter(group: Group, elements: int):
    whole = torch.arange(1.0, group.size + 1, device=group.device).repeat_interleave(elements // group.size)
    part = torch.empty(elements // group.size, device=group.device)

    def is_correct() -> bool:
        return bool((part == (group.rank + 1) * group.size).all())

    return lambda: _reduce_scatter_single(part, whole), is_correct


def _send_recv(group: Group, elements: int):
    """Every rank sends to the next one in a ring and receives from the one before."""
    outgoing = torch.full((elements,), float(group.rank + 1), device=group.device)
    incoming = torch.empty(elements, device=group.device)
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size

    def once() -> None:
        both = [dist.P2POp(dist.isend, outgoing, after), dist.P2POp(dist.irecv, incoming, before)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return once, lambda: bool((incoming == before + 1).all())


COLLECTIVES = (
    Collective("all_reduce", _all_reduce, lambda n: 2 * (n - 1) / n),
    Collective("all_gather", _all_gather, lambda n: (n - 1) / n),
    Collective("reduce_scatter", _reduce_scatter, lambda n: (n - 1) / n),
    Collective("send_recv", _send_recv, lambda n: 1.0),
)
