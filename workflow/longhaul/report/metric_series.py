"""Reads metrics.jsonl as curves (at most 2,000 points), and computes medians, best and last losses for the report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from longhaul.artifacts.line_record_fields import MetricsRow
from longhaul.artifacts.line_records import read_lines
from longhaul.report.number_format import finite

MAX_POINTS = 2000
STEP_VALUES = (
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_s",
    "step_time_s",
    "data_wait_s",
    "memory_bytes",
    "mfu",
    "gpu_utilisation",
)


@dataclass(frozen=True)
class Curve:
    """Values `y` over steps `x`; both have the same length. y is None where a value is not finite."""

    x: list[float] = field(default_factory=list)
    y: list[float | None] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(value is not None for value in self.y)

    @property
    def values(self) -> list[float]:
        """Return the finite values."""
        return [value for value in self.y if value is not None]


@dataclass(frozen=True)
class MetricSeries:
    """All points of a stage: one curve per name in STEP_VALUES, and the validation loss."""

    curves: dict[str, Curve]
    validation: Curve
    steps: int  # number of lines about training steps
    broken_lines: int  # lines that are no valid records, such as the last line of a killed process


def read_metrics(path: Path) -> MetricSeries:
    """Read metrics.jsonl line by line. Broken lines are counted and skipped."""
    curves = {name: Curve() for name in STEP_VALUES}
    validation = Curve()
    steps = broken = 0
    for line in read_lines(path, MetricsRow):
        row: Any = line.record
        if row is None:
            broken += 1
        elif "validation_loss" in row:
            _append(validation, row["step"], row["validation_loss"])
        else:
            steps += 1
            for name, curve in curves.items():
                if name in row:
                    _append(curve, row["step"], row[name])
    return MetricSeries(curves, validation, steps, broken)


def _append(curve: Curve, step: float, value: Any) -> None:
    curve.x.append(step)
    curve.y.append(finite(value))


def downsample(curve: Curve, limit: int = MAX_POINTS) -> Curve:
    """Return at most `limit` (>= 4) points: the first, the last, and the lowest and highest of equal buckets.

    Both extremes are kept because a stride or a mean would hide spikes. Gaps (None) are dropped from a curve that is reduced.
    """
    if len(curve.x) <= limit:
        return curve
    inner = [point for point in list(zip(curve.x, curve.y, strict=True))[1:-1] if point[1] is not None]
    buckets = (limit - 2) // 2
    edges = [round(index * len(inner) / buckets) for index in range(buckets + 1)]
    kept = [(curve.x[0], curve.y[0])]
    for start, stop in pairwise(edges):
        kept += _extremes(inner[start:stop])
    kept.append((curve.x[-1], curve.y[-1]))
    return Curve([x for x, _ in kept], [y for _, y in kept])


def _extremes(points: Sequence[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """Return the lowest and the highest point, in the order of x."""
    if not points:
        return []
    return sorted({min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])})


@dataclass(frozen=True)
class Summary:
    """A stage in numbers, over all its steps; None where the metrics do not contain the value. Times are in seconds, shares are
    fractions of 1. First and last losses are in Progress of run_status.py, for status and report alike.
    """

    best_validation: float | None
    best_validation_step: int | None
    median_tokens_per_s: float | None
    median_step_time_s: float | None
    peak_memory_bytes: float | None
    data_wait_share: float | None
    median_mfu: float | None
    training_time_s: float | None


def summarise(metrics: MetricSeries) -> Summary:
    """Return a stage's summary. Medians are used because the first steps of an attempt also fill caches and build kernels."""
    validation = [(x, y) for x, y in zip(metrics.validation.x, metrics.validation.y, strict=True) if y is not None]
    best = min(validation, key=lambda point: point[1], default=None)
    step_times, waits = metrics.curves["step_time_s"].values, metrics.curves["data_wait_s"].values
    busy_s = sum(step_times) + sum(waits)
    return Summary(
        best_validation=best[1] if best else None,
        best_validation_step=int(best[0]) if best else None,
        median_tokens_per_s=_median(metrics.curves["tokens_per_s"].values),
        median_step_time_s=_median(step_times),
        peak_memory_bytes=max(metrics.curves["memory_bytes"].values, default=None),
        data_wait_share=sum(waits) / busy_s if waits and busy_s else None,
        median_mfu=_median(metrics.curves["mfu"].values),
        training_time_s=busy_s or None,
    )


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
