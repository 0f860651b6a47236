"""Acceptance table of the report: limits for GPU utilisation, spread of step times, GPU memory, and time waiting for data. Each
metric has a written definition and a limit.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from longhaul.artifacts.artifact_schemas import EnvironmentReport
from longhaul.artifacts.record_types import TimeBreakdown
from longhaul.config import acceptance_limits as limits
from longhaul.config.acceptance_limits import step_time_spread
from longhaul.report.number_format import percent
from longhaul.report.run_results import StageResults

OK, NOT_MET, NOT_MEASURED = "ok", "not met", "not measured"
_DATA_WAIT, _COMMUNICATION, _COMPUTE = 0.05, 0.85, 0.7
_PROFILE = "set profile_steps of the stage to a range of steps, such as [100, 104]"


@dataclass(frozen=True)
class AcceptanceRow:
    """One metric of a stage. value and limit are texts; to_measure: what to do where it is not measured."""

    stage: str
    metric: str
    definition: str
    value: str
    limit: str
    result: str
    to_measure: str = ""


@dataclass(frozen=True)
class _Metric:
    """A metric and its value. sign: ≥ or ≤, how the value must compare with the limit."""

    name: str
    definition: str
    value: float | None
    sign: str
    limit: float
    to_measure: str


def acceptance_rows(
    stage: StageResults, environment: EnvironmentReport | None, gpu_peak_tflops: float | None = None
) -> list[AcceptanceRow]:
    """Return the metrics of a stage with their results. gpu_peak_tflops: the rate from which MFU is computed."""
    return [_row(stage.name, metric) for metric in _metrics(stage, environment, gpu_peak_tflops)]


def _row(stage: str, metric: _Metric) -> AcceptanceRow:
    limit = f"{metric.sign} {percent(metric.limit)}"
    if metric.value is None:
        return AcceptanceRow(
            stage, metric.name, metric.definition, percent(None), limit, NOT_MEASURED, metric.to_measure
        )
    is_met = metric.value >= metric.limit if metric.sign == "≥" else metric.value <= metric.limit
    result = OK if is_met else NOT_MET
    return AcceptanceRow(stage, metric.name, metric.definition, percent(metric.value), limit, result)


def _metrics(stage: StageResults, environment: EnvironmentReport | None, peak_tflops: float | None) -> list[_Metric]:
    curves = stage.metrics.curves
    utilisation = curves["gpu_utilisation"].values
    return [
        _Metric(
            "GPU utilisation",
            "median over the steps of the share of time in which a kernel ran on rank 0's GPU, as NVML counts it",
            statistics.median(utilisation) / 100 if utilisation else None,
            "≥",
            limits.GPU_UTILISATION,
            "train on NVIDIA GPUs",
        ),
        _Metric(
            "step time",
            "largest distance of the middle 90 % of step times from their median",
            step_time_spread(curves["step_time_s"].values),
            "≤",
            limits.STEP_TIME_SPREAD,
            f"train at least {limits.FEWEST_STEPS} steps",
        ),
        _Metric(
            "GPU memory",
            "peak of PyTorch's allocator on rank 0's GPU",
            _memory_share(stage, environment),
            "≤",
            limits.GPU_MEMORY,
            "train on GPUs",
        ),
        _Metric(
            "waiting for data",
            "share of the time of all steps in which rank 0 waits for its batch",
            stage.summary.data_wait_share,
            "≤",
            _DATA_WAIT,
            "train a step",
        ),
        _Metric(
            "communication efficiency",
            "share of the profiled steps' time in which rank 0 or the last rank, whichever is worse, does not wait for "
            "communication: 1 − time in which a communication kernel runs and no other, by the time of the steps",
            _communication_efficiency(stage),
            "≥",
            _COMMUNICATION,
            f"{_PROFILE}, on GPUs",
        ),
        _Metric(
            "compute efficiency",
            "rate of the model's FLOPs while rank 0 computes, by the rate of bf16 matrix products that the environment check "
            "measured on the slowest GPU. Rank 0 computes while a kernel other than communication runs in the profiled "
            "steps; the rate is MFU × the datasheet's rate ÷ the share of that time",
            _compute_efficiency(stage, environment, peak_tflops),
            "≥",
            _COMPUTE,
            f"{_PROFILE}, on GPUs; set gpu_peak_tflops in the site file",
        ),
    ]


def _gpu_breakdowns(stage: StageResults) -> list[TimeBreakdown]:
    """Return where the time of profiled steps went, in the order of the ranks; on CPUs, operators hide each other."""
    return [profile["breakdown"] for profile in stage.profiles if profile["breakdown"]["has_kernels"]]


def _communication_efficiency(stage: StageResults) -> float | None:
    shares = [1 - found["covered_s"].get("communication", 0.0) / found["seconds"] for found in _gpu_breakdowns(stage)]
    return min(shares, default=None)


def _compute_efficiency(
    stage: StageResults, environment: EnvironmentReport | None, peak_tflops: float | None
) -> float | None:
    """Return achieved by measured rate; None without a profile of rank 0, MFU, or measured matrix products."""
    mfu, breakdowns = stage.summary.median_mfu, _gpu_breakdowns(stage)
    measured = [gpu["matrix_tflops"] for gpu in _gpus(environment) if gpu.get("matrix_tflops")]
    if not (breakdowns and mfu and peak_tflops and measured):
        return None
    first = breakdowns[0]
    computing_s = sum(seconds for name, seconds in first["covered_s"].items() if name != "communication")
    return mfu * peak_tflops / (computing_s / first["seconds"]) / min(measured) if computing_s else None


def _memory_share(stage: StageResults, environment: EnvironmentReport | None) -> float | None:
    """Return peak memory divided by the smallest GPU's memory; None without GPUs."""
    sizes = [gpu["memory_bytes"] for gpu in _gpus(environment)]
    peak = stage.summary.peak_memory_bytes
    return peak / min(sizes) if sizes and peak else None


def _gpus(environment: EnvironmentReport | None) -> list[dict[str, Any]]:
    nodes = environment.nodes if environment else []
    return [gpu for node in nodes for gpu in node["gpus"] if isinstance(gpu, dict)]
