"""Conclusions from the measurements of a pair tournament: nodes, rails and links by name, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from types import MappingProxyType

import pytest

from longhaul.checks.pair_evidence import PairEvidence, PairMeasurement, RailPair, slow_node_line

HOSTS = ("n1", "n2", "n3", "n4")
RAILS = 2


def measured(
    slow: Mapping[RailPair, float] = MappingProxyType({}), wrong: RailPair | None = None
) -> dict[RailPair, PairMeasurement]:
    """Return measurements of two rails of four nodes: 20 GB/s and 30 us, except for `slow` pairs."""
    pairs = [(rail, *pair) for rail in range(RAILS) for pair in combinations(range(len(HOSTS)), 2)]
    return {pair: PairMeasurement(slow.get(pair, 20.0), 30.0, pair != wrong) for pair in pairs}


def pairs_of(node: int, *rails: int) -> list[RailPair]:
    return [pair for pair in measured() if pair[0] in rails and node in pair[1:]]


def test_healthy_nodes_have_no_suspects_and_no_problems():
    evidence = PairEvidence(measured(), 0.7)
    assert (evidence.suspects(), evidence.slow_nodes(HOSTS)) == ([], [])
    assert (evidence.slow_links(HOSTS), evidence.wrong_values(HOSTS)) == ([], [])
    results = evidence.pair_results(HOSTS)
    assert [row["hosts"] for row in results] == [list(pair) for pair in combinations(HOSTS, 2)]
    healthy = {"hosts": ["n1", "n2"], "rail": 0, "bandwidth_gbps": 20.0, "latency_us": 30.0, "resent": 0.0}
    assert results[0] == healthy


def test_slow_adapter_is_named_with_its_node_and_rail():
    evidence = PairEvidence(measured(dict.fromkeys(pairs_of(2, 1), 12.0)), 0.7)
    assert evidence.slow_nodes(HOSTS) == [
        {"host": "n3", "rails": [1], "bandwidth_gbps": 12.0, "usual_bandwidth_gbps": 20.0, "resent": 0.0}
    ]
    assert slow_node_line(evidence.slow_nodes(HOSTS)[0]) == (
        "n3 is slow with most other nodes: 12 GB/s, usual are 20 GB/s (rails: 1)"
    )
    assert evidence.pair_results(HOSTS)[1] == {
        "hosts": ["n1", "n3"],
        "rail": 1,
        "bandwidth_gbps": 12.0,
        "latency_us": 30.0,
        "resent": 0.0,
    }


def test_node_that_is_slow_on_both_rails_is_named_once_with_the_slowest():
    slow = dict.fromkeys(pairs_of(0, 0), 9.0) | dict.fromkeys(pairs_of(0, 1), 3.0)
    (node,) = PairEvidence(measured(slow), 0.7).slow_nodes(HOSTS)
    assert node == {
        "host": "n1",
        "rails": [0, 1],
        "bandwidth_gbps": 3.0,
        "usual_bandwidth_gbps": 20.0,
        "resent": 0.0,
    }


def test_slow_link_is_named_with_both_nodes():
    assert PairEvidence(measured({(0, 1, 3): 2.0}), 0.7).slow_links(HOSTS) == [
        "the link between n2 and n4 is slow: 2 GB/s on rail 0, usual are 20 GB/s; both nodes are fast with most others"
    ]


def test_wrong_values_are_named_even_if_a_later_measurement_is_right():
    evidence = PairEvidence(measured(wrong=(1, 0, 2)), 0.7)
    evidence.add({(1, 0, 2): PairMeasurement(20.0, 30.0, True)})
    assert evidence.wrong_values(HOSTS) == ["n1 and n3 received wrong values from each other (rail 1)"]


def test_node_that_is_fast_in_a_repetition_is_fit_while_another_one_stays_slow():
    evidence = PairEvidence(measured(dict.fromkeys(pairs_of(1, 0), 4.0) | dict.fromkeys(pairs_of(2, 0), 4.0)), 0.7)
    assert [node["host"] for node in evidence.slow_nodes(HOSTS)] == ["n2", "n3"]
    rates = [(0, 1, 4.0), (1, 3, 4.0), (0, 2, 20.0), (2, 3, 20.0)]
    evidence.add({(0, first, second): PairMeasurement(rate, 30.0, True) for first, second, rate in rates})
    assert [node["host"] for node in evidence.slow_nodes(HOSTS)] == ["n2"]
    assert evidence.suspects() == [(1, 2), (0, 1), (1, 3)], "n3 is fit now, and a fresh partner for n2"


@pytest.mark.parametrize(("again", "named"), [(13.9, ["n2"]), (14.1, [])])
def test_suspects_are_cleared_by_a_good_measurement(again: float, named: list[str]):
    evidence = PairEvidence(measured(dict.fromkeys(pairs_of(1, 0), 4.0)), 0.7)
    suspects = evidence.suspects()
    assert sorted(suspects) == [(0, 1), (1, 2), (1, 3)]
    evidence.add({(rail, *pair): PairMeasurement(again, 20.0, True) for pair in suspects for rail in range(RAILS)})
    assert [node["host"] for node in evidence.slow_nodes(HOSTS)] == named
    assert evidence.suspects() == (suspects if named else [])
    assert evidence.pair_results(HOSTS)[0] == {
        "hosts": ["n1", "n2"],
        "rail": 0,
        "bandwidth_gbps": again,
        "latency_us": 20.0,
        "resent": 0.0,
    }


def with_loss(pairs: list[RailPair], share: float, bandwidth: float = 15.0) -> dict[RailPair, PairMeasurement]:
    """Return measurements in which some pairs send this share of their segments again, and are nearly as fast as others."""
    return measured() | {pair: PairMeasurement(bandwidth, 30.0, True, share) for pair in pairs}


def test_node_that_loses_packets_is_named_at_any_bandwidth_and_stays_named():
    """A lossy link is slow in one moment and fast in the next. It loses packets in all of them."""
    evidence = PairEvidence(with_loss(pairs_of(1, 0), 0.2), 0.3)
    suspects = evidence.suspects()
    assert sorted(suspects) == [(0, 1), (1, 2), (1, 3)]
    evidence.add({(0, *pair): PairMeasurement(20.0, 30.0, True, 0.15) for pair in suspects})
    (node,) = evidence.slow_nodes(HOSTS)
    assert (node["host"], node.get("resent"), evidence.slow_links(HOSTS)) == ("n2", 0.15, [])
    assert slow_node_line(node, {"eth0 rx_crc_errors": 1234}) == (
        "n2 is slow with most other nodes and loses packets (15% of TCP's segments were sent again): 20 GB/s, usual are 20 GB/s "
        "(rails: 0); errors since the check began: eth0 rx_crc_errors +1,234"
    )


def test_node_without_loss_in_a_repetition_is_fit():
    evidence = PairEvidence(with_loss(pairs_of(1, 0), 0.2), 0.3)
    evidence.add({(0, *pair): PairMeasurement(15.0, 30.0, True, 0.0) for pair in evidence.suspects()})
    assert (evidence.slow_nodes(HOSTS), evidence.slow_links(HOSTS), evidence.suspects()) == ([], [], [])


def test_link_that_loses_packets_is_named_with_both_nodes():
    assert PairEvidence(with_loss([(1, 0, 2)], 0.25), 0.3).slow_links(HOSTS) == [
        "the link between n1 and n3 is slow and loses packets (25% of TCP's segments were sent again): 15 GB/s on rail 1, "
        "usual are 20 GB/s; both nodes are fast with most others"
    ]


@pytest.mark.parametrize("share", [0.0005, 0.009, 0.5])
def test_network_that_loses_packets_everywhere_has_no_bad_node(share: float):
    evidence = PairEvidence(with_loss(list(measured()), share), 0.3)
    assert (evidence.suspects(), evidence.slow_nodes(HOSTS)) == ([], [])
