"""Saves whose files are written while training continues: what is saved, what a kill leaves, how an error is reported."""

from __future__ import annotations

import shutil

import pytest

from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.trained_stages import HALF, STEPS, TrainedStage, train

SLOW = {"seconds": 0.5}
"""A file takes longer than several steps of this model."""
FIRST, SECOND = (f"step-{step:08d}" for step in (HALF // 2, HALF))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainedStage]:
    """Return trained stages by name. The first attempts of "killed", "stopped" and "failed" end early."""
    folder = tmp_path_factory.mktemp("saves")
    shared = write_shared_data(folder / "shared")
    first = {
        "asynchronous": TrainedStage(folder / "asynchronous", 2, zero=2, faults={"writes": SLOW}),
        "synchronous": TrainedStage(folder / "synchronous", 2, zero=2, faults={"synchronous_saves": True}),
        "killed": TrainedStage(
            folder / "killed", 2, zero=2, faults={"writes": SLOW, "kill_at_step": 7, "kill_while_saving": True}
        ),
        "stopped": TrainedStage(folder / "stopped", 2, zero=2, faults={"writes": SLOW, "terminate_at_step": HALF // 2}),
        "failed": TrainedStage(folder / "failed", 2, zero=2, faults={"writes": {"failing_folder": SECOND}}),
    }
    train(shared, *first.values())
    from_first = TrainedStage(folder / "from first", 2, zero=2)
    shutil.copytree(first["asynchronous"].folder, from_first.folder)
    for step in range(HALF, STEPS + 1, HALF // 2):
        shutil.rmtree(from_first.checkpoint(step))
    second = {
        "resumed": TrainedStage(folder / "killed", 2, zero=2),
        "continued": TrainedStage(folder / "stopped", 2, zero=2),
        "from first": from_first,
        "repaired": TrainedStage(folder / "repaired", 2, zero=2),
    }
    shutil.copytree(first["failed"].folder, second["repaired"].folder)
    train(shared, *second.values())
    return first | second


def saves(stage: TrainedStage) -> list[dict[str, float]]:
    return stage.events("saved")


def test_training_continues_while_files_are_written(stages: dict[str, TrainedStage]):
    stage = stages["asynchronous"]
    assert stage.ended == "finished"
    first, *_ = saves(stage)
    steps_s = sum(row["step_time_s"] for row in stage.rows()[HALF // 2 : HALF])
    assert first["durable_s"] > SLOW["seconds"]
    assert first["durable_s"] - first["saving_s"] > steps_s / 2, "the steps after the save ran before it was complete"


def test_the_next_save_waits_for_the_one_before(stages: dict[str, TrainedStage]):
    assert [save["step"] for save in saves(stages["asynchronous"])] == [3, 6, 9, 12]
    assert stages["asynchronous"].checkpoints == [f"step-{step:08d}" for step in (3, 6, 9, 12)]


def test_a_synchronous_save_gives_the_same_weights(stages: dict[str, TrainedStage]):
    assert stages["synchronous"].ended == "finished"
    assert stages["synchronous"].master_hashes() == stages["asynchronous"].master_hashes()
    assert all(save["durable_s"] <= save["saving_s"] for save in saves(stages["synchronous"]))


def test_a_checkpoint_holds_the_weights_of_its_own_step(stages: dict[str, TrainedStage]):
    """The steps during the save changed nothing in it: a resume from it ends with the same weights."""
    assert [event["step"] for event in stages["from first"].events("resumed")] == [HALF // 2]
    assert stages["from first"].master_hashes() == stages["asynchronous"].master_hashes()


def test_a_kill_during_a_save_leaves_the_checkpoint_before(stages: dict[str, TrainedStage]):
    assert stages["killed"].ended == "killed"
    assert stages["killed"].checkpoints == [FIRST, f"{SECOND}.partial"]
    assert [event["step"] for event in stages["resumed"].events("resumed")] == [HALF // 2]
    assert stages["resumed"].master_hashes() == stages["asynchronous"].master_hashes()
    assert stages["resumed"].checkpoints == [f"step-{step:08d}" for step in (3, 6, 9, 12)]


def test_a_graceful_stop_waits_for_the_save_in_flight_and_its_own(stages: dict[str, TrainedStage]):
    assert stages["stopped"].checkpoints == [FIRST, f"step-{HALF // 2 + 1:08d}"]
    assert [event["step"] for event in stages["continued"].events("resumed")] == [HALF // 2 + 1]
    assert stages["continued"].master_hashes() == stages["asynchronous"].master_hashes()


def test_an_error_in_the_background_ends_all_ranks_with_its_message(stages: dict[str, TrainedStage]):
    """It is found after a step, before the next save."""
    stage = stages["failed"]
    assert "could not be saved: [Errno 5] Input/output error" in stage.ended and "UserError" in stage.ended
    assert "earlier checkpoints stay" in stage.ended
    assert stage.checkpoints == [FIRST]
    assert [event["checkpoint"] for event in stage.events("save_failed")] == [f"{SECOND}.partial"]
    assert HALF < len(stage.rows()) < STEPS


def test_after_an_error_the_same_command_finishes(stages: dict[str, TrainedStage]):
    assert [event["step"] for event in stages["repaired"].events("resumed")] == [HALF // 2]
    assert stages["repaired"].master_hashes() == stages["asynchronous"].master_hashes()
