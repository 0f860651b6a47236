"""An allocation that ends too soon is refused before a step is trained that could not be saved; saves record the time spent."""

from __future__ import annotations

import pytest

from longhaul.artifacts.line_record_fields import read_events
from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.trained_stages import HALF, STEPS, TrainedStage, train


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> TrainedStage:
    """Return a stage of three attempts: killed, in an allocation that is nearly over, and with enough time."""
    folder = tmp_path_factory.mktemp("graceful_stop")
    shared = write_shared_data(folder / "shared")
    killed = TrainedStage(folder / "run", 2, faults={"kill_at_step": HALF + 1})
    late, last = (TrainedStage(folder / "run", 2, faults={"deadline_in_s": seconds}) for seconds in (2.0, 3600.0))
    train(shared, killed, late, last)
    assert "no step of this allocation could be saved" in late.ended, late.ended
    assert "AllocationTooShort" in late.ended, "the next allocation may be long enough"
    return last


def test_with_enough_time_the_stage_continues(stage: TrainedStage):
    assert stage.ended == "finished"
    assert [row["step"] for row in stage.rows()] == list(range(1, STEPS + 1))


def test_every_save_records_how_the_time_was_spent(stage: TrainedStage):
    events = read_events(stage.weights / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "training"] == [0, HALF, HALF]
    saves = [event for event in events if event["event"] == "saved"]
    assert [save["step"] for save in saves] == [3, 6, 9, 12]
    steps_s = sum(row["step_time_s"] + row["data_wait_s"] for row in stage.rows())
    assert sum(save["training_s"] for save in saves) == pytest.approx(steps_s, rel=0.05)
    assert all(save["saving_s"] > 0 and save["validation_s"] >= 0 for save in saves)
    lost = [event for event in events if event["event"] == "work_lost"]
    assert [event["steps"] for event in lost] == [1]
