"""PowerSGD on several ranks: it learns like plain reduction, resumes exactly, and a bad step leaves no trace in its state."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.trained_stages import HALF, STEPS, TrainedStage, train

pytestmark = pytest.mark.slow

START = 3
LOSS_BOUND = 1.01
"""Largest end loss with matrices of rank 4 of 64, in units of that with plain reduction."""


def stage(
    folder: Path, ranks: int = 2, zero: int = 1, rank: int = 4, faults: dict[str, Any] | None = None
) -> TrainedStage:
    keys = {
        "communication": {"powersgd": {"rank": rank, "start_step": START}},
        "micro_batch_size": 1,
        "export": "last",
    }
    return TrainedStage(folder, ranks, zero, keys, faults or {})


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainedStage]:
    folder = tmp_path_factory.mktemp("powersgd")
    shared = write_shared_data(folder / "shared")
    killed, poisoned = {"kill_at_step": HALF}, {"poison": {"4": float("nan"), str(HALF): float("nan")}}
    found = {
        "plain": TrainedStage(folder / "plain", 2, 1, {"micro_batch_size": 1}),
        "compressed": stage(folder / "compressed"),
        "ZeRO 0": stage(folder / "zero0", zero=0),
        "bf16": stage(folder / "bf16"),
        "full rank": stage(folder / "full", rank=64),
        "killed": stage(folder / "killed", faults=killed),
        "skip": stage(folder / "skip", faults=poisoned),
        "skip, configured": stage(folder / "configured"),
    }
    found["bf16"].stage["precision"] = "bf16"
    found["skip"].stage["bad_steps"] = {"policy": "skip"}
    found["skip, configured"].stage["skip_batches"] = [4, HALF]
    train(shared, *found.values())
    found["resumed"] = stage(folder / "killed")
    train(shared, found["resumed"])
    more = {"4 ranks": stage(folder / "four", 4), "4 ranks, killed": stage(folder / "4-to-2", 4, faults=killed)}
    train(shared, *more.values())
    found["4 to 2"] = stage(folder / "4-to-2")
    train(shared, found["4 to 2"])
    return found | more


def test_with_full_rank_it_is_the_plain_reduction(stages: dict[str, TrainedStage]):
    assert stages["full rank"].losses() == pytest.approx(stages["plain"].losses(), rel=1e-6)


def test_only_steps_from_start_step_on_are_compressed(stages: dict[str, TrainedStage]):
    plain, compressed = stages["plain"].rows(), stages["compressed"].rows()
    norms = [(a["grad_norm"], b["grad_norm"]) for a, b in zip(plain, compressed, strict=True)]
    assert all(b == pytest.approx(a, rel=1e-6) for a, b in norms[:START])
    changes = [abs(b / a - 1) for a, b in norms[START:]]
    assert min(changes) > 1e-6 and statistics.median(changes) > 1e-4


@pytest.mark.parametrize("name", ["compressed", "4 ranks", "bf16", "4 to 2"])
def test_the_end_loss_is_that_of_plain_reduction(stages: dict[str, TrainedStage], name: str):
    plain, found = stages["plain"].losses(), stages[name].losses()
    assert plain[-1] < 0.9 * plain[0] and len(found) == STEPS
    assert found[-1] <= LOSS_BOUND * plain[-1]


@pytest.mark.parametrize("name", ["4 ranks", "4 to 2"])
def test_the_number_of_ranks_changes_only_rounding(stages: dict[str, TrainedStage], name: str):
    """The compressed tensor is the mean over the ranks of gradients and earlier errors, also after a resume with fewer ranks."""
    assert stages[name].losses() == pytest.approx(stages["compressed"].losses(), rel=1e-4)


def test_zero_0_reduces_like_zero_1(stages: dict[str, TrainedStage]):
    assert stages["ZeRO 0"].losses() == pytest.approx(stages["compressed"].losses(), rel=1e-5)


def test_a_killed_run_resumes_with_the_same_bits(stages: dict[str, TrainedStage]):
    assert stages["killed"].ended == "killed" and stages["resumed"].ended == "finished"
    assert stages["resumed"].losses() == stages["compressed"].losses()
    assert stages["resumed"].master_hashes() == stages["compressed"].master_hashes()


def test_a_bad_step_leaves_no_trace_in_the_compression_error(stages: dict[str, TrainedStage]):
    """Batches with a NaN before and after the start of compression, compared with a run that never read them."""
    assert [row["batch"] for row in stages["skip"].events("bad_step")] == [4, HALF]
    assert stages["skip"].losses() == stages["skip, configured"].losses()
    assert stages["skip"].master_hashes() == stages["skip, configured"].master_hashes()


def powersgd_state(stage: TrainedStage, rank: int) -> dict[str, Any]:
    path = stage.checkpoint(STEPS) / f"trainer-rank-{rank:05d}.pt"
    return torch.load(path, weights_only=True)["powersgd"]


def test_each_rank_keeps_the_error_of_its_own_gradients(stages: dict[str, TrainedStage]):
    first, second = (powersgd_state(stages["compressed"], rank) for rank in (0, 1))
    assert first["iter"] == second["iter"] == STEPS
    for name in ("p_memory_dict", "q_memory_dict"):
        assert torch.equal(first[name][0], second[name][0])
    assert first["error_dict"][0].any() and not torch.equal(first["error_dict"][0], second["error_dict"][0])
