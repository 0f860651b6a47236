"""Holds the measurements of the pair tournament and says which nodes and links are slow, rail by rail. Needs no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longhaul.artifacts.fabric_report import PairResult, SlowNode
from longhaul.checks.find_slow_nodes import SlowParts, find_slow_parts, pairs_to_repeat, with_repeated
from longhaul.checks.pair_schedule import Pair

RailPair = tuple[int, int, int]
"""Rail, first node, second node."""


@dataclass(frozen=True)
class PairMeasurement:
    """bandwidth_gbps: GB/s (10^9 bytes) in each direction; latency_us: median time of an exchange of 8 bytes."""

    bandwidth_gbps: float
    latency_us: float
    correct: bool


class PairEvidence:
    """The measurements of a tournament on rank 0, and what follows from them. On other ranks it is empty."""

    def __init__(self, measured: Mapping[RailPair, PairMeasurement], slow_share: float) -> None:
        self._measured = dict(measured)
        self._share = slow_share
        self._rails = _by_rail(measured)
        """Rail -> the bandwidths that decide: of a suspicious node only those that were measured again."""

    def suspects(self) -> list[Pair]:
        """Return the pairs to measure again, of all rails."""
        pairs = (pairs_to_repeat(rail, self._slow_parts(rail)) for rail in self._rails.values())
        return list(dict.fromkeys(pair for found in pairs for pair in found))

    def add(self, repeated: Mapping[RailPair, PairMeasurement]) -> None:
        """Add further measurements of suspicious pairs. A pair is as good as its best measurement."""
        for rail, answers in _by_rail(repeated).items():
            before = self._rails[rail]
            slow = self._slow_parts(before)
            asked = set(pairs_to_repeat(before, slow))
            own = {pair: bandwidth for pair, bandwidth in answers.items() if pair in asked}
            self._rails[rail] = with_repeated(before, slow, own)
        for pair, found in repeated.items():
            self._measured[pair] = _better(self._measured[pair], found)

    def slow_nodes(self, hosts: Sequence[str]) -> list[SlowNode]:
        """Return each node that is slow on a rail, with its slowest rail."""
        found: dict[str, SlowNode] = {}
        for rail, pairs in sorted(self._rails.items()):
            parts = self._slow_parts(pairs)
            for node, bandwidth in parts.nodes.items():
                host = hosts[node]
                rails = [*found[host]["rails"], rail] if host in found else [rail]
                row = SlowNode(host=host, rails=rails, bandwidth_gbps=bandwidth, usual_bandwidth_gbps=parts.reference)
                is_slowest = host not in found or bandwidth < found[host]["bandwidth_gbps"]
                found[host] = row if is_slowest else {**found[host], "rails": rails}
        return list(found.values())

    def wrong_values(self, hosts: Sequence[str]) -> list[str]:
        """Return one line per pair that received other values than were sent."""
        return [
            f"{hosts[first]} and {hosts[second]} received wrong values from each other (rail {rail})"
            for (rail, first, second), found in sorted(self._measured.items())
            if not found.correct
        ]

    def slow_links(self, hosts: Sequence[str]) -> list[str]:
        """Return one line per slow link."""
        lines = []
        for rail, pairs in sorted(self._rails.items()):
            parts = self._slow_parts(pairs)
            lines += [
                f"the link between {hosts[first]} and {hosts[second]} is slow: {bandwidth:.3g} GB/s on rail {rail}, "
                f"usual are {parts.reference:.3g} GB/s; both nodes are fast with most others"
                for (first, second), bandwidth in parts.links.items()
            ]
        return lines

    def pair_results(self, hosts: Sequence[str]) -> list[PairResult]:
        """Return the slowest rail of each pair of nodes."""
        slowest: dict[Pair, PairResult] = {}
        for (rail, first, second), found in sorted(self._measured.items()):
            row = PairResult(
                hosts=[hosts[first], hosts[second]],
                rail=rail,
                bandwidth_gbps=round(found.bandwidth_gbps, 4),
                latency_us=round(found.latency_us, 1),
            )
            known = slowest.get((first, second))
            if known is None or row["bandwidth_gbps"] < known["bandwidth_gbps"]:
                slowest[first, second] = row
        return list(slowest.values())

    def _slow_parts(self, bandwidths: Mapping[Pair, float]) -> SlowParts:
        return find_slow_parts(bandwidths, self._share)


def _by_rail(measured: Mapping[RailPair, PairMeasurement]) -> dict[int, dict[Pair, float]]:
    """Return rail -> pair of nodes -> bandwidth in GB/s."""
    rails: dict[int, dict[Pair, float]] = defaultdict(dict)
    for (rail, first, second), found in measured.items():
        rails[rail][first, second] = found.bandwidth_gbps
    return rails


def _better(one: PairMeasurement, other: PairMeasurement) -> PairMeasurement:
    """Return the better bandwidth and latency of two measurements; wrong values stay wrong."""
    return PairMeasurement(
        max(one.bandwidth_gbps, other.bandwidth_gbps),
        min(one.latency_us, other.latency_us),
        one.correct and other.correct,
    )


def slow_node_line(node: SlowNode) -> str:
    """Return a sentence about a slow node."""
    return (
        f"{node['host']} is slow with most other nodes: {node['bandwidth_gbps']:.3g} GB/s, usual are "
        f"{node['usual_bandwidth_gbps']:.3g} GB/s (rails: {', '.join(map(str, node['rails']))})"
    )
