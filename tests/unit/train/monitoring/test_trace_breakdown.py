"""The breakdown of a trace, for traces whose times can be added up by hand. Times in microseconds."""

from __future__ import annotations

from typing import Any

import pytest

from longhaul.train.monitoring.kernel_classes import ATTENTION, COMMUNICATION, COPY, ELEMENTWISE, MATRIX
from longhaul.train.monitoring.trace_breakdown import trace_breakdown


def event(cat: str, name: str, ts: float, dur: float, tid: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": tid}


STEPS = [
    event("user_annotation", "ProfilerStep#1", 1000.0, 50.0),
    event("user_annotation", "ProfilerStep#2", 1050.0, 50.0),
]
GPU = [
    *STEPS,
    event("cpu_op", "aten::mm", 1000.0, 90.0),
    event("kernel", "nvjet_before_the_window", 900.0, 105.0),  # 5 inside
    event("kernel", "nvjet_a", 1010.0, 20.0),
    event("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 1020.0, 30.0, tid=20),  # 10 hidden, 20 exposed
    event("kernel", "flash_fwd_kernel", 1060.0, 10.0),
    event("kernel", "vectorized_elementwise_kernel", 1070.0, 4.0),
    event("kernel", "vectorized_elementwise_kernel", 1074.0, 6.0),
    event("gpu_memcpy", "Memcpy HtoD", 1078.0, 4.0, tid=21),  # 2 at the same time as the kernel before
    event("kernel", "nvjet_after_the_window", 1099.0, 100.0),  # 1 inside
    {"ph": "M", "name": "process_name", "pid": 0},
]


def micro(values: dict[str, float]) -> dict[str, float]:
    return {name: round(1e6 * seconds, 3) for name, seconds in values.items() if seconds}


def test_every_moment_of_the_steps_counts_once():
    found = trace_breakdown(GPU)
    assert found["has_kernels"] and found["seconds"] == pytest.approx(100e-6)
    assert micro(found["covered_s"]) == {
        MATRIX: 26.0,
        COMMUNICATION: 20.0,
        ATTENTION: 10.0,
        ELEMENTWISE: 10.0,
        COPY: 2.0,
    }
    assert found["idle_s"] == pytest.approx(32e-6)
    assert found["communication_s"] == pytest.approx(30e-6)


def test_gaps_are_named_by_their_neighbours():
    first, second, third = trace_breakdown(GPU)["gaps"]
    assert (round(first["seconds"] * 1e6), first["after"], first["before"]) == (
        17,
        "Memcpy HtoD",
        "nvjet_after_the_window",
    )
    assert (round(second["seconds"] * 1e6), second["before"]) == (10, "flash_fwd_kernel")
    assert second["after"].startswith("ncclDevKernel")
    assert (round(third["seconds"] * 1e6), third["after"]) == (5, "nvjet_before_the_window")


def test_kernels_are_listed_by_their_time():
    kernels = trace_breakdown(GPU)["kernels"]
    assert [kernel["name"] for kernel in kernels[:2]] == ["ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "nvjet_a"]
    (elementwise,) = (kernel for kernel in kernels if kernel["kind"] == ELEMENTWISE)
    assert elementwise["calls"] == 2 and elementwise["seconds"] == pytest.approx(10e-6)


def test_on_a_cpu_the_innermost_operator_counts():
    operators = [
        *STEPS,
        event("cpu_op", "aten::linear", 1000.0, 40.0),  # 10 of its own
        event("cpu_op", "aten::addmm", 1005.0, 30.0),  # 20 of its own
        event("cpu_op", "aten::copy_", 1010.0, 10.0),
        event("cpu_op", "aten::mul", 1060.0, 30.0),
        event("cpu_op", "c10d::allreduce_", 1080.0, 20.0, tid=8),  # 10 behind aten::mul
    ]
    found = trace_breakdown(operators)
    assert not found["has_kernels"]
    assert micro(found["covered_s"]) == {MATRIX: 30.0, COPY: 10.0, ELEMENTWISE: 30.0, COMMUNICATION: 10.0}
    assert found["idle_s"] == pytest.approx(20e-6)
    assert {kernel["name"]: kernel["calls"] for kernel in found["kernels"]}["aten::linear"] == 1


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="no step"):
        trace_breakdown([event("kernel", "nvjet", 0.0, 1.0)])
