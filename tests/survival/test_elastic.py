"""A stage goes on with another number of ranks or ZeRO stage: nothing that was saved changes, and no sample is missed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.zero_checkpoint import open_master_weights, open_optimizer_state
from parity_table import make_data
from stages import HALF, STEPS, Leg, train

Split = tuple[int, int, dict[str, int]]
STOPPED = {"stop_after": HALF}
BALANCED = {"expert_bias_rate": 0.01}
# Name -> ranks, ZeRO stage and, where it is hierarchical, the ranks of a node, before and after.
MOVES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "data 1 to 2": ((1, 1), (2, 1)),
    "data 2 to 1": ((2, 1), (1, 1)),
    "data 2 to 4": ((2, 1), (4, 1)),
    "ZeRO 1 to 3": ((2, 1), (2, 3)),
    "ZeRO 3 to 1": ((2, 3), (2, 1)),
    "ZeRO 2 to 0": ((2, 2), (2, 0)),
    "ZeRO 0 to 2": ((2, 0), (2, 2)),
    "ZeRO 3, data 2 to 4": ((2, 3), (4, 3)),
    "ZeRO 3, data 4 to 2": ((4, 3), (2, 3)),
    "ZeRO 3, data 2 to hierarchical": ((2, 3), (4, 3, 2)),
    "hierarchical to ZeRO 1": ((4, 3, 2), (2, 1)),
}
# Name -> twin, and ranks, ZeRO stage and axes before and after.
CROSSINGS: dict[str, tuple[str, Split, Split]] = {
    "tensor 2 to ZeRO 3": ("llama", (2, 1, {"tensor": 2}), (2, 3, {})),
    "tensor 2 to pipeline 2": ("llama", (2, 1, {"tensor": 2}), (2, 1, {"pipeline": 2})),
    "pipeline 2 to tensor 2": ("llama", (2, 1, {"pipeline": 2}), (2, 1, {"tensor": 2})),
    "pipeline 2, tensor 2 to data 4": ("llama", (4, 1, {"pipeline": 2, "tensor": 2}), (4, 1, {})),
    "pipeline 2 to tensor 2, ZeRO 3": ("llama", (2, 1, {"pipeline": 2}), (4, 3, {"tensor": 2})),
    "expert 2 to ZeRO 1": ("deepseek_v3", (2, 1, {"expert": 2}), (2, 1, {})),
    "expert 2 to pipeline 2": ("deepseek_v3", (2, 1, {"expert": 2}), (2, 1, {"pipeline": 2})),
    "pipeline 2, expert 2 to data 2": ("deepseek_v3", (4, 1, {"pipeline": 2, "expert": 2}), (2, 1, {})),
    "ZeRO 1 to expert 2, ZeRO 3": ("deepseek_v3", (2, 1, {}), (4, 3, {"expert": 2})),
    "expert 2, ZeRO 3 to tensor 2": ("deepseek_v3", (4, 3, {"expert": 2}), (2, 1, {"tensor": 2})),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("elastic") / "shared")


@pytest.fixture(scope="module")
def legs(shared: Path) -> dict[str, Leg]:
    """The undisturbed run, the stopped halves, and every move: saved again at once, and trained to the end."""
    folder = shared.parent
    whole = Leg(folder / "whole", 2)
    halves = {layout: _leg(folder / f"half-{layout}", layout, STOPPED) for layout, _ in MOVES.values()}
    train_all(shared, [whole, *halves.values()])
    found = {"whole": whole}
    for name, (before, after) in MOVES.items():
        for kind, befalls in (("again", {"save_again": True}), ("on", {})):
            leg = _leg(folder / f"{name} {kind}", after, befalls)
            shutil.copytree(halves[before].folder, leg.folder)
            found[f"{name} {kind}"] = leg
        found[f"{name} half"] = halves[before]
    train_all(shared, [leg for name, leg in found.items() if name.endswith(("again", "on"))])
    return found


def _leg(folder: Path, layout: tuple[int, ...], befalls: dict[str, Any]) -> Leg:
    ranks, zero, *hierarchical = layout
    stage = {"zero": {"stage": zero, "hierarchical_partition": hierarchical[0]}} if hierarchical else {}
    return Leg(folder, ranks, zero, stage, befalls)


def train_all(shared: Path, legs: list[Leg]) -> None:
    """Those of one number of ranks share their processes."""
    for ranks in sorted({leg.ranks for leg in legs}):
        train(shared, *(leg for leg in legs if leg.ranks == ranks))


@pytest.mark.parametrize("move", MOVES)
def test_the_state_is_the_saved_one_bit_for_bit(legs: dict[str, Leg], move: str):
    """Masters, both moments and the optimizer's step count, read back from a save in the new layout."""
    assert_same_state(legs[f"{move} half"], legs[f"{move} again"])


def assert_same_state(half: Leg, again: Leg, more_than: int = 30) -> None:
    """more_than: tensors that there are at least, so that none are not taken for equal ones."""
    tag = f"checkpoints/step-{HALF:08d}"
    before, after = half.weights / tag, again.weights / tag
    assert again.ended == "killed"
    assert open_optimizer_state(before).step == open_optimizer_state(after).step == HALF
    saved = {"masters": open_master_weights(before), **open_optimizer_state(before).moments}
    loaded = {"masters": open_master_weights(after), **open_optimizer_state(after).moments}
    assert set(saved) == set(loaded) == {"masters", "exp_avg", "exp_avg_sq"}
    for kind, tensors in saved.items():
        assert set(tensors) == set(loaded[kind]) and len(tensors) > more_than
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
def crossings(shared: Path) -> dict[str, Leg]:
    """Of every twin the undisturbed run; of every crossing the stopped half, and what the other split of the model made of
    it: saved again at once, and trained to the end."""
    folder = shared.parent
    found = {
        twin: Leg(folder / twin, 2, stage=BALANCED, twin=twin) for twin in {twin for twin, _, _ in CROSSINGS.values()}
    }
    for name, (twin, before, _) in CROSSINGS.items():
        found[f"{name} half"] = _split_leg(folder / name / "half", before, STOPPED, twin)
    train_all(shared, list(found.values()))
    for name, (twin, _, after) in CROSSINGS.items():
        for kind, befalls in (("again", {"save_again": True}), ("on", {})):
            found[f"{name} {kind}"] = _split_leg(folder / name / kind, after, befalls, twin)
            shutil.copytree(found[f"{name} half"].folder, folder / name / kind)
    train_all(shared, [leg for name, leg in found.items() if name.endswith(("again", "on"))])
    return found


def _split_leg(folder: Path, split: Split, befalls: dict[str, Any], twin: str) -> Leg:
    ranks, zero, axes = split
    return Leg(folder, ranks, zero, {"parallel": axes, **BALANCED}, befalls, twin)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("crossing", CROSSINGS)
def test_another_split_of_the_model_takes_the_state_over(crossings: dict[str, Leg], crossing: str):
    assert_same_state(crossings[f"{crossing} half"], crossings[f"{crossing} again"])


@pytest.mark.parametrize("crossing", CROSSINGS)
def test_losses_in_another_split_are_those_of_the_unchanged_run(crossings: dict[str, Leg], crossing: str):
    whole, moved = crossings[CROSSINGS[crossing][0]], crossings[f"{crossing} on"]
    assert moved.ended == "finished" and moved.sample_ids() == whole.sample_ids()
    assert moved.losses() == pytest.approx(whole.losses(), rel=1e-5)
