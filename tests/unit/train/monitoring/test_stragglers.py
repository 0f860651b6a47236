"""Who is slower than the others, of what they measured; and that the measure is one."""

from __future__ import annotations

import torch

from longhaul.train.monitoring.stragglers import Pace, product_s, slow_ranks


def paces(*measured: tuple[float, float]) -> list[Pace]:
    return [Pace(f"n{rank}", compute_s, wait_s) for rank, (compute_s, wait_s) in enumerate(measured)]


def test_one_that_computes_slowly_is_found_of_two_and_of_many():
    assert slow_ranks(paces((0.010, 0), (0.016, 0)), 0.5, 1.0) == {(1, "compute"): (0.016, 0.010)}
    assert slow_ranks(paces((0.010, 0), (0.014, 0)), 0.5, 1.0) == {}
    assert list(slow_ranks(paces((0.01, 0), (0.05, 0), (0.011, 0), (0.012, 0)), 0.5, 1.0)) == [(1, "compute")]


def test_one_that_waits_for_its_data_is_judged_by_the_step():
    waiting = paces((0.01, 0.0), (0.01, 0.6), (0.01, 0.1))
    assert list(slow_ranks(waiting, 0.5, 1.0)) == [(1, "reading data")]
    assert slow_ranks(waiting, 0.5, 10.0) == {}


def test_all_slow_is_nobody():
    assert slow_ranks(paces((1.0, 5), (1.0, 5), (1.0, 5)), 0.5, 1.0) == {}


def test_the_product_takes_time():
    assert 0 < product_s(torch.device("cpu")) < 30
