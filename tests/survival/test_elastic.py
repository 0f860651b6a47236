"""A stage goes on with another number of ranks or ZeRO stage: nothing that was saved changes, and no sample is missed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from longhaul.zero_checkpoint import open_master_weights, open_optimizer_state
from parity_table import make_data
from stages import HALF, STEPS, Leg, train

STOPPED = {"stop_after": HALF}
MOVES = {
    "data 1 to 2": ((1, 1), (2, 1)),
    "data 2 to 1": ((2, 1), (1, 1)),
    "data 2 to 4": ((2, 1), (4, 1)),
    "ZeRO 1 to 3": ((2, 1), (2, 3)),
    "ZeRO 3 to 1": ((2, 3), (2, 1)),
    "ZeRO 2 to 0": ((2, 2), (2, 0)),
    "ZeRO 0 to 2": ((2, 0), (2, 2)),
    "ZeRO 3, data 2 to 4": ((2, 3), (4, 3)),
}


CROSSINGS = {
    "tensor 2 to ZeRO 3": ("llama", {"tensor": 2}, 3, {}),
    "tensor 2 to pipeline 2": ("llama", {"tensor": 2}, 1, {"pipeline": 2}),
    "pipeline 2 to tensor 2": ("llama", {"pipeline": 2}, 1, {"tensor": 2}),
    "expert 2 to ZeRO 1": ("deepseek_v3", {"expert": 2}, 1, {}),
    "expert 2 to pipeline 2": ("deepseek_v3", {"expert": 2}, 1, {"pipeline": 2}),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("elastic") / "shared")


@pytest.fixture(scope="module")
def legs(shared: Path) -> dict[str, Leg]:
    """The undisturbed run, the stopped halves, and every move: saved again at once, and trained to the end."""
    folder = shared.parent
    whole = Leg(folder / "whole", 2)
    halves = {layout: Leg(folder / f"half-{layout}", *layout, befalls=STOPPED) for layout, _ in MOVES.values()}
    train(shared, whole, *(half for half in halves.values() if half.ranks == 2))
    train(shared, *(half for half in halves.values() if half.ranks == 1))
    found = {"whole": whole}
    for name, (before, after) in MOVES.items():
        for kind, befalls in (("again", {"save_again": True}), ("on", {})):
            leg = Leg(folder / f"{name} {kind}", *after, befalls=befalls)
            shutil.copytree(halves[before].folder, leg.folder)
            found[f"{name} {kind}"] = leg
        found[f"{name} half"] = halves[before]
    for ranks in (1, 2, 4):
        train(shared, *(leg for name, leg in found.items() if leg.ranks == ranks and name.endswith(("again", "on"))))
    return found


@pytest.mark.parametrize("move", MOVES)
def test_the_state_is_the_saved_one_bit_for_bit(legs: dict[str, Leg], move: str):
    """Masters, both moments and the optimizer's step count, read back from a save in the new layout."""
    assert_same_state(legs[f"{move} half"], legs[f"{move} again"])


def assert_same_state(half: Leg, again: Leg) -> None:
    tag = f"checkpoints/step-{HALF:08d}"
    before, after = half.weights / tag, again.weights / tag
    assert again.ended == "killed"
    assert open_optimizer_state(before).step == open_optimizer_state(after).step == HALF
    saved = {"masters": open_master_weights(before), **open_optimizer_state(before).moments}
    loaded = {"masters": open_master_weights(after), **open_optimizer_state(after).moments}
    assert set(saved) == set(loaded) == {"masters", "exp_avg", "exp_avg_sq"}
    for kind, tensors in saved.items():
        assert set(tensors) == set(loaded[kind]) and len(tensors) > 30
        for name, tensor in tensors.items():
            assert torch.equal(tensor.read(), loaded[kind][name].read()), (kind, name)


@pytest.mark.parametrize("move", MOVES)
def test_no_sample_is_lost_and_losses_are_those_of_the_unchanged_run(legs: dict[str, Leg], move: str):
    whole, moved = legs["whole"], legs[f"{move} on"]
    assert whole.ended == moved.ended == "finished"
    assert moved.sample_ids() == whole.sample_ids() and len(set(whole.sample_ids())) == STEPS
    assert moved.losses() == pytest.approx(whole.losses(), rel=1e-5)
    assert [row["lr"] for row in moved.rows()] == [row["lr"] for row in whole.rows()]
    (resumed,) = moved.events("resumed")
    assert resumed["step"] == HALF and resumed["layout"] != resumed["saved_layout"]


@pytest.fixture(scope="module")
def crossings(shared: Path) -> dict[str, tuple[Leg, Leg]]:
    """Every crossing's stopped half, and the half that was loaded in the other split of the model and saved again."""
    found = {}
    for name, (twin, before, zero, after) in CROSSINGS.items():
        stages = [{"parallel": axes, "expert_bias_rate": 0.01} for axes in (before, after)]
        folder = shared.parent / name
        half = Leg(folder / "half", 2, 1, stages[0], STOPPED, twin)
        found[name] = (half, Leg(folder / "again", 2, zero, stages[1], {"save_again": True}, twin))
    train(shared, *(half for half, _ in found.values()))
    for half, again in found.values():
        shutil.copytree(half.folder, again.folder)
    train(shared, *(again for _, again in found.values()))
    return found


@pytest.mark.parametrize("crossing", CROSSINGS)
def test_another_split_of_the_model_takes_the_state_over(crossings: dict[str, tuple[Leg, Leg]], crossing: str):
    """Losses of every split are held to the same reference by the parity table; so the state is what is left to prove."""
    assert_same_state(*crossings[crossing])
