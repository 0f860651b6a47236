"""Learning rates at the steps where their shape bends."""

from __future__ import annotations

import pytest

from longhaul.config.run_config import Schedule
from longhaul.train.schedule import learning_rate, may_grow

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
def test_rates(schedule: Schedule, expected: dict[int, float]):
    for step, rate in expected.items():
        assert learning_rate(schedule, PEAK, step, STEPS) == pytest.approx(rate), f"step {step}"


@pytest.mark.parametrize(
    ("schedule", "trained", "grows"),
    [
        (Schedule(kind="constant"), 10, True),
        (Schedule(kind="cosine"), 1, False),
        (Schedule(kind="linear"), 1, False),
        (Schedule(kind="wsd", decay_steps=4), 6, True),
        (Schedule(kind="wsd", decay_steps=4), 7, False),
    ],
)
def test_which_schedules_let_a_stage_grow(schedule: Schedule, trained: int, grows: bool):
    assert may_grow(schedule, trained, STEPS) is grows
