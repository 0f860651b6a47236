"""Bad steps: skipped, rolled back or the end, on real ranks, one of which computes a NaN; and the same list without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parity.parity_table import make_data
from tests.recovery.trained_stages import STEPS, Leg, train

NAN = float("nan")


def leg(folder: Path, policy: str, poison: dict[int, float], zero: int = 1, **bad_steps: Any) -> Leg:
    stage = {"bad_steps": {"policy": policy, **bad_steps}, "export": "last"}
    return Leg(folder, 2, zero, stage, {"poison": {str(batch): factor for batch, factor in poison.items()}})


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Leg]:
    folder = tmp_path_factory.mktemp("guard")
    shared = make_data(folder / "shared")
    found = {
        "stop": leg(folder / "stop", "stop", {4: NAN}),
        "skip": leg(folder / "skip", "skip", {4: NAN, 6: NAN, 7: NAN}),
        "skip, ZeRO 3": leg(folder / "skip3", "skip", {4: NAN, 6: NAN, 7: NAN}, zero=3),
        "too many": leg(folder / "many", "skip", {4: NAN, 5: NAN, 6: NAN}, limit=2),
        "roll back": leg(folder / "back", "roll_back", {4: NAN}),
        "roll back to 0": leg(folder / "back0", "roll_back", {1: NAN}, window_batches=1),
        "spike": leg(folder / "spike", "roll_back", {10: 3.0}, spike_factor=1.5, window_batches=2),
        "no spike": leg(folder / "calm", "roll_back", {10: 1.2}, spike_factor=1.5),
        "in vain": leg(folder / "vain", "roll_back", dict.fromkeys(range(4, 30), NAN), limit=2, window_batches=1),
    }
    for name, skipped in (("skip", [4, 6, 7]), ("roll back", [3, 4]), ("roll back to 0", [1]), ("spike", [9, 10])):
        calm = leg(folder / f"calm {name}", "stop", {})
        calm.stage["skip_batches"] = skipped
        found[f"{name}, told before"] = calm
    found["skip, pipeline"] = leg(folder / "pipeline", "skip", {4: NAN, 6: NAN, 7: NAN})
    found["skip, pipeline"].stage["parallel"] = {"pipeline": 2}
    late = leg(folder / "stop", "stop", {})
    late.stage["skip_batches"] = [1]
    mended = leg(folder / "stop", "stop", {4: NAN})
    mended.stage["skip_batches"] = [4]
    train(shared, *found.values(), late, mended)
    return found | {"too late": late, "mended": mended}


@pytest.mark.parametrize("name", ["skip", "roll back", "roll back to 0", "spike"])
def test_the_weights_are_those_of_a_calm_run_that_was_told_before(legs: dict[str, Leg], name: str):
    met, told = legs[name], legs[f"{name}, told before"]
    assert met.ended == told.ended == "finished"
    assert met.sample_ids() == told.sample_ids()
    assert met.losses() == told.losses()
    assert met.masters() == told.masters()
    assert [row["step"] for row in met.rows()] == list(range(1, STEPS + 1))


def test_a_poisoned_batch_would_have_changed_the_weights(legs: dict[str, Leg]):
    assert legs["skip"].masters() != legs["spike"].masters() != legs["no spike"].masters()


@pytest.mark.parametrize("layout", ["ZeRO 3", "pipeline"])
def test_other_layouts_skip_alike(legs: dict[str, Leg], layout: str):
    found = legs[f"skip, {layout}"]
    assert found.ended == "finished" and [row["batch"] for row in found.events("bad_step")] == [4, 6, 7]
    assert found.losses() == pytest.approx(legs["skip"].losses(), rel=1e-5)


def test_every_decision_is_recorded(legs: dict[str, Leg]):
    skipped = legs["skip"].events("bad_step")
    assert [(row["step"], row["batch"], row["policy"]) for row in skipped] == [
        (5, 4, "skip"),
        (6, 6, "skip"),
        (6, 7, "skip"),
    ]
    assert all("loss nan" in row["reason"] for row in skipped)
    assert json.loads((legs["skip"].weights / "skipped.json").read_text()) == [4, 6, 7]
    (back,) = legs["roll back"].events("rolled_back")
    assert (back["from_step"], back["to_step"], back["batches"]) == (4, 3, [3, 4])
    (spike,) = legs["spike"].events("bad_step")
    assert "is more than 1.5 times" in spike["reason"]
    assert [row["steps"] for row in legs["spike"].events("work_lost")] == [1]


def test_a_limit_ends_the_stage(legs: dict[str, Leg]):
    assert legs["too many"].ended.startswith("TrainingFailure: step 5: loss nan")
    assert "bad_steps.policy is skip, its limit 2. Batch 6, samples [" in legs["too many"].ended
    assert legs["in vain"].ended.startswith("TrainingFailure: step 5: loss nan")
    assert len(legs["in vain"].events("rolled_back")) == 2


def test_stop_goes_on_when_told_what_to_skip(legs: dict[str, Leg]):
    assert legs["stop"].ended.startswith("TrainingFailure: step 5: loss nan")
    assert "batch 1 cannot be skipped any more: the stage has done 3 steps" in legs["too late"].ended
    assert legs["mended"].ended == "finished"
    assert "spike" not in legs["mended"].ended and legs["mended"].rows()[4]["batch"] == 5


def test_a_factor_below_the_bound_is_no_spike(legs: dict[str, Leg]):
    assert legs["no spike"].ended == "finished" and legs["no spike"].events("bad_step") == []
