"""A stage goes on with another number of ranks or ZeRO stage: nothing that was saved changes, and no sample is missed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.checkpoint_io import open_master_weights, open_optimizer_state
from tests.parity.parity_table import make_data
from tests.recovery.trained_stages import HALF, STEPS, Leg, train

Split = tuple[int, int, dict[str, int]]
STOPPED = {"stop_after": HALF}
BALANCED = {"router_bias_update_rate": 0.01}
# Name -> ranks, ZeRO stage and, where it is hierarchical, the ranks of a node, before and after. `make moves` makes all of
# these and of CROSSINGS, `make test` those of QUICK: every way to split a model is left once, and entered once.
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

QUICK = {
    "data 1 to 2",
    "ZeRO 1 to 3",
    "ZeRO 2 to 0",
    "ZeRO 3, data 4 to 2",
    "ZeRO 3, data 2 to hierarchical",
    "hierarchical to ZeRO 1",
    "pipeline 2, tensor 2 to data 4",
    "tensor 2 to pipeline 2",
    "pipeline 2 to tensor 2, ZeRO 3",
    "expert 2 to ZeRO 1",
    "pipeline 2, expert 2 to data 2",
    "ZeRO 1 to expert 2, ZeRO 3",
}


def chosen(config: pytest.Config, moves: dict[str, Any]) -> dict[str, Any]:
    return {name: move for name, move in moves.items() if name in QUICK or config.getoption("--all-moves")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, moves in (("move", MOVES), ("crossing", CROSSINGS)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, chosen(metafunc.config, moves))


def test_those_that_are_quick_exist():
    assert QUICK.issubset({*MOVES, *CROSSINGS})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("elastic") / "shared")


@pytest.fixture(scope="module")
def legs(shared: Path, pytestconfig: pytest.Config) -> dict[str, Leg]:
    """Undisturbed runs, stopped halves, and what another layout made of each: saved again at once, then trained to the end.

    Those of all moves together, as ranks take longer to start than to train.
    """
    folder = shared.parent
    moves, crossings = chosen(pytestconfig, MOVES), chosen(pytestconfig, CROSSINGS)
    halves = {layout: _leg(folder / f"half-{layout}", layout, STOPPED) for layout, _ in moves.values()}
    found = {"whole": Leg(folder / "whole", 2)}
    found |= {
        twin: Leg(folder / twin, 2, stage=BALANCED, twin=twin) for twin in {twin for twin, _, _ in crossings.values()}
    }
    found |= {
        f"{name} half": _split_leg(folder / f"{name} half", before, STOPPED, twin)
        for name, (twin, before, _) in crossings.items()
    }
    train_all(shared, [*found.values(), *halves.values()])
    found |= {f"{name} half": halves[before] for name, (before, _) in moves.items()}
    saved = {"save_again": True}
    moved = {name: _leg(folder / f"{name} on", after, saved) for name, (_, after) in moves.items()}
    moved |= {
        name: _split_leg(folder / f"{name} on", after, saved, twin) for name, (twin, _, after) in crossings.items()
    }
    for name, leg in moved.items():
        shutil.copytree(found[f"{name} half"].folder, leg.folder)
    train_all(shared, list(moved.values()))
    return {**found, **moved}


def _leg(folder: Path, layout: tuple[int, ...], befalls: dict[str, Any]) -> Leg:
    ranks, zero, *hierarchical = layout
    stage = {"zero": {"stage": zero, "zero_hpz_partition_size": hierarchical[0]}} if hierarchical else {}
    return Leg(folder, ranks, zero, stage, befalls)


def train_all(shared: Path, legs: list[Leg]) -> None:
    """Those of one number of ranks share their processes."""
    for ranks in sorted({leg.ranks for leg in legs}):
        train(shared, *(leg for leg in legs if leg.ranks == ranks))


@pytest.mark.timeout(900)
def test_the_state_is_the_saved_one_bit_for_bit(legs: dict[str, Leg], move: str):
    """Masters, both moments and the optimizer's step count, read back from a save in the new layout."""
    assert_same_state(legs[f"{move} half"], legs[move])


def assert_same_state(half: Leg, again: Leg, step: int = HALF) -> None:
    """Of the checkpoints of this step; there are many tensors, so that none are not taken for equal ones."""
    tag = f"checkpoints/step-{step:08d}"
    before, after = half.weights / tag, again.weights / tag
    assert again.ended in ("killed", "finished")
    assert _written_at(after) > _written_at(before), "only the copy that the leg began with is there"
    assert open_optimizer_state(before).step == open_optimizer_state(after).step == step
    saved = {"masters": open_master_weights(before), **open_optimizer_state(before).moments}
    loaded = {"masters": open_master_weights(after), **open_optimizer_state(after).moments}
    assert set(saved) == set(loaded) == {"masters", "exp_avg", "exp_avg_sq"}
    for kind, tensors in saved.items():
        assert set(tensors) == set(loaded[kind]) and len(tensors) > 30
        for name, tensor in tensors.items():
            assert torch.equal(tensor.read(), loaded[kind][name].read()), (kind, name)


def _written_at(checkpoint: Path) -> float:
    """When its newest file was; a copy keeps that time."""
    return max(path.stat().st_mtime for path in checkpoint.rglob("*") if path.is_file())


def test_no_sample_is_lost_and_losses_are_those_of_the_unchanged_run(legs: dict[str, Leg], move: str):
    whole, moved = legs["whole"], legs[move]
    assert whole.ended == moved.ended == "finished"
    assert moved.sample_ids() == whole.sample_ids() and len(set(whole.sample_ids())) == STEPS
    assert moved.losses() == pytest.approx(whole.losses(), rel=1e-5)
    assert [row["lr"] for row in moved.rows()] == [row["lr"] for row in whole.rows()]
    (resumed,) = moved.events("resumed")
    assert resumed["step"] == HALF and resumed["layout"] != resumed["saved_layout"]


def _split_leg(folder: Path, split: Split, befalls: dict[str, Any], twin: str) -> Leg:
    ranks, zero, axes = split
    return Leg(folder, ranks, zero, {"parallel": axes, **BALANCED}, befalls, twin)


def test_another_split_of_the_model_takes_the_state_over(legs: dict[str, Leg], crossing: str):
    assert_same_state(legs[f"{crossing} half"], legs[crossing])


def test_losses_in_another_split_are_those_of_the_unchanged_run(legs: dict[str, Leg], crossing: str):
    whole, moved = legs[CROSSINGS[crossing][0]], legs[crossing]
    assert moved.ended == "finished" and moved.sample_ids() == whole.sample_ids()
    assert moved.losses() == pytest.approx(whole.losses(), rel=1e-5)
