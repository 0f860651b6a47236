"""Bad steps are skipped, rolled back, or end the stage; on two ranks, of which one computes a NaN or a spike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.doctor_answers import assert_doctor_names_from_log
from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.trained_stages import STEPS, TrainedStage, train

NAN = float("nan")
POISONED_BATCH = 10
"""The batch with the changed loss in "spike" and "no spike". Every earlier batch is one step, so step 11 trains it."""


def stage(folder: Path, policy: str, poison: dict[int, float], zero: int = 1, **bad_steps: Any) -> TrainedStage:
    keys = {"bad_steps": {"policy": policy, **bad_steps}, "export": "last"}
    return TrainedStage(folder, 2, zero, keys, {"poison": {str(batch): factor for batch, factor in poison.items()}})


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainedStage]:
    folder = tmp_path_factory.mktemp("bad_steps")
    shared = write_shared_data(folder / "shared")
    always_nan = dict.fromkeys(range(4, 30), NAN)
    found = {
        "undisturbed": stage(folder / "undisturbed", "stop", {}),
        "stop": stage(folder / "stop", "stop", {4: NAN}),
        "skip": stage(folder / "skip", "skip", {4: NAN, 6: NAN, 7: NAN}),
        "skip, ZeRO 3": stage(folder / "skip-zero3", "skip", {4: NAN, 6: NAN, 7: NAN}, zero=3),
        "skip beyond the limit": stage(folder / "skip-limit", "skip", {4: NAN, 5: NAN, 6: NAN}, limit=2),
        "roll back": stage(folder / "back", "roll_back", {4: NAN}),
        "roll back to 0": stage(folder / "back-to-0", "roll_back", {1: NAN}, window_batches=1),
        "roll back beyond the limit": stage(folder / "back-limit", "roll_back", always_nan, limit=2, window_batches=1),
        "spike": stage(folder / "spike", "roll_back", {POISONED_BATCH: 5.0}, spike_factor=1.5, window_batches=2),
        "no spike": stage(folder / "no-spike", "roll_back", {POISONED_BATCH: 1.2}, spike_factor=1.5),
    }
    for name, skipped in (("skip", [4, 6, 7]), ("roll back", [3, 4]), ("roll back to 0", [1]), ("spike", [9, 10])):
        without_faults = stage(folder / f"{name}-configured", "stop", {})
        without_faults.stage["skip_batches"] = skipped
        found[f"{name}, configured"] = without_faults
    for name in ("skip", "roll back"):
        for suffix in ("", ", configured"):
            delayed = replace(found[name + suffix], folder=folder / f"delayed-{name}{suffix}")
            delayed.faults = {**delayed.faults, "delay_results": True}
            found[f"{name}, delayed{suffix}"] = delayed
    found["skip, pipeline"] = stage(folder / "pipeline", "skip", {4: NAN, 6: NAN, 7: NAN})
    found["skip, pipeline"].stage["parallel"] = {"pipeline": 2}
    too_late = stage(folder / "stop", "stop", {})
    too_late.stage["skip_batches"] = [1]
    continued = stage(folder / "stop", "stop", {4: NAN})
    continued.stage["skip_batches"] = [4]
    train(shared, *found.values(), too_late, continued)
    return found | {"too late": too_late, "continued": continued}


@pytest.mark.parametrize(
    "name", ["skip", "roll back", "roll back to 0", "spike", "skip, delayed", "roll back, delayed"]
)
def test_the_weights_are_those_of_a_run_with_these_skip_batches(stages: dict[str, TrainedStage], name: str):
    found, expected = stages[name], stages[f"{name}, configured"]
    assert found.ended == expected.ended == "finished"
    assert found.sample_ids() == expected.sample_ids()
    assert found.losses() == expected.losses()
    assert found.master_hashes() == expected.master_hashes()
    assert [row["step"] for row in found.rows()] == list(range(1, STEPS + 1))


def test_a_poisoned_batch_that_is_not_skipped_changes_the_weights(stages: dict[str, TrainedStage]):
    """Otherwise equal weights would not show that the bad steps were kept out. The same batches are trained in both runs."""
    poisoned, undisturbed = stages["no spike"], stages["undisturbed"]
    assert poisoned.ended == undisturbed.ended == "finished"
    assert poisoned.sample_ids() == undisturbed.sample_ids()
    assert poisoned.losses()[:POISONED_BATCH] == undisturbed.losses()[:POISONED_BATCH]
    assert poisoned.losses()[POISONED_BATCH] > undisturbed.losses()[POISONED_BATCH]
    expected = undisturbed.master_hashes()
    unchanged = [name for name, sha256 in poisoned.master_hashes().items() if sha256 == expected[name]]
    assert len(expected) > 10 and unchanged == []


def test_skipped_batches_change_the_weights(stages: dict[str, TrainedStage]):
    skipped, undisturbed = stages["skip, configured"], stages["undisturbed"]
    assert skipped.losses()[:4] == undisturbed.losses()[:4]
    assert set(skipped.master_hashes().values()).isdisjoint(undisturbed.master_hashes().values())


@pytest.mark.parametrize("layout", ["ZeRO 3", "pipeline"])
def test_other_layouts_skip_the_same_batches(stages: dict[str, TrainedStage], layout: str):
    found = stages[f"skip, {layout}"]
    assert found.ended == "finished" and [row["batch"] for row in found.events("bad_step")] == [4, 6, 7]
    assert found.losses() == pytest.approx(stages["skip"].losses(), rel=1e-5)


@pytest.mark.parametrize("policy", ["skip", "roll back"])
def test_a_delayed_result_has_the_same_consequences(stages: dict[str, TrainedStage], policy: str):
    found, expected = stages[f"{policy}, delayed"], stages[policy]
    for event in ("bad_step", "rolled_back"):
        rows = [[{**row, "seconds": 0, "time_s": 0} for row in stage.events(event)] for stage in (found, expected)]
        assert rows[0] == rows[1]
    assert found.losses() == pytest.approx(expected.losses(), rel=1e-5)
    norms = [[row["grad_norm"] for row in stage.rows()] for stage in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and max(norms[1]) > 1.0, "some gradients are clipped"


def test_every_bad_step_is_recorded(stages: dict[str, TrainedStage]):
    skipped = stages["skip"].events("bad_step")
    assert [(row["step"], row["batch"], row["policy"]) for row in skipped] == [
        (5, 4, "skip"),
        (6, 6, "skip"),
        (6, 7, "skip"),
    ]
    assert all("loss nan" in row["reason"] for row in skipped)
    assert json.loads((stages["skip"].weights / "skipped.json").read_text()) == [4, 6, 7]
    (rolled_back,) = stages["roll back"].events("rolled_back")
    assert (rolled_back["from_step"], rolled_back["to_step"], rolled_back["batches"]) == (4, 3, [3, 4])
    (spike,) = stages["spike"].events("bad_step")
    assert "is more than 1.5 times" in spike["reason"]
    assert [row["steps"] for row in stages["spike"].events("work_lost")] == [1]


@pytest.mark.parametrize(
    ("name", "fault"), [("skip", "NaN in 3 batches, skip"), ("roll back", "NaN in 3 batches, roll_back")]
)
def test_doctor_names_skipped_batches(stages: dict[str, TrainedStage], name: str, fault: str, tmp_path: Path):
    assert_doctor_names_from_log(fault, tmp_path, stages[name].printed)


def test_more_bad_steps_than_the_limit_end_the_stage(stages: dict[str, TrainedStage]):
    skipped, rolled_back = stages["skip beyond the limit"], stages["roll back beyond the limit"]
    assert skipped.ended.startswith("TrainingFailure: step 5: loss nan")
    assert "bad_steps.policy is skip, bad_steps.limit is 2. Batch 6, samples [" in skipped.ended
    assert rolled_back.ended.startswith("TrainingFailure: step 5: loss nan")
    assert len(rolled_back.events("rolled_back")) == 2


def test_a_stopped_stage_continues_when_skip_batches_names_the_batch(stages: dict[str, TrainedStage]):
    assert stages["stop"].ended.startswith("TrainingFailure: step 5: loss nan")
    assert "batch 1 cannot be skipped any more: the stage has done 3 steps" in stages["too late"].ended
    assert stages["continued"].ended == "finished" and stages["continued"].rows()[4]["batch"] == 5


def test_a_loss_below_the_spike_factor_is_no_bad_step(stages: dict[str, TrainedStage]):
    assert stages["no spike"].ended == "finished" and stages["no spike"].events("bad_step") == []
