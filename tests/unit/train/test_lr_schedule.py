"""Learning rates at the steps where a schedule changes its shape."""

from __future__ import annotations

import pytest

from longhaul.config.stage_config import Schedule
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
        (
            Schedule(kind="wsd", warmup_steps=2, decay_steps=4, min_lr_ratio=0.0),
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
    ],
)
def test_only_unchanged_rates_allow_more_steps(schedule: Schedule, trained: int, can_extend: bool):
    assert can_extend_steps(schedule, trained, STEPS) is can_extend
