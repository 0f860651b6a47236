"""Time in allocations is counted once, not beyond the last sign of life of a killed job, by the GPUs that each of them had."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.paths import JobFolder, WeightsFolder
from longhaul.report.stage_records import read_rows
from longhaul.report.used_gpu_hours import allocated_timespans, requested_gpu_hours, signs_of_life, used_gpu_hours


def allocated_seconds(events: list[dict[str, Any]], signs_of_life_s: list[float], now_s: float | None) -> float:
    return sum(span.hours for span in allocated_timespans(events, signs_of_life_s, now_s)) * 3600


def history(*events: tuple[float, str]) -> list[dict[str, Any]]:
    return [{"time_s": time_s, "event": name} for time_s, name in events]


@pytest.mark.parametrize("end", ["waiting", "failed", "done"])
def test_allocations_with_a_recorded_end_count_until_it(end: str) -> None:
    events = history((0.0, "running"), (60.0, "restarted"), (100.0, end), (900.0, "running"), (950.0, "done"))
    assert allocated_seconds(events, [2000.0], None) == pytest.approx(150.0)
    assert allocated_seconds(events, [2000.0], 3000.0) == pytest.approx(150.0)


@pytest.mark.parametrize(
    ("signs_of_life_s", "now_s", "seconds"),
    [
        ([], None, 0.0),
        ([], 25.0, 15.0),
        ([14.0, 18.0, 16.0], None, 8.0),
        ([14.0, 18.0], 25.0, 15.0),
        ([5.0], None, 0.0),
        ([5.0], 5.0, 0.0),
    ],
    ids=["killed at once", "runs now", "killed later", "runs after its last sign", "an earlier sign", "clock behind"],
)
def test_allocation_without_a_recorded_end(signs_of_life_s: list[float], now_s: float | None, seconds: float) -> None:
    assert allocated_seconds(history((10.0, "running")), signs_of_life_s, now_s) == pytest.approx(seconds)


def test_killed_allocation_ends_before_the_next_one_begins() -> None:
    """The days between a node's death and the next start of the job cost nothing."""
    events = history((0.0, "running"), (50.0, "restarted"), (90_000.0, "running"), (90_100.0, "waiting"))
    assert allocated_seconds(events, [], None) == pytest.approx(50.0 + 100.0)
    assert allocated_seconds(events, [80.0, 90_050.0], None) == pytest.approx(80.0 + 100.0)


def test_job_that_has_not_begun_has_no_time() -> None:
    assert allocated_seconds([], [7.0], 9.0) == pytest.approx(0.0)
    assert allocated_seconds(history((3.0, "failed")), [], 9.0) == pytest.approx(0.0)


def stage_with(tmp_path: Path, attempts: list[dict[str, Any]]) -> tuple[JobFolder, WeightsFolder]:
    """Return a stage that had an allocation from 0 to 3,600 s and one from 7,200 to 9,000 s."""
    stage, weights = JobFolder(tmp_path), WeightsFolder(tmp_path / "weights/0123")
    weights.path.mkdir(parents=True)
    events = history((0.5, "running"), (3600.5, "waiting"), (7200.0, "running"), (9000.0, "done"))
    stage.history.write_text("".join(json.dumps(event) + "\n" for event in events))
    weights.attempts.write_text("".join(json.dumps(attempt) + "\n" for attempt in attempts))
    return stage, weights


def killed_stage(tmp_path: Path) -> tuple[JobFolder, WeightsFolder]:
    """Return a stage whose two allocations were killed, at 7,200 s after a step that was repeated, and at 98,000 s."""
    stage, weights = stage_with(tmp_path, [attempt(0, 8), attempt(90_000, 8)])
    stage.history.write_text("".join(json.dumps(e) + "\n" for e in history((0.0, "running"), (90_000.0, "running"))))
    weights.metrics.write_text('{"step": 9, "loss": 1.0, "time_s": 98000.0}\n')
    return stage, weights


def hours_on_8_gpus(stage: JobFolder, weights: WeightsFolder, events: list[dict[str, Any]]) -> float | None:
    return used_gpu_hours(stage, weights, signs_of_life(events, read_rows(weights).trained), 8, None)


def test_killed_allocations_end_with_the_last_line_of_their_metrics(tmp_path: Path) -> None:
    """The resume removed the last line of the first allocation; its event keeps the time of that line."""
    lost = {"time_s": 90_060.0, "event": "work_lost", "to_step": 4, "seconds": 9.0, "last_step_s": 7200.0}
    assert hours_on_8_gpus(*killed_stage(tmp_path), [lost]) == pytest.approx((7200 + 8000) / 3600 * 8)


def test_copied_run_has_the_gpu_hours_of_the_original(tmp_path: Path) -> None:
    stage, weights = killed_stage(tmp_path / "original")
    shutil.copytree(stage.path, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (95_000, 95_000))
    copied = WeightsFolder(tmp_path / "copy" / weights.path.relative_to(stage.path))
    assert hours_on_8_gpus(JobFolder(tmp_path / "copy"), copied, []) == pytest.approx(8000 / 3600 * 8)


def attempt(time_s: int, world_size: int, device: str = "cuda") -> dict[str, Any]:
    time = datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds")
    return {"time": time, "world_size": world_size, "device": device}


def test_each_allocation_counts_with_its_own_gpus(tmp_path: Path) -> None:
    """The stage was continued on twice the nodes. The time of an attempt is cut to whole seconds."""
    stage, weights = stage_with(tmp_path, [attempt(0, 64), attempt(1800, 64), attempt(7300, 128)])
    assert used_gpu_hours(stage, weights, [], 128, None) == pytest.approx(1 * 64 + 0.5 * 128)


def test_allocation_without_an_attempt_counts_with_the_planned_gpus(tmp_path: Path) -> None:
    for first in (attempt(0, 64) | {"time": "yesterday"}, {"device": "cuda"}):
        stage, weights = stage_with(tmp_path / str(len(first)), [first, attempt(7300, 128)])
        assert used_gpu_hours(stage, weights, [], 32, None) == pytest.approx(1 * 32 + 0.5 * 128)


def test_stage_without_gpus_or_attempts_has_no_gpu_hours(tmp_path: Path) -> None:
    stage, weights = stage_with(tmp_path, [attempt(0, 64, "cpu")])
    assert used_gpu_hours(stage, weights, [], 32, None) is None
    weights.attempts.unlink()
    assert used_gpu_hours(stage, weights, [], 32, None) is used_gpu_hours(stage, None, [], 32, None) is None


@pytest.mark.parametrize(
    ("request_of_job", "gpus"),
    [
        ({"--nodes": "2", "--gpus-per-node": "4"}, 8),
        ({"--nodes": "2", "--gpus-per-node": "h100:4"}, 8),
        ({"--nodes": "3", "--gres": "gpu:2"}, 6),
        ({"--nodes": "1", "--gres": "gpu:a100:2,tmp:50"}, 2),
        ({"--nodes": "1", "--gres": "tmp:50"}, 0),
        ({"--nodes": "4"}, 0),
        ({}, 0),
    ],
)
def test_other_jobs_count_with_the_gpus_that_they_request(
    tmp_path: Path, request_of_job: dict[str, str], gpus: int
) -> None:
    job, _ = stage_with(tmp_path, [])
    assert requested_gpu_hours(job, request_of_job, None) == pytest.approx(1.5 * gpus)
