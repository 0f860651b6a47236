"""The schedule of the pair tournament: every pair once, disjoint rounds, bounded time."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longhaul.checks.pair_schedule import (
    disjoint_rounds,
    number_of_rounds,
    order_of_rounds,
    pairs_of_round,
    planned_repetition_seconds,
    planned_rounds,
    planned_seconds,
)


@pytest.mark.parametrize("nodes", range(33))
def test_every_node_meets_every_other_node_once(nodes: int):
    rounds = [pairs_of_round(nodes, number) for number in order_of_rounds(nodes)]
    assert sorted(chain(*rounds)) == list(combinations(range(nodes), 2))
    assert all(len(pairs) == nodes // 2 == len(set(chain(*pairs))) // 2 for pairs in rounds)
    assert len(rounds) == number_of_rounds(nodes)


@pytest.mark.parametrize(("nodes", "rounds"), [(0, 0), (1, 0), (2, 1), (3, 3), (4, 3), (8, 7), (9, 9), (1000, 999)])
def test_number_of_rounds(nodes: int, rounds: int):
    assert number_of_rounds(nodes) == rounds


def test_thousand_nodes_take_less_than_fifteen_minutes():
    assert planned_seconds(1000, 300.0) == pytest.approx(299.7)
    assert planned_seconds(10_000, 300.0) == pytest.approx(300.0)
    assert planned_rounds(10_000, 300.0) == 1000


@pytest.mark.parametrize(
    ("nodes", "seconds"), [(2, 0.0), (3, 12 + 3 * 3 * 0.3), (8, 12 + 3 * 7 * 0.3), (1000, 12 + 3 * 16 * 0.3)]
)
def test_repetitions_of_slow_pairs_are_bounded_with_their_pauses(nodes: int, seconds: float):
    assert planned_repetition_seconds(nodes) == pytest.approx(seconds)
    assert planned_seconds(1000, 20.0) + planned_repetition_seconds(1000) < 60


def test_small_budget_still_gives_each_node_some_partners():
    assert planned_rounds(1000, 0.0) == 8
    assert planned_rounds(4, 0.0) == 3
    assert planned_seconds(1, 300.0) == 0.0


def test_first_rounds_of_a_large_network_do_not_meet_neighbours_only():
    """A sample of ten rounds must reach partners all over the network, not those of one switch."""
    partners = {
        second if first == 0 else first
        for number in order_of_rounds(1000)[:10]
        for first, second in pairs_of_round(1000, number)
        if 0 in (first, second)
    }
    assert len(partners) == 10 and len({partner // 100 for partner in partners}) >= 7


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(10, 19)), max_size=30))
def test_given_pairs_are_played_once_in_disjoint_rounds(pairs: list[tuple[int, int]]):
    rounds = list(disjoint_rounds(pairs))
    assert sorted(chain(*rounds)) == sorted(set(pairs))
    assert all(len(set(chain(*played))) == 2 * len(played) for played in rounds)
