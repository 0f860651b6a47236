"""Acceptance table of the report: GPU utilisation, step times, memory, waiting, efficiencies and MFU of each stage, and the
bandwidth between nodes. Each metric has a written definition, and a limit where one is known.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, cast

from longhaul.artifacts.artifact_schemas import CheckedNode, EnvironmentReport
from longhaul.artifacts.fabric_report import FabricReport
from longhaul.artifacts.line_record_fields import TimeBreakdown
from longhaul.config import acceptance_limits as limits
from longhaul.config.acceptance_limits import communication_efficiency, step_time_spread
from longhaul.report.number_format import percent
from longhaul.report.run_results import StageResults

OK, NOT_MET, NOT_MEASURED, NO_LIMIT = "ok", "not met", "not measured", "no limit"
_BITS_PER_BYTE = 8
_PROFILED, _LAST_PROFILED = 5, 104  # steps of the example for profile_steps: by then, a long training is warm


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
    rows = [_row(stage.name, metric) for metric in _metrics(stage, environment, gpu_peak_tflops)]
    return [*rows, _mfu_row(stage)]


def bandwidth_row(fabric: FabricReport | None, environment: EnvironmentReport | None) -> AcceptanceRow:
    """Return the bandwidth between all nodes of the run, which no single stage measures."""
    return _row(
        "all",
        _Metric(
            "bus bandwidth",
            "bus bandwidth of the largest all_reduce between the nodes in the fabric check, by the sum of the rates of a node's "
            "fastest RDMA ports, at most one per rank; of several nodes, the one with the smallest sum",
            _bandwidth_share(fabric, environment),
            "≥",
            limits.BANDWIDTH,
            "run the fabric check over NCCL on two nodes or more with RDMA ports; elsewhere set interconnect.limits of the site",
        ),
    )


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
    utilisation, step_times = curves["gpu_utilisation"].values, curves["step_time_s"].values
    to_profile = _how_to_profile(stage)
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
            step_time_spread(step_times),
            "≤",
            limits.STEP_TIME_SPREAD,
            f"train at least {limits.FEWEST_STEPS} steps; {len(step_times)} have been measured",
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
            limits.DATA_WAIT,
            "train a step",
        ),
        _Metric(
            "communication efficiency",
            "share of the profiled steps' time in which rank 0 or the last rank, whichever is worse, does not wait for "
            "communication: 1 − time in which a communication kernel runs and no other, by the time of the steps",
            communication_efficiency(profile["breakdown"] for profile in stage.profiles),
            "≥",
            limits.COMMUNICATION_EFFICIENCY,
            f"{to_profile}, on GPUs",
        ),
        _Metric(
            "compute efficiency",
            "rate of the model's FLOPs while rank 0 computes, by the rate of bf16 matrix products that the environment check "
            "measured on the slowest GPU. Rank 0 computes while a kernel other than communication runs in the profiled "
            "steps; the rate is MFU × the datasheet's rate ÷ the share of that time",
            _compute_efficiency(stage, environment, peak_tflops),
            "≥",
            limits.COMPUTE_EFFICIENCY,
            f"{to_profile}, on GPUs; set gpu_peak_tflops in the site file",
        ),
    ]


def _how_to_profile(stage: StageResults) -> str:
    """Return how to profile steps, with an example that the stage's number of steps allows."""
    last = min(_LAST_PROFILED, stage.planned_steps or _LAST_PROFILED)
    return f"set profile_steps of the stage to a range of steps, such as [{max(1, last - _PROFILED + 1)}, {last}]"


def _mfu_row(stage: StageResults) -> AcceptanceRow:
    """Return the MFU beside the compute efficiency. What is healthy depends on model, layout and GPU."""
    value = stage.summary.median_mfu
    definition = "model FLOPs utilisation, median over all steps: the model's FLOPs by the datasheet's rate of the GPUs"
    to_measure = "" if value is not None else "train on GPUs; set gpu_peak_tflops in the site file"
    result = NOT_MEASURED if value is None else NO_LIMIT
    return AcceptanceRow(stage.name, "MFU", definition, percent(value), percent(None), result, to_measure)


def _bandwidth_share(fabric: FabricReport | None, environment: EnvironmentReport | None) -> float | None:
    """Return measured by expected bandwidth; None for one node, over gloo, or where no node lists active ports with a rate."""
    if fabric is None or fabric.backend != "nccl" or len(fabric.hosts) < 2:
        return None
    measured = [row for row in fabric.results if row["scope"] == "all" and row["collective"] == "all_reduce"]
    ranks_per_node = fabric.world_size // len(fabric.hosts)
    expected = [_port_gbps(node, ranks_per_node) for node in (environment.nodes if environment else [])]
    if not measured or not any(expected):
        return None
    return max(measured, key=lambda row: row["bytes"])["bus_bandwidth_gbps"] / min(filter(None, expected))


def _port_gbps(node: CheckedNode, most: int) -> float:
    """Return the summed rate of a node's fastest active ports in GB/s. Slower ones lead to other networks, as to the storage."""
    hardware = cast(dict[str, Any], node).get("hardware")
    ports = hardware.get("ports") if isinstance(hardware, dict) else None
    active = [port for port in ports or [] if isinstance(port, dict) and port.get("state") == "ACTIVE"]
    rates = [rate for port in active if isinstance(rate := port.get("rate_gbit_per_s"), int | float)]
    fastest = [rate for rate in rates if rate == max(rates)]
    return sum(fastest[:most]) / _BITS_PER_BYTE


def _gpu_breakdowns(stage: StageResults) -> list[TimeBreakdown]:
    """Return where the time of profiled steps went, in the order of the ranks; on CPUs, operators hide each other."""
    return [profile["breakdown"] for profile in stage.profiles if profile["breakdown"]["has_kernels"]]


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
