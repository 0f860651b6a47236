"""A stage's metrics are read as curves, reduced without losing spikes, and summarised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longhaul.report.metric_series import Curve, MetricSeries, Summary, downsample, read_metrics, summarise


def metrics_of(tmp_path: Path, rows: list[dict[str, object]], rest: str = "") -> MetricSeries:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)
    return read_metrics(tmp_path / "metrics.jsonl")


def test_curves_hold_the_values_of_each_step(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "validation_loss": 5.0},
        {"step": 1, "loss": 4.0, "mfu": 0.3},
        {"step": 2, "loss": float("nan")},
        {"step": 2, "validation_loss": None},
    ]
    found = metrics_of(tmp_path, rows, '[1]\n{"loss": 1}\n{"step": 3, "lo')
    assert found.curves["loss"] == Curve([1, 2], [4.0, None]) and found.curves["loss"].values == [4.0]
    assert found.curves["mfu"] == Curve([1], [0.3]) and not found.curves["lr"]
    assert found.validation == Curve([0, 2], [5.0, None])
    assert (found.steps, found.broken_lines) == (2, 3)


def test_summary_states_medians_and_extremes(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": 0, "validation_loss": 9.0}]
    for step in range(1, 13):
        rows.append(
            {
                "step": step,
                "loss": float(step),
                "tokens_per_s": 100.0 * step,
                "step_time_s": 3.0 if step < 12 else 30.0,
                "data_wait_s": 1.0,
                "memory_bytes": 1000 - step,
                "mfu": 0.01 * step,
            }
        )
    rows += [{"step": 6, "validation_loss": 2.0}, {"step": 12, "validation_loss": 2.5}]
    assert summarise(metrics_of(tmp_path, rows)) == Summary(
        best_validation=2.0,
        best_validation_step=6,
        median_tokens_per_s=650.0,
        median_step_time_s=3.0,
        peak_memory_bytes=999,
        data_wait_share=pytest.approx(12 / 75),
        median_mfu=pytest.approx(0.065),
        training_time_s=75.0,
    )


def test_summary_of_no_metrics_is_empty(tmp_path: Path) -> None:
    assert set(vars(summarise(metrics_of(tmp_path, []))).values()) == {None}


def test_short_curves_stay_as_they_are() -> None:
    curve = Curve([1.0, 2.0, 3.0, 4.0], [1.0, None, 2.0, 3.0])
    assert downsample(curve, 4) is curve


def test_reduced_curves_keep_ends_and_spikes() -> None:
    values: list[float | None] = [float(index % 7) for index in range(1000)]
    values[333], values[334], values[700] = 1000.0, -1000.0, None
    curve = Curve([float(index) for index in range(1000)], values)
    found = downsample(curve, 20)
    assert len(found.x) <= 20 and found.x == sorted(found.x)
    assert (found.x[0], found.x[-1], found.y[0], found.y[-1]) == (0, 999, 0, 999 % 7)
    assert max(found.values) == 1000 and min(found.values) == -1000 and None not in found.y
    assert all(values[int(x)] == y for x, y in zip(found.x, found.y, strict=True))
    assert len(found.x) == 20, "every bucket gives its lowest and its highest point"
