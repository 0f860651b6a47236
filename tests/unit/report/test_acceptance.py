"""A stage's metrics are compared with their limits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from longhaul.report.acceptance import (
    NO_LIMIT,
    NOT_MEASURED,
    NOT_MET,
    OK,
    AcceptanceRow,
    acceptance_rows,
    bandwidth_row,
)
from longhaul.report.metric_series import STEP_VALUES, Curve

GIB = 2**30


def rows(
    gpus: bool = True,
    data_wait: float | None = 0.02,
    profiles: Any = (),
    mfu: float | None = None,
    planned_steps: int | None = 100,
    **values: list[float],
) -> list[AcceptanceRow]:
    curves = {name: Curve() for name in STEP_VALUES}
    for name, numbers in values.items():
        curves[name] = Curve(list(range(len(numbers))), list(numbers))
    peak = max(values.get("memory_bytes", []), default=None)
    stage: Any = SimpleNamespace(
        name="base",
        metrics=SimpleNamespace(curves=curves),
        summary=SimpleNamespace(peak_memory_bytes=peak, data_wait_share=data_wait, median_mfu=mfu),
        profiles=profiles,
        planned_steps=planned_steps,
    )
    both = [{"memory_bytes": 80 * GIB, "matrix_tflops": 800.0}, {"memory_bytes": 100 * GIB, "matrix_tflops": 750.0}]
    nodes = [{"gpus": both if gpus else []}]
    environment: Any = SimpleNamespace(nodes=nodes)
    return acceptance_rows(stage, environment, 990.0)


def results(**options: Any) -> dict[str, tuple[str, str]]:
    return {row.metric: (row.value, row.result) for row in rows(**options)}


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("GPU utilisation", {"gpu_utilisation": [50.0, 90.0, 95.0]}, ("90 %", OK)),
        ("GPU utilisation", {"gpu_utilisation": [50.0, 60.0, 95.0]}, ("60 %", NOT_MET)),
        ("GPU utilisation", {}, ("–", NOT_MEASURED)),
        ("step time", {"step_time_s": [1.0] * 95 + [9.0] * 4}, ("0 %", OK)),
        ("step time", {"step_time_s": [1.0] * 50 + [1.2] * 49}, ("20 %", NOT_MET)),
        ("step time", {"step_time_s": [1.0] * 19}, ("–", NOT_MEASURED)),
        ("GPU memory", {"memory_bytes": [60.0 * GIB, 72.0 * GIB]}, ("90 %", OK)),
        ("GPU memory", {"memory_bytes": [76.0 * GIB]}, ("95 %", NOT_MET)),
        ("waiting for data", {}, ("2 %", OK)),
    ],
)
def test_metric_is_compared_with_its_limit(metric: str, values: dict[str, Any], expected: tuple[str, str]) -> None:
    assert results(**values)[metric] == expected


def test_a_stage_with_too_few_steps_is_told_how_many_it_has_and_needs() -> None:
    (row,) = [row for row in rows(step_time_s=[1.0] * 12) if row.metric == "step time"]
    assert (row.result, row.limit) == (NOT_MEASURED, "≤ 5 %")
    assert row.to_measure == "train at least 20 steps; 12 have been measured"


@pytest.mark.parametrize(
    ("planned_steps", "example"), [(3, "[1, 3]"), (30, "[26, 30]"), (100_000, "[100, 104]"), (None, "[100, 104]")]
)
def test_the_steps_to_profile_are_steps_of_the_stage(planned_steps: int | None, example: str) -> None:
    found = [row.to_measure for row in rows(planned_steps=planned_steps) if "profile_steps" in row.to_measure]
    assert len(found) == 2 and all(f"such as {example}, on GPUs" in text for text in found)


def test_mfu_has_no_limit() -> None:
    assert results(mfu=0.4)["MFU"] == ("40 %", NO_LIMIT)
    assert results()["MFU"] == ("–", NOT_MEASURED)


def bandwidth(
    ports: list[list[dict[str, Any]]], backend: str = "nccl", hosts: int = 2, ranks_per_node: int = 4
) -> tuple[str, str]:
    """Return value and result: all_reduce reaches 90 GB/s at its largest size. ports: of each node."""
    measured = [
        {"scope": "all", "collective": "all_reduce", "bytes": 2**30, "bus_bandwidth_gbps": 90.0},
        {"scope": "all", "collective": "all_reduce", "bytes": 2**20, "bus_bandwidth_gbps": 30.0},
        {"scope": "all", "collective": "all_gather", "bytes": 2**31, "bus_bandwidth_gbps": 40.0},
        {"scope": "node", "collective": "all_reduce", "bytes": 2**31, "bus_bandwidth_gbps": 350.0},
    ]
    names = [f"n{number}" for number in range(hosts)]
    fabric: Any = SimpleNamespace(
        backend=backend, hosts=names, world_size=hosts * ranks_per_node, results=measured if hosts > 1 else []
    )
    environment: Any = SimpleNamespace(nodes=[{"hardware": {"ports": found}} for found in ports])
    row = bandwidth_row(fabric, environment)
    return row.value, row.result


def ports(*rates: float | None, state: str = "ACTIVE") -> list[dict[str, Any]]:
    return [{"state": state, "rate_gbit_per_s": rate} for rate in rates]


FOUR_OF_200 = [200.0] * 4  # 100 GB/s


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        ([ports(*FOUR_OF_200), ports(*FOUR_OF_200)], {}, ("90 %", OK)),
        ([ports(*FOUR_OF_200, 25.0, None), ports(*FOUR_OF_200)], {}, ("90 %", OK)),
        ([ports(*[400.0] * 4), ports(*[400.0] * 4)], {}, ("45 %", NOT_MET)),
        ([ports(*[400.0] * 8), ports(*FOUR_OF_200)], {"ranks_per_node": 2}, ("180 %", OK)),
        ([ports(*FOUR_OF_200, state="DOWN")], {}, ("–", NOT_MEASURED)),
        ([ports(*FOUR_OF_200)], {"backend": "gloo"}, ("–", NOT_MEASURED)),
        ([ports(*FOUR_OF_200)], {"hosts": 1}, ("–", NOT_MEASURED)),
        ([ports(None)], {}, ("–", NOT_MEASURED)),
        ([], {}, ("–", NOT_MEASURED)),
    ],
    ids=["healthy", "storage port", "half", "two ranks", "ports down", "gloo", "one node", "no rate", "no node"],
)
def test_bandwidth_is_compared_with_the_rates_of_the_ports(
    nodes: list[list[dict[str, Any]]], options: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert bandwidth(nodes, **options) == expected


def test_bandwidth_before_the_checks_is_not_measured() -> None:
    row = bandwidth_row(None, None)
    assert row.result == NOT_MEASURED and "interconnect.limits" in row.to_measure


def test_memory_of_a_cpu_is_not_compared() -> None:
    assert results(gpus=False, memory_bytes=[60.0 * GIB])["GPU memory"] == ("–", NOT_MEASURED)


def test_waiting_for_data_above_the_limit_is_not_met() -> None:
    assert results(data_wait=0.2)["waiting for data"] == ("20 %", NOT_MET)


def profile(communication_s: float, idle_s: float, has_kernels: bool = True) -> dict[str, Any]:
    """Return the profile of steps of 10 s; the rest is matrix products and attention."""
    busy_s = 10.0 - communication_s - idle_s
    covered = {"matrix products": busy_s - 1, "attention": 1.0, "communication": communication_s}
    return {"breakdown": {"has_kernels": has_kernels, "seconds": 10.0, "covered_s": covered, "idle_s": idle_s}}


def test_communication_efficiency_is_that_of_the_worse_rank() -> None:
    assert results(profiles=[profile(1.0, 0.5), profile(0.5, 0.0)])["communication efficiency"] == ("90 %", OK)
    assert results(profiles=[profile(1.0, 0.5), profile(2.0, 0.0)])["communication efficiency"] == ("80 %", NOT_MET)


def test_compute_efficiency_is_the_rate_while_rank_0_computes() -> None:
    """MFU 40 % of 990 TFLOP/s over 80 % of the time is 495 TFLOP/s; the slowest GPU multiplies at 750 TFLOP/s."""
    profiles = [profile(1.0, 1.0), profile(5.0, 1.0)]
    assert results(profiles=profiles, mfu=0.4)["compute efficiency"] == ("66 %", NOT_MET)
    assert results(profiles=profiles, mfu=0.5)["compute efficiency"] == ("82.5 %", OK)


def test_efficiencies_need_a_profile_of_gpus() -> None:
    for found in (results(mfu=0.4), results(mfu=0.4, profiles=[profile(1.0, 1.0, has_kernels=False)])):
        assert found["communication efficiency"] == found["compute efficiency"] == ("–", NOT_MEASURED)
    assert results(profiles=[profile(1.0, 1.0)])["compute efficiency"] == ("–", NOT_MEASURED)  # MFU is unknown
