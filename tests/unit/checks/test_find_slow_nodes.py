"""Decision of the pair tournament: slow nodes and links are named, healthy ones are not, for any noise."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longhaul.checks import find_slow_nodes
from longhaul.checks.find_slow_nodes import SlowParts, lossy_pairs, pairs_to_repeat, with_repeated
from longhaul.checks.pair_schedule import Pair, order_of_rounds, pairs_of_round

RATE, SHARE = 20.0, 0.5


def find_slow_parts(bandwidths: dict[Pair, float]) -> SlowParts:
    return find_slow_nodes.find_slow_parts(bandwidths, SHARE)


def measured(nodes: int, rates: dict[int, float], links: dict[Pair, float], seed: int = 0) -> dict[Pair, float]:
    """Return the bandwidth of every pair: that of its slowest part, less up to 25 % of noise. Others than `rates` have RATE."""
    noise = random.Random(seed)
    return {
        (a, b): min(rates.get(a, RATE), rates.get(b, RATE), links.get((a, b), RATE)) * noise.uniform(0.75, 1.0)
        for a, b in combinations(range(nodes), 2)
    }


@pytest.mark.parametrize("nodes", [3, 4, 5, 7, 8, 9, 32])
@pytest.mark.parametrize(
    ("rates", "links"),
    [
        ({}, {}),
        ({0: 2.0}, {}),
        ({2: 2.0}, {}),
        ({}, {(0, 2): 2.0}),
    ],
)
def test_one_slow_part_is_named(nodes: int, rates: dict[int, float], links: dict[Pair, float]):
    found = find_slow_parts(measured(nodes, rates, links))
    assert (set(found.nodes), set(found.links)) == (set(rates), set(links))
    assert found.reference == pytest.approx(RATE, rel=0.25)


@pytest.mark.parametrize("nodes", [4, 5, 8, 9])
def test_two_slow_nodes_are_named(nodes: int):
    found = find_slow_parts(measured(nodes, {1: 2.0, 3: 0.5}, {}))
    assert set(found.nodes) == {1, 3} and not found.links
    assert found.nodes[1] == pytest.approx(2.0, rel=0.25) and found.nodes[3] == pytest.approx(0.5, rel=0.25)


def test_slow_node_and_slow_link_elsewhere_are_both_named():
    found = find_slow_parts(measured(8, {7: 2.0}, {(0, 1): 2.0}))
    assert set(found.nodes) == {7} and set(found.links) == {(0, 1)}


@given(st.integers(3, 16), st.integers(0, 10**6), st.data())
def test_fewer_than_half_of_the_nodes_being_slow_are_found(nodes: int, seed: int, data: st.DataObject):
    slow = data.draw(st.sets(st.integers(0, nodes - 1), max_size=(nodes - 1) // 2))
    found = find_slow_parts(measured(nodes, dict.fromkeys(slow, RATE / 10), {}, seed))
    assert (set(found.nodes), dict(found.links)) == (slow, {})


@given(st.integers(20, 100), st.integers(0, 10**6), st.data())
def test_sample_of_eight_rounds_finds_one_slow_node(nodes: int, seed: int, data: st.DataObject):
    slow = data.draw(st.integers(0, nodes - 1))
    noise = random.Random(seed)
    sample = [pair for number in order_of_rounds(nodes)[:8] for pair in pairs_of_round(nodes, number)]
    found = find_slow_parts({pair: (2.0 if slow in pair else RATE) * noise.uniform(0.75, 1.0) for pair in sample})
    assert (set(found.nodes), dict(found.links)) == ({slow}, {})


def test_pair_just_above_the_share_is_not_slow():
    for share, slow in ((SHARE * 1.01, set()), (SHARE * 0.99, {(0, 1)})):
        pairs = {pair: 10.0 for pair in combinations(range(6), 2)} | {(0, 1): 10.0 * share}
        assert set(find_slow_parts(pairs).links) == slow


def test_two_nodes_have_nothing_to_be_compared_with():
    found = find_slow_parts({(0, 1): 0.001})
    assert (dict(found.nodes), dict(found.links), found.reference) == ({}, {}, 0.001)
    assert find_slow_parts({}).reference == 0.0


def test_suspects_are_repeated_with_their_fastest_healthy_partners():
    pairs = measured(8, {1: 2.0, 3: 2.0}, {(0, 2): 2.0})
    repeated = pairs_to_repeat(pairs, find_slow_parts(pairs))
    assert repeated[0] == (0, 2) and (1, 3) not in repeated
    assert [sum(node in pair for pair in repeated) for node in (1, 3)] == [3, 3]
    assert pairs_to_repeat(pairs, find_slow_parts(measured(8, {}, {}))) == []


def test_fresh_partners_come_first_then_those_with_the_fewest_repetitions():
    pairs = measured(6, {1: 2.0}, {})
    slow = find_slow_parts(pairs)
    first = pairs_to_repeat(pairs, slow)
    second = pairs_to_repeat(pairs, slow, dict.fromkeys(first, 1))
    assert len(first) == 3 and set(second[:2]) == {pair for pair in pairs if 1 in pair} - set(first)
    assert second[2] == first[0], "of the pairs that were repeated, the fastest one"


def test_only_what_was_slow_earlier_too_stays():
    earlier = find_slow_parts(measured(8, {1: 2.0, 3: 2.0}, {(0, 2): 2.0}))
    now = find_slow_parts(measured(8, {3: 1.0, 5: 2.0}, {(0, 2): 2.0, (4, 6): 2.0}))
    both = now.also_in(earlier)
    assert both.nodes == {3: now.nodes[3]} and set(both.links) == {(0, 2)} and both.reference == now.reference


@pytest.mark.parametrize(("again", "named"), [(2.0, {1}), (19.0, set())])
def test_node_is_named_only_if_it_is_slow_in_the_second_measurement_too(again: float, named: set[int]):
    pairs = measured(8, {1: 2.0}, {})
    suspected = find_slow_parts(pairs)
    repeated = dict.fromkeys(pairs_to_repeat(pairs, suspected), again)
    found = find_slow_parts(with_repeated(pairs, suspected, repeated))
    assert (set(found.nodes), dict(found.links)) == (named, {})


def test_link_is_named_only_if_it_is_slow_in_the_second_measurement_too():
    pairs = measured(5, {}, {(0, 4): 1.0})
    suspected = find_slow_parts(pairs)
    assert set(find_slow_parts(with_repeated(pairs, suspected, {(0, 4): 1.5})).links) == {(0, 4)}
    assert not find_slow_parts(with_repeated(pairs, suspected, {(0, 4): 15.0})).links


def test_slow_node_that_was_not_measured_again_stays_named():
    pairs = measured(8, {1: 2.0, 3: 2.0}, {})
    found = find_slow_parts(with_repeated(pairs, find_slow_parts(pairs), {(0, 1): 19.0, (1, 2): 18.0, (1, 4): 18.0}))
    assert set(found.nodes) == {3}


@pytest.mark.parametrize("nodes", [3, 4, 8, 9])
@pytest.mark.parametrize(("usual", "of_one_node", "is_lossy"), [
    (0.0, 0.011, True), (0.0, 0.009, False), (0.001, 0.012, True), (0.002, 0.019, False), (0.03, 0.31, True), (0.03, 0.29, False)
])  # fmt: skip
def test_loss_is_compared_with_that_of_the_other_pairs(nodes: int, usual: float, of_one_node: float, is_lossy: bool):
    pairs = {pair: of_one_node if 1 in pair else usual for pair in combinations(range(nodes), 2)}
    assert lossy_pairs(pairs) == ({pair for pair in pairs if 1 in pair} if is_lossy else set())
    found = find_slow_nodes.find_slow_parts(dict.fromkeys(pairs, RATE), SHARE, lossy_pairs(pairs))
    assert set(found.nodes) == ({1} if is_lossy else set()) and not found.links


def test_nothing_measured_loses_nothing():
    assert lossy_pairs({}) == set()
