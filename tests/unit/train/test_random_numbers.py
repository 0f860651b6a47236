"""The random stream of a step follows from seed, step and rank."""

from __future__ import annotations

from itertools import combinations

import torch

from longhaul.train.random_numbers import seed_random_numbers


def drawn(seed: int, step: int, rank: int) -> list[float]:
    seed_random_numbers(seed, step, rank)
    return torch.rand(4).tolist()


def test_equal_seed_step_and_rank_draw_equal_numbers():
    assert drawn(1, 0, 0) == drawn(1, 0, 0)
    torch.rand(100)
    assert drawn(1, 7, 3) == drawn(1, 7, 3), "independent of earlier draws"


def test_seed_step_and_rank_each_change_the_numbers():
    cases = [drawn(*case) for case in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1, 10, 1), (11, 0, 1))]
    assert all(a != b for a, b in combinations(cases, 2))
