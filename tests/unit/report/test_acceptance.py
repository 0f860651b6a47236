"""A stage's metrics are compared with their limits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from longhaul.report.acceptance import NOT_MEASURED, NOT_MET, OK, acceptance_rows
from longhaul.report.metric_series import STEP_VALUES, Curve

GIB = 2**30


def results(gpus: bool = True, data_wait: float | None = 0.02, **values: list[float]) -> dict[str, tuple[str, str]]:
    curves = {name: Curve() for name in STEP_VALUES}
    for name, numbers in values.items():
        curves[name] = Curve(list(range(len(numbers))), list(numbers))
    peak = max(values.get("memory_bytes", []), default=None)
    stage: Any = SimpleNamespace(
        name="base",
        metrics=SimpleNamespace(curves=curves),
        summary=SimpleNamespace(peak_memory_bytes=peak, data_wait_share=data_wait),
    )
    nodes = [{"gpus": [{"memory_bytes": 80 * GIB}, {"memory_bytes": 100 * GIB}] if gpus else []}]
    environment: Any = SimpleNamespace(nodes=nodes)
    return {row.metric: (row.value, row.result) for row in acceptance_rows(stage, environment)}


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
def test_metric_is_compared_with_its_limit(
    metric: str, values: dict[str, list[float]], expected: tuple[str, str]
) -> None:
    assert results(**values)[metric] == expected


def test_memory_of_a_cpu_is_not_compared() -> None:
    assert results(gpus=False, memory_bytes=[60.0 * GIB])["GPU memory"] == ("–", NOT_MEASURED)


def test_waiting_for_data_above_the_limit_is_not_met() -> None:
    assert results(data_wait=0.2)["waiting for data"] == ("20 %", NOT_MET)
