"""Acceptance table of the report: limits for GPU utilisation, spread of step times, GPU memory, and time waiting for data. Each
metric has a written definition and a limit.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from longhaul.artifacts.artifact_schemas import EnvironmentReport
from longhaul.report.number_format import percent
from longhaul.report.run_results import StageResults

OK, NOT_MET, NOT_MEASURED = "ok", "not met", "not measured"
_UTILISATION, _STEP_TIME, _MEMORY, _DATA_WAIT = 0.75, 0.05, 0.9, 0.05
_FEWEST_STEPS = 20


@dataclass(frozen=True)
class AcceptanceRow:
    """One metric of a stage. value and limit are texts."""

    stage: str
    metric: str
    definition: str
    value: str
    limit: str
    result: str


def acceptance_rows(stage: StageResults, environment: EnvironmentReport | None) -> list[AcceptanceRow]:
    """Return the metrics of a stage with their results."""
    curves = stage.metrics.curves
    utilisation = curves["gpu_utilisation"].values

    def row(metric: str, definition: str, value: float | None, sign: str, limit: float) -> AcceptanceRow:
        if value is None:
            return AcceptanceRow(
                stage.name, metric, definition, percent(None), f"{sign} {percent(limit)}", NOT_MEASURED
            )
        is_met = value >= limit if sign == "≥" else value <= limit
        return AcceptanceRow(
            stage.name, metric, definition, percent(value), f"{sign} {percent(limit)}", OK if is_met else NOT_MET
        )

    return [
        row(
            "GPU utilisation",
            "median over the steps of the share of time in which a kernel ran on rank 0's GPU, as NVML counts it",
            statistics.median(utilisation) / 100 if utilisation else None,
            "≥",
            _UTILISATION,
        ),
        row(
            "step time",
            "largest distance of the middle 90 % of step times from their median",
            _step_time_spread(curves["step_time_s"].values),
            "≤",
            _STEP_TIME,
        ),
        row(
            "GPU memory", "peak of PyTorch's allocator on rank 0's GPU", _memory_share(stage, environment), "≤", _MEMORY
        ),
        row(
            "waiting for data",
            "share of the time of all steps in which rank 0 waits for its batch",
            stage.summary.data_wait_share,
            "≤",
            _DATA_WAIT,
        ),
    ]


def _step_time_spread(times: list[float]) -> float | None:
    """Return the largest relative distance of the middle 90 % from the median; None for a few steps only."""
    if len(times) < _FEWEST_STEPS:
        return None
    cuts, median = statistics.quantiles(times, n=20), statistics.median(times)
    return max(median - cuts[0], cuts[-1] - median) / median


def _memory_share(stage: StageResults, environment: EnvironmentReport | None) -> float | None:
    """Return peak memory divided by the smallest GPU's memory; None without GPUs."""
    nodes: list[dict[str, Any]] = [dict(node) for node in environment.nodes] if environment else []
    sizes = [gpu["memory_bytes"] for node in nodes for gpu in node["gpus"]]
    peak = stage.summary.peak_memory_bytes
    return peak / min(sizes) if sizes and peak else None
