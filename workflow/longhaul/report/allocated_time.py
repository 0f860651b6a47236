"""Computes the seconds that a job had its allocation, from history.jsonl. An allocation without a recorded end counts until its
last sign of life.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longhaul.report.goodput import ATTEMPT_BEGINS

_ENDS = ("waiting", "failed", "done")


@dataclass(frozen=True)
class _Allocation:
    """One allocation of a job.

    end_s:  None if no end is recorded: the supervisor was killed, or the job runs now
    next_s: begin of the next allocation; infinite if there is none
    """

    begin_s: float
    end_s: float | None
    next_s: float


def allocated_seconds(history: list[dict[str, Any]], signs_of_life_s: Sequence[float], now_s: float | None) -> float:
    """Return the seconds that a job had its allocation, over all allocations.

    history:         events of the supervisor, oldest first
    signs_of_life_s: times at which the trainer wrote a record. They end an allocation that has no recorded end.
    now_s:           the time now, if the job certainly runs now: its last allocation then counts until now
    """
    seen_s = [*(event["time_s"] for event in history), *signs_of_life_s]
    return sum(_end_s(allocation, seen_s, now_s) - allocation.begin_s for allocation in _allocations(history))


def _end_s(allocation: _Allocation, seen_s: Sequence[float], now_s: float | None) -> float:
    begin_s = allocation.begin_s
    if allocation.end_s is not None:
        return max(begin_s, allocation.end_s)
    if now_s is not None and math.isinf(allocation.next_s):
        return max(begin_s, now_s)
    return max((time_s for time_s in seen_s if begin_s <= time_s < allocation.next_s), default=begin_s)


def _allocations(history: list[dict[str, Any]]) -> Iterator[_Allocation]:
    """Yield the allocations. `running` begins one; `restarted` is another attempt in the same allocation."""
    begin_s: float | None = None
    for event in history:
        name, time_s = event["event"], event["time_s"]
        if begin_s is not None and name in _ENDS:
            yield _Allocation(begin_s, time_s, time_s)
            begin_s = None
        elif begin_s is not None and name == "running":
            yield _Allocation(begin_s, None, time_s)
            begin_s = time_s
        elif begin_s is None and name in ATTEMPT_BEGINS:
            begin_s = time_s
    if begin_s is not None:
        yield _Allocation(begin_s, None, math.inf)
