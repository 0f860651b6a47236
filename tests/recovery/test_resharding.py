"""A stage resumes with another number of ranks, ZeRO stage or layout: the saved state stays the same, and no sample is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.checkpoint_io import open_master_weights, open_optimizer_state
from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.trained_stages import HALF, STEPS, TrainedStage, train

Layout = tuple[int, int, dict[str, int]]
KILLED = {"kill_at_step": HALF}
BALANCE = {"deepseek_v3": {"router_bias_update_rate": 0.01}}
# Name -> (ranks, ZeRO stage and, with a second partition, zero_hpz_partition_size) before and after. `make resharding` runs all
# of these and of LAYOUT_CHANGES, `make test` those of QUICK: there every way to slice a model is left once and entered once.
SIZE_CHANGES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "data 1 to 2": ((1, 1), (2, 1)),
    "data 2 to 1": ((2, 1), (1, 1)),
    "data 2 to 4": ((2, 1), (4, 1)),
    "ZeRO 1 to 3": ((2, 1), (2, 3)),
    "ZeRO 3 to 1": ((2, 3), (2, 1)),
    "ZeRO 2 to 0": ((2, 2), (2, 0)),
    "ZeRO 0 to 2": ((2, 0), (2, 2)),
    "ZeRO 3, data 2 to 4": ((2, 3), (4, 3)),
    "ZeRO 3, data 4 to 2": ((4, 3), (2, 3)),
    "ZeRO 3, data 2 to hpZ": ((2, 3), (4, 3, 2)),
    "hpZ to ZeRO 1": ((4, 3, 2), (2, 1)),
}
# Name -> model, and (ranks, ZeRO stage, parallel axes) before and after.
LAYOUT_CHANGES: dict[str, tuple[str, Layout, Layout]] = {
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
    "ZeRO 3, data 2 to hpZ",
    "hpZ to ZeRO 1",
    "pipeline 2, tensor 2 to data 4",
    "tensor 2 to pipeline 2",
    "pipeline 2 to tensor 2, ZeRO 3",
    "expert 2 to ZeRO 1",
    "pipeline 2, expert 2 to data 2",
    "ZeRO 1 to expert 2, ZeRO 3",
}


def chosen(config: pytest.Config, changes: dict[str, Any]) -> dict[str, Any]:
    return {name: change for name, change in changes.items() if name in QUICK or config.getoption("--all-reshardings")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, changes in (("size_change", SIZE_CHANGES), ("layout_change", LAYOUT_CHANGES)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, chosen(metafunc.config, changes))


def test_every_quick_change_exists():
    assert QUICK.issubset({*SIZE_CHANGES, *LAYOUT_CHANGES})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shared_data(tmp_path_factory.mktemp("resharding") / "shared")


@pytest.fixture(scope="module")
def stages(shared: Path, pytestconfig: pytest.Config) -> dict[str, TrainedStage]:
    """Return uninterrupted runs, killed halves, and each half resumed in another layout: saved at once, then trained to the end.

    All changes are trained together, as ranks take longer to start than to train.
    """
    folder = shared.parent
    size_changes, layout_changes = chosen(pytestconfig, SIZE_CHANGES), chosen(pytestconfig, LAYOUT_CHANGES)
    halves = {sizes: _stage(folder / f"half-{sizes}", sizes, KILLED) for sizes, _ in size_changes.values()}
    found = {"uninterrupted": TrainedStage(folder / "uninterrupted", 2)}
    found |= {
        model: TrainedStage(folder / model, 2, stage=BALANCE.get(model, {}), model=model)
        for model in {model for model, _, _ in layout_changes.values()}
    }
    found |= {
        f"{name} half": _sliced_stage(folder / f"{name} half", before, KILLED, model)
        for name, (model, before, _) in layout_changes.items()
    }
    train_all(shared, [*found.values(), *halves.values()])
    found |= {f"{name} half": halves[before] for name, (before, _) in size_changes.items()}
    save_first = {"save_after_load": True}
    resumed = {name: _stage(folder / f"{name} resumed", after, save_first) for name, (_, after) in size_changes.items()}
    resumed |= {
        name: _sliced_stage(folder / f"{name} resumed", after, save_first, model)
        for name, (model, _, after) in layout_changes.items()
    }
    for name, stage in resumed.items():
        shutil.copytree(found[f"{name} half"].folder, stage.folder)
    train_all(shared, list(resumed.values()))
    return {**found, **resumed}


def _stage(folder: Path, sizes: tuple[int, ...], faults: dict[str, Any]) -> TrainedStage:
    ranks, zero, *partition = sizes
    keys = {"zero": {"stage": zero, "zero_hpz_partition_size": partition[0]}} if partition else {}
    return TrainedStage(folder, ranks, zero, keys, faults)


def train_all(shared: Path, stages: list[TrainedStage]) -> None:
    """Train all stages; those with the same number of ranks share their processes."""
    for ranks in sorted({stage.ranks for stage in stages}):
        train(shared, *(stage for stage in stages if stage.ranks == ranks))


@pytest.mark.timeout(900)
def test_the_state_has_the_saved_bits(stages: dict[str, TrainedStage], size_change: str):
    """Master weights, both moments and the optimizer's step count, read from a save in the new layout."""
    assert_same_state(stages[f"{size_change} half"], stages[size_change])


def assert_same_state(half: TrainedStage, resumed: TrainedStage, step: int = HALF) -> None:
    """Assert that the checkpoints of a step hold the same tensors, and that there are tensors at all."""
    before, after = half.checkpoint(step), resumed.checkpoint(step)
    assert resumed.ended in ("killed", "finished")
    assert _written_at(after) > _written_at(before), "this is only the copy with which the attempt started"
    assert open_optimizer_state(before).step == open_optimizer_state(after).step == step
    saved = {"masters": open_master_weights(before), **open_optimizer_state(before).moments}
    loaded = {"masters": open_master_weights(after), **open_optimizer_state(after).moments}
    assert set(saved) == set(loaded) == {"masters", "exp_avg", "exp_avg_sq"}
    for kind, tensors in saved.items():
        assert set(tensors) == set(loaded[kind]) and len(tensors) > 30
        for name, tensor in tensors.items():
            assert torch.equal(tensor.read(), loaded[kind][name].read()), (kind, name)


def _written_at(checkpoint: Path) -> float:
    """Return the time of its newest file; a copy keeps that time."""
    return max(path.stat().st_mtime for path in checkpoint.rglob("*") if path.is_file())


def test_no_sample_is_lost_and_losses_are_those_of_the_uninterrupted_run(
    stages: dict[str, TrainedStage], size_change: str
):
    uninterrupted, resharded = stages["uninterrupted"], stages[size_change]
    assert uninterrupted.ended == resharded.ended == "finished"
    assert resharded.sample_ids() == uninterrupted.sample_ids() and len(set(uninterrupted.sample_ids())) == STEPS
    assert resharded.losses() == pytest.approx(uninterrupted.losses(), rel=1e-5)
    assert [row["lr"] for row in resharded.rows()] == [row["lr"] for row in uninterrupted.rows()]
    (resumed,) = resharded.events("resumed")
    assert resumed["step"] == HALF and resumed["layout"] != resumed["saved_layout"]


def _sliced_stage(folder: Path, layout: Layout, faults: dict[str, Any], model: str) -> TrainedStage:
    ranks, zero, axes = layout
    return TrainedStage(folder, ranks, zero, {"parallel": axes, **BALANCE.get(model, {})}, faults, model)


def test_another_layout_has_the_saved_bits(stages: dict[str, TrainedStage], layout_change: str):
    assert_same_state(stages[f"{layout_change} half"], stages[layout_change])


def test_losses_in_another_layout_are_those_of_the_uninterrupted_run(
    stages: dict[str, TrainedStage], layout_change: str
):
    uninterrupted, resharded = stages[LAYOUT_CHANGES[layout_change][0]], stages[layout_change]
    assert resharded.ended == "finished" and resharded.sample_ids() == uninterrupted.sample_ids()
    assert resharded.losses() == pytest.approx(uninterrupted.losses(), rel=1e-5)
