"""Adds up the time in a trace of profile_steps.py: classes of kernels, idle gaps, exposed communication, longest kernels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from longhaul.artifacts.line_record_fields import GapRecord, KernelRecord, TimeBreakdown
from longhaul.train.monitoring.kernel_classes import CLASSES, COMMUNICATION, COPY, kernel_class, operator_class

_DEVICE_CATEGORIES = {"kernel": kernel_class, "gpu_memcpy": lambda _name: COPY, "gpu_memset": lambda _name: COPY}
_OPERATORS = ("cpu_op",)
_STEP = "ProfilerStep#"
_LISTED_KERNELS, _LISTED_GAPS = 20, 10
_MICROSECOND = 1e-6


@dataclass(frozen=True)
class Interval:
    """A time in which a kernel, or an operator apart from those that it calls, runs; in seconds."""

    begin_s: float
    end_s: float
    name: str
    kind: str


def trace_breakdown(events: list[dict[str, Any]]) -> TimeBreakdown:
    """Return the breakdown of the profiled steps.

    events: "traceEvents" of a Chrome trace that torch.profiler wrote. Kernels count where it has any, else operators of the CPU.

    Raises:
        ValueError: the trace holds no step.
    """
    steps = [event for event in events if event.get("ph") == "X" and str(event.get("name", "")).startswith(_STEP)]
    if not steps:
        raise ValueError("the trace holds no step of the profiler")
    begin_s = min(event["ts"] for event in steps) * _MICROSECOND
    end_s = max(event["ts"] + event["dur"] for event in steps) * _MICROSECOND
    on_device = list(_device_intervals(events))
    intervals = on_device or list(_operator_intervals(events))
    inside = [found for interval in intervals if (found := _clipped(interval, begin_s, end_s)).end_s > found.begin_s]
    counted = _DEVICE_CATEGORIES if on_device else _OPERATORS
    calls = Counter(str(event["name"]) for event in events if event.get("cat") in counted)
    covered = _covered_s(inside)
    seconds_of: defaultdict[str, float] = defaultdict(float)
    for interval in inside:
        seconds_of[interval.kind] += interval.end_s - interval.begin_s
    return TimeBreakdown(
        has_kernels=bool(on_device),
        seconds=end_s - begin_s,
        covered_s={kind: covered[kind] for kind in CLASSES},
        idle_s=max(0.0, end_s - begin_s - sum(covered.values())),
        communication_s=seconds_of[COMMUNICATION],
        gaps=_largest_gaps(inside, begin_s, end_s),
        kernels=_longest_kernels(inside, calls),
    )


def _device_intervals(events: Iterable[dict[str, Any]]) -> Iterator[Interval]:
    class_of: dict[str, Callable[[str], str]] = {cat: cache(function) for cat, function in _DEVICE_CATEGORIES.items()}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in class_of:
            begin_s, name = event["ts"] * _MICROSECOND, str(event["name"])
            yield Interval(begin_s, begin_s + event["dur"] * _MICROSECOND, name, class_of[event["cat"]](name))


def _operator_intervals(events: Iterable[dict[str, Any]]) -> Iterator[Interval]:
    """Yield the times of each thread's innermost operators."""
    threads: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in _OPERATORS:
            begin_s = event["ts"] * _MICROSECOND
            threads[event["pid"], event["tid"]].append((begin_s, begin_s + event["dur"] * _MICROSECOND, event["name"]))
    class_of = cache(operator_class)
    for operators in threads.values():
        for begin_s, end_s, name in _innermost(sorted(operators, key=lambda found: (found[0], -found[1]))):
            yield Interval(begin_s, end_s, name, class_of(name))


def _innermost(operators: Iterable[tuple[float, float, str]]) -> Iterator[tuple[float, float, str]]:
    """Yield (begin, end, name) of the parts of nested calls in which no inner call runs; callers come before what they call."""
    stack: list[tuple[float, str]] = []
    now = 0.0
    for begin_s, end_s, name in operators:
        while stack and stack[-1][0] <= begin_s:
            outer_end_s, outer = stack.pop()
            yield now, outer_end_s, outer
            now = max(now, outer_end_s)
        if stack:
            yield now, begin_s, stack[-1][1]
        stack.append((end_s, name))
        now = begin_s
    while stack:
        outer_end_s, outer = stack.pop()
        yield now, outer_end_s, outer
        now = max(now, outer_end_s)


def _clipped(interval: Interval, begin_s: float, end_s: float) -> Interval:
    return Interval(max(interval.begin_s, begin_s), min(interval.end_s, end_s), interval.name, interval.kind)


def _covered_s(intervals: list[Interval]) -> dict[str, float]:
    """Return the seconds that each class covers; a moment counts once, for the first class of CLASSES that is running."""
    changes = [(interval.begin_s, 1, interval.kind) for interval in intervals]
    changes += [(interval.end_s, -1, interval.kind) for interval in intervals]
    running, before_s = Counter[str](), 0.0
    covered: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    for now_s, change, kind in sorted(changes):
        if first := next((found for found in CLASSES if running[found]), None):
            covered[first] += now_s - before_s
        running[kind] += change
        before_s = now_s
    return covered


def _largest_gaps(intervals: list[Interval], begin_s: float, end_s: float) -> list[GapRecord]:
    """Return the longest times in which nothing runs, with what ran before and after them."""
    gaps: list[GapRecord] = []
    busy_until_s, last = begin_s, "the first step begins"
    ending = Interval(end_s, end_s, "the last step ends", "")
    for interval in [*sorted(intervals, key=lambda found: found.begin_s), ending]:
        if interval.begin_s > busy_until_s:
            gaps.append(GapRecord(seconds=interval.begin_s - busy_until_s, after=last, before=interval.name))
        if interval.end_s >= busy_until_s:
            busy_until_s, last = interval.end_s, interval.name
    return sorted(gaps, key=lambda gap: -gap["seconds"])[:_LISTED_GAPS]


def _longest_kernels(intervals: list[Interval], calls: Counter[str]) -> list[KernelRecord]:
    """Return the kernels with the most time in all, with their number of calls."""
    seconds: defaultdict[str, float] = defaultdict(float)
    kinds = {interval.name: interval.kind for interval in intervals}
    for interval in intervals:
        seconds[interval.name] += interval.end_s - interval.begin_s
    return [
        KernelRecord(name=name, kind=kinds[name], calls=calls[name], seconds=total)
        for name, total in sorted(seconds.items(), key=lambda entry: -entry[1])[:_LISTED_KERNELS]
    ]
