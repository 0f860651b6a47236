"""Learning rates at the steps where a schedule changes its shape."""

from __future__ import annotations

import pytest

from longhaul.config.schedule_config import Schedule
from longhaul.train.lr_schedule import can_extend_steps, learning_rate

PEAK, STEPS = 2.0, 10


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(kind="constant", warmup_steps=0), {0: 2.0, 9: 2.0}),
        (Schedule(kind="constant", warmup_steps=4), {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0}),
        (Schedule(kind="linear", warmup_steps=2, min_lr_ratio=0.0), {0: 1.0, 1: 2.0, 2: 2.0, 9: 0.0}),
        (Schedule(kind="linear", warmup_steps=1, min_lr_ratio=0.5), {1: 2.0, 5: 1.5, 9: 1.0}),
        (Schedule(kind="cosine", warmup_steps=1, min_lr_ratio=0.1), {1: 2.0, 5: 2 * 0.55, 9: 0.2}),
        # a quarter of the decay: half of 1 + cos(45 degrees)
        (Schedule(kind="cosine", warmup_steps=1, min_lr_ratio=0.0), {3: 1.0 + 0.5**0.5}),
        (
            Schedule(kind="wsd", warmup_steps=2, decay_steps=4, min_lr_ratio=0.0),
            {0: 1.0, 5: 2.0, 6: 1.5, 7: 1.0, 9: 0.0},
        ),
        # Shares of ten steps: 0.2 are two, and 0.35 are four.
        (
            Schedule(kind="wsd", warmup_steps=0.2, decay_steps=0.35, min_lr_ratio=0.0),
            {0: 1.0, 5: 2.0, 6: 1.5, 7: 1.0, 9: 0.0},
        ),
    ],
)
def test_rates_at_the_bends_of_a_schedule(schedule: Schedule, expected: dict[int, float]):
    for step, rate in expected.items():
        assert learning_rate(schedule, PEAK, step, STEPS) == pytest.approx(rate), f"step {step}"


@pytest.mark.parametrize(
    ("schedule", "trained", "can_extend"),
    [
        (Schedule(kind="constant"), 10, True),
        (Schedule(kind="cosine"), 1, False),
        (Schedule(kind="linear"), 1, False),
        (Schedule(kind="wsd", decay_steps=4), 6, True),
        (Schedule(kind="wsd", decay_steps=4), 7, False),
        (Schedule(kind="wsd", decay_steps=0.4), 6, True),
        (Schedule(kind="wsd", decay_steps=0.4), 7, False),
        (Schedule(kind="constant", warmup_steps=1), 10, True),
        (Schedule(kind="constant", warmup_steps=0.1), 10, False),
    ],
)
def test_only_unchanged_rates_allow_more_steps(schedule: Schedule, trained: int, can_extend: bool):
    assert can_extend_steps(schedule, trained, STEPS) is can_extend


def test_a_decay_of_one_step_reaches_the_lowest_rate():
    schedule = Schedule(kind="wsd", decay_steps=1, min_lr_ratio=0.25)
    assert [learning_rate(schedule, PEAK, step, 4) for step in range(4)] == [2.0, 2.0, 2.0, 0.5]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_warm_up_until_the_last_step_leaves_no_decay(kind: str):
    """Two steps after the warm-up of three: the peak, then the lowest rate. With one step after it, only the peak."""
    schedule = Schedule.model_validate({"kind": kind, "warmup_steps": 3, "min_lr_ratio": 0.25})
    assert [learning_rate(schedule, PEAK, step, 5) for step in (3, 4)] == [2.0, pytest.approx(0.5)]
    assert learning_rate(schedule, PEAK, 3, 4) == 2.0
    assert learning_rate(schedule, PEAK, 3, 3) == 2.0, "beyond the plan"


def test_wsd_allows_more_steps_until_its_decay_begins():
    assert can_extend_steps(Schedule(kind="wsd", decay_steps=4, warmup_steps=3), 6, STEPS)
