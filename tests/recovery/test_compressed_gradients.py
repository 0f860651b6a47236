"""Low-rank gradients on real ranks: as good as whole ones where they can be, exactly resumed, and untouched by a bad step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.parity_table import make_data
from tests.recovery.trained_stages import HALF, STEPS, Leg, train

START = 3
LOSS_BOUND = 1.01
"""End loss at rank 4 of 64, in units of that with whole gradients."""


def leg(folder: Path, ranks: int = 2, zero: int = 1, rank: int = 4, befalls: dict[str, Any] | None = None) -> Leg:
    stage = {
        "communication": {"powersgd": {"rank": rank, "start_step": START}},
        "micro_batch_size": 1,
        "export": "last",
    }
    return Leg(folder, ranks, zero, stage, befalls or {})


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Leg]:
    folder = tmp_path_factory.mktemp("powersgd")
    shared = make_data(folder / "shared")
    stopped, skip = {"stop_after": HALF}, {"poison": {"4": float("nan"), str(HALF): float("nan")}}
    found = {
        "plain": Leg(folder / "plain", 2, 1, {"micro_batch_size": 1}),
        "whole": leg(folder / "whole"),
        "ZeRO 0": leg(folder / "zero0", zero=0),
        "bf16": leg(folder / "bf16"),
        "full rank": leg(folder / "full", rank=64),
        "half": leg(folder / "cut", befalls=stopped),
        "skip": leg(folder / "skip", befalls=skip),
        "told before": leg(folder / "told"),
    }
    found["bf16"].stage["precision"] = "bf16"
    found["skip"].stage["bad_steps"] = {"policy": "skip"}
    found["told before"].stage["skip_batches"] = [4, HALF]
    train(shared, *found.values())
    found["resumed"] = leg(folder / "cut")
    train(shared, found["resumed"])
    more = {"4 ranks": leg(folder / "four", 4), "half of 4": leg(folder / "less", 4, befalls=stopped)}
    train(shared, *more.values())
    found["4 to 2"] = leg(folder / "less")
    train(shared, found["4 to 2"])
    return found | more


def test_where_nothing_is_worth_compressing_it_is_the_plain_reduction(legs: dict[str, Leg]):
    assert legs["full rank"].losses() == pytest.approx(legs["plain"].losses(), rel=1e-6)


def test_steps_before_the_start_are_whole_and_the_others_are_not(legs: dict[str, Leg]):
    plain, compressed = legs["plain"].rows(), legs["whole"].rows()
    norms = [(a["grad_norm"], b["grad_norm"]) for a, b in zip(plain, compressed, strict=True)]
    assert all(b == pytest.approx(a, rel=1e-6) for a, b in norms[:START])
    assert all(abs(b / a - 1) > 1e-5 for a, b in norms[START:])


@pytest.mark.parametrize("name", ["whole", "4 ranks", "bf16", "4 to 2"])
def test_the_end_loss_is_as_good(legs: dict[str, Leg], name: str):
    plain, found = legs["plain"].losses(), legs[name].losses()
    assert plain[-1] < 0.9 * plain[0] and len(found) == STEPS
    assert found[-1] <= LOSS_BOUND * plain[-1]


@pytest.mark.parametrize("name", ["4 ranks", "4 to 2"])
def test_the_number_of_ranks_changes_roundings_alone(legs: dict[str, Leg], name: str):
    """What is compressed is the mean of all gradients and of what was lost of them before, also after a move to fewer ranks."""
    assert legs[name].losses() == pytest.approx(legs["whole"].losses(), rel=1e-4)


def test_zero_0_reduces_the_same(legs: dict[str, Leg]):
    assert legs["ZeRO 0"].losses() == pytest.approx(legs["whole"].losses(), rel=1e-5)


def test_a_run_that_was_cut_off_goes_on_with_the_same_bits(legs: dict[str, Leg]):
    assert legs["half"].ended == "killed" and legs["resumed"].ended == "finished"
    assert legs["resumed"].losses() == legs["whole"].losses()
    assert legs["resumed"].masters() == legs["whole"].masters()


def test_a_refused_step_leaves_nothing_in_what_is_added_to_the_next(legs: dict[str, Leg]):
    """Batches with a NaN before and after compression has begun, against a run that never saw them."""
    assert [row["batch"] for row in legs["skip"].events("bad_step")] == [4, HALF]
    assert legs["skip"].losses() == legs["told before"].losses()
    assert legs["skip"].masters() == legs["told before"].masters()


def own_state(leg: Leg, rank: int) -> dict[str, Any]:
    path = leg.weights / f"checkpoints/step-{STEPS:08d}/trainer-rank-{rank:05d}.pt"
    return torch.load(path, weights_only=True)["low_rank"]


def test_each_rank_keeps_what_its_own_gradients_lost(legs: dict[str, Leg]):
    first, second = (own_state(legs["whole"], rank) for rank in (0, 1))
    assert first["iter"] == second["iter"] == STEPS
    for name in ("p_memory_dict", "q_memory_dict"):
        assert torch.equal(first[name][0], second[name][0])
    assert first["error_dict"][0].any() and not torch.equal(first["error_dict"][0], second["error_dict"][0])
