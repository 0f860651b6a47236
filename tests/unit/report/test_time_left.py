"""The time that trainings still take is measured where it can be, else computed from FLOPs, else planned."""

from __future__ import annotations

import pytest

from longhaul.report.time_left import StageWork, training_left_s


def work(
    seconds_left: float | None = None,
    step_s: float | None = None,
    flops: float | None = 1e15,
    ranks: int = 4,
    gpu_hours: tuple[float, float] | None = None,
) -> StageWork:
    return StageWork(ranks, 100, seconds_left, step_s, flops, gpu_hours)


def test_measured_steps_count_as_they_are() -> None:
    assert training_left_s([work(0.0, 2.0), work(50.0, 2.0), work(30.0, 1.0)]) == (80.0, 80.0)


def test_stage_without_steps_trains_at_the_speed_of_the_one_before() -> None:
    """1e13 FLOPs per step of 2 s on 4 ranks; the next stage has three times the FLOPs on twice the ranks."""
    assert training_left_s([work(0.0, 2.0), work(flops=3e15, ranks=8)]) == pytest.approx((300.0, 300.0))


def test_plan_counts_where_nothing_was_measured() -> None:
    assert training_left_s([work(gpu_hours=(2.0, 4.0)), work(gpu_hours=(1.0, 1.0), ranks=1)]) == (5400.0, 7200.0)
    assert training_left_s([work(0.0, None, flops=None), work(gpu_hours=(2.0, 4.0))]) == (1800.0, 3600.0)


@pytest.mark.parametrize("unknown", [work(), work(flops=None), work(ranks=0, gpu_hours=(1.0, 1.0))])
def test_one_unknown_stage_makes_the_whole_unknown(unknown: StageWork) -> None:
    assert training_left_s([work(50.0, None), unknown]) is None


def test_run_without_stages_left_takes_no_time() -> None:
    assert training_left_s([work(0.0, 2.0)]) == (0.0, 0.0)
