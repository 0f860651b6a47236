"""Straggler detection: the ranks that count as slow, and the work that a timing measures."""

from __future__ import annotations

import torch

from longhaul.train.monitoring.stragglers import RankTiming, matrix_product_s, slow_ranks


def timings(*measured: tuple[float, float]) -> list[RankTiming]:
    return [RankTiming(f"n{rank}", compute_s, wait_s) for rank, (compute_s, wait_s) in enumerate(measured)]


def test_a_rank_that_computes_slowly_is_found_among_two_and_among_many():
    assert slow_ranks(timings((0.010, 0), (0.016, 0)), 0.5, 1.0) == {(1, "compute"): (0.016, 0.010)}
    assert slow_ranks(timings((0.010, 0), (0.014, 0)), 0.5, 1.0) == {}
    assert list(slow_ranks(timings((0.01, 0), (0.05, 0), (0.011, 0), (0.012, 0)), 0.5, 1.0)) == [(1, "compute")]


def test_waiting_for_data_is_compared_with_the_step():
    waiting = timings((0.01, 0.0), (0.01, 0.6), (0.01, 0.1))
    assert list(slow_ranks(waiting, 0.5, 1.0)) == [(1, "reading data")]
    assert slow_ranks(waiting, 0.5, 10.0) == {}


def test_no_rank_is_slow_when_all_are_equal():
    assert slow_ranks(timings((1.0, 5), (1.0, 5), (1.0, 5)), 0.5, 1.0) == {}


def test_the_matrix_product_takes_time():
    assert 0 < matrix_product_s(torch.device("cpu")) < 30
