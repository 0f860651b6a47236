"""The time that must be left to leave an allocation with a save."""

from __future__ import annotations

import pytest

from longhaul.train.graceful_stop import needed_to_leave_s
from longhaul.train.phase_times import STEP, VALIDATE, PhaseTimes


@pytest.mark.parametrize(("is_saving", "seconds"), [(False, 2 * 10 + 5 + 1.5 * 40), (True, 2 * 10 + 5 + 3 * 40)])
def test_time_is_left_for_steps_a_validation_and_slower_saves(is_saving: bool, seconds: float):
    times = PhaseTimes()
    times.longest_s.update({STEP: 10.0, VALIDATE: 5.0})
    assert needed_to_leave_s(times, 40.0, is_saving) == seconds
