"""An allocation that ends too soon: refused before a step is trained that could not be saved; goodput of what went before."""

from __future__ import annotations

import pytest

from longhaul.artifacts.event_log import read_events
from tests.parity.parity_table import make_data
from tests.recovery.trained_stages import HALF, STEPS, Leg, train


@pytest.fixture(scope="module")
def leg(tmp_path_factory: pytest.TempPathFactory) -> Leg:
    """Trained in two legs; then asked for more in an allocation that is nearly over."""
    folder = tmp_path_factory.mktemp("leaving")
    shared = make_data(folder / "shared")
    first = Leg(folder / "run", 2, befalls={"stop_after": HALF + 1})
    late, last = (Leg(folder / "run", 2, befalls={"left_s": seconds}) for seconds in (2.0, 3600.0))
    train(shared, first, late, last)
    assert "nothing that is trained in it could be saved" in late.ended, late.ended
    assert "AllocationTooShort" in late.ended, "the next allocation may be long enough"
    return last


def test_with_time_enough_it_goes_on(leg: Leg):
    assert leg.ended == "finished"
    assert [row["step"] for row in leg.rows()] == list(range(1, STEPS + 1))


def test_every_save_says_what_the_time_went_into(leg: Leg):
    events = read_events(leg.weights / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "training"] == [0, HALF, HALF]
    saves = [event for event in events if event["event"] == "saved"]
    assert [save["step"] for save in saves] == [3, 6, 9, 12]
    steps_s = sum(row["step_time_s"] + row["data_wait_s"] for row in leg.rows())
    assert sum(save["training_s"] for save in saves) == pytest.approx(steps_s, rel=0.05)
    assert all(save["saving_s"] > 0 and save["validation_s"] >= 0 for save in saves)
    lost = [event for event in events if event["event"] == "work_lost"]
    assert [event["steps"] for event in lost] == [1]
