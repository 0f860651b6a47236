"""Computes the GPU-hours that stages and other jobs have used, from their allocations in history.jsonl.

An allocation without a recorded end counts until its last sign of life: the time in the last record that its trainer wrote.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Count
from longhaul.artifacts.line_record_fields import Event, MetricsRow, read_events
from longhaul.artifacts.line_records import read_last_records
from longhaul.artifacts.paths import JobFolder, WeightsFolder
from longhaul.report.goodput import ATTEMPT_BEGINS

_ENDS = ("waiting", "failed", "done")
_MOST_ATTEMPTS = 1000


class _Attempt(TypedDict):
    """Keys of a line in attempts.jsonl that are read here."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    device: str
    time: NotRequired[str]
    world_size: NotRequired[Count]


@dataclass(frozen=True)
class _Allocation:
    """One allocation of a job.

    end_s:  None if no end is recorded: the supervisor was killed, or the job runs now
    next_s: begin of the next allocation; infinite if there is none
    """

    begin_s: float
    end_s: float | None
    next_s: float


@dataclass(frozen=True)
class Timespan:
    """Begin and end in seconds since 1970."""

    begin_s: float
    end_s: float

    @property
    def hours(self) -> float:
        return (self.end_s - self.begin_s) / 3600


def used_gpu_hours(
    stage: JobFolder,
    weights: WeightsFolder | None,
    signs_of_life_s: Sequence[float],
    planned_gpus: int,
    now_s: float | None,
) -> float | None:
    """Return GPUs × hours over all allocations of a stage; None without GPUs, or before the first attempt.

    weights:         the weights folder of the last attempt
    planned_gpus:    counts for an allocation without an attempt
    signs_of_life_s: as in `allocated_timespans`; now_s: too
    """
    attempts = read_last_records(weights.attempts, _Attempt, _MOST_ATTEMPTS) if weights else []
    if weights is None or all(attempt["device"] == "cpu" for attempt in attempts):
        return None
    spans = allocated_timespans(read_events(stage.history), signs_of_life_s, now_s)
    return sum(span.hours * (_gpus_in(span, attempts) or planned_gpus) for span in spans)


def signs_of_life(events: list[Event], last_rows: list[MetricsRow]) -> list[float]:
    """Return when a trainer wrote its events, the last lines of its metrics, and the last lines that a resume removed."""
    written_s = [event["time_s"] for event in events]
    removed_s = [event["last_step_s"] for event in events if "last_step_s" in event]
    return [*written_s, *removed_s, *(row["time_s"] for row in last_rows if "time_s" in row)]


def requested_gpu_hours(job: JobFolder, request: Mapping[str, str], now_s: float | None) -> float:
    """Return requested GPUs × hours over all allocations of a job that is no training; 0 for a job without GPUs.

    request: sbatch's options in plan.json
    now_s:   as in `allocated_timespans`
    """
    gpus = _requested_gpus(request)
    spans = allocated_timespans(read_events(job.history), [], now_s) if gpus else []
    return sum(span.hours for span in spans) * gpus


def _requested_gpus(request: Mapping[str, str]) -> int:
    """Return the GPUs of all nodes: of --gpus-per-node=[type:]4, or of --gres=gpu:[type:]4[,…]."""
    resources = f"gpu:{request['--gpus-per-node']}" if "--gpus-per-node" in request else request.get("--gres", "")
    per_node = re.match(r"gpu:(?:[^:,]+:)?(\d+)(?:,|$)", resources)
    nodes = request.get("--nodes", "1")
    return int(per_node[1]) * int(nodes) if per_node and nodes.isdecimal() else 0


def _gpus_in(span: Timespan, attempts: list[_Attempt]) -> int | None:
    """Return the number of GPUs in an allocation; None if it had no attempt. Another one may train on more or fewer nodes."""
    begun = [attempt for attempt in attempts if span.begin_s - 1 <= _epoch_s(attempt.get("time", "")) <= span.end_s]
    return begun[-1].get("world_size") if begun else None


def _epoch_s(time_of_attempt: str) -> float:
    """Return the time of an attempt, which is cut to whole seconds; NaN if it is missing or invalid."""
    try:
        return datetime.fromisoformat(time_of_attempt).timestamp()
    except (ValueError, OverflowError):
        return math.nan


def allocated_timespans(
    history: list[dict[str, Any]], signs_of_life_s: Sequence[float], now_s: float | None
) -> list[Timespan]:
    """Return when a job had its allocations.

    history:         events of the supervisor, oldest first
    signs_of_life_s: times at which the trainer wrote a record. They end an allocation that has no recorded end.
    now_s:           the time now, if the job certainly runs now: its last allocation then counts until now
    """
    seen_s = [*(event["time_s"] for event in history), *signs_of_life_s]
    return [Timespan(each.begin_s, _end_s(each, seen_s, now_s)) for each in _allocations(history)]


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
