"""Time in allocations is counted once, and not beyond the last sign of life of a job that was killed."""

from __future__ import annotations

from typing import Any

import pytest

from longhaul.report.allocated_time import allocated_seconds


def history(*events: tuple[float, str]) -> list[dict[str, Any]]:
    return [{"time_s": time_s, "event": name} for time_s, name in events]


@pytest.mark.parametrize("end", ["waiting", "failed", "done"])
def test_allocations_with_a_recorded_end_count_until_it(end: str) -> None:
    events = history((0.0, "running"), (60.0, "restarted"), (100.0, end), (900.0, "running"), (950.0, "done"))
    assert allocated_seconds(events, [2000.0], None) == 150.0
    assert allocated_seconds(events, [2000.0], 3000.0) == 150.0


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
    assert allocated_seconds(history((10.0, "running")), signs_of_life_s, now_s) == seconds


def test_killed_allocation_ends_before_the_next_one_begins() -> None:
    """The days between a node's death and the next start of the job cost nothing."""
    events = history((0.0, "running"), (50.0, "restarted"), (90_000.0, "running"), (90_100.0, "waiting"))
    assert allocated_seconds(events, [], None) == 50.0 + 100.0
    assert allocated_seconds(events, [80.0, 90_050.0], None) == 80.0 + 100.0


def test_job_that_has_not_begun_has_no_time() -> None:
    assert allocated_seconds([], [7.0], 9.0) == 0.0
    assert allocated_seconds(history((3.0, "failed")), [], 9.0) == 0.0
