"""The heat map of pairs of nodes: every pair at its place, and only the worst nodes of a large network."""

from __future__ import annotations

from itertools import combinations

from longhaul.artifacts.fabric_report import PairResult
from longhaul.report.plotly_figures import pairs_figure


def pair(first: str, second: str, rate: float) -> PairResult:
    return {"hosts": [first, second], "rail": 0, "bandwidth_gbps": rate, "latency_us": 9.0}


def test_heat_map_shows_each_pair_twice_and_gaps_for_pairs_that_were_not_measured():
    (heat_map,) = pairs_figure(["a", "b", "c"], [pair("a", "b", 3.0), pair("b", "c", 1.0)]).data
    assert heat_map.x == heat_map.y == ("a", "b", "c")
    assert [list(row) for row in heat_map.z] == [[None, 3.0, None], [3.0, None, 1.0], [None, 1.0, None]]


def test_heat_map_of_a_large_network_shows_the_nodes_with_the_slowest_pairs():
    hosts = [f"n{number:03}" for number in range(100)]
    pairs = [pair(a, b, 1.0 if "n077" in (a, b) and a < "n020" else 20.0) for a, b in combinations(hosts, 2)]
    (heat_map,) = pairs_figure(hosts, pairs).data
    assert len(heat_map.x) == len(heat_map.z) == 48
    assert set(hosts[:20]) | {"n077"} <= set(heat_map.x) and list(heat_map.x) == sorted(heat_map.x)
