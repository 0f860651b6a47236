"""Holds the measurements of the pair tournament and says which nodes and links are slow, rail by rail. Needs no torch."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from longhaul.artifacts.fabric_report import PairResult, SlowNode
from longhaul.checks.find_slow_nodes import (
    LOSSY_SHARE,
    SlowParts,
    find_slow_parts,
    lossy_pairs,
    pairs_to_repeat,
    with_repeated,
)
from longhaul.checks.packet_loss import grown_text
from longhaul.checks.pair_schedule import Pair

RailPair = tuple[int, int, int]
"""Rail, first node, second node."""


@dataclass(frozen=True)
class PairMeasurement:
    """One measurement of two nodes.

    bandwidth_gbps: GB/s (10^9 bytes) in each direction
    latency_us:     median time of an exchange of 8 bytes
    resent:         share of the TCP segments that the worse of the two nodes sent again
    """

    bandwidth_gbps: float
    latency_us: float
    correct: bool
    resent: float = 0.0


class PairEvidence:
    """The measurements of a tournament on rank 0, and what follows from them. On other ranks it is empty."""

    def __init__(self, measured: Mapping[RailPair, PairMeasurement], slow_share: float) -> None:
        self._measured = dict(measured)
        self._share = slow_share
        self._rails = _by_rail(measured)
        """Rail -> the bandwidths that decide: of a suspicious node only those of the last repetition."""
        self._slow = self._find_slow_parts()
        """Rail -> what was slow in the first measurement and in every repetition."""
        self._repetitions = dict.fromkeys(self._measured, 0)

    def suspects(self) -> list[Pair]:
        """Return the pairs to measure again, of all rails."""
        best = _by_rail(self._measured)
        return list(dict.fromkeys(pair for rail in best for pair in self._suspects_of(rail, best[rail])))

    def add(self, repeated: Mapping[RailPair, PairMeasurement]) -> None:
        """Add a repetition of the suspicious pairs. A pair is as good as its best measurement.

        A node is fit as soon as it is fast in one repetition: nothing is named that was not slow in all of them.
        """
        best = _by_rail(self._measured)
        asked = {rail: self._suspects_of(rail, best[rail]) for rail in best}
        for pair, found in repeated.items():
            self._measured[pair] = _better(self._measured[pair], found)
            self._repetitions[pair] += 1
        best = _by_rail(self._measured)
        for rail, answers in _by_rail(repeated).items():
            own = {pair: best[rail][pair] for pair in asked[rail] if pair in answers}
            self._rails[rail] = with_repeated(self._rails[rail], self._slow[rail], own)
        now = self._find_slow_parts()
        self._slow = {rail: now[rail].also_in(earlier) for rail, earlier in self._slow.items()}

    def slow_nodes(self, hosts: Sequence[str]) -> list[SlowNode]:
        """Return each node that is slow on a rail, with its slowest rail."""
        found: dict[str, SlowNode] = {}
        for rail, parts in sorted(self._slow.items()):
            for node, bandwidth in parts.nodes.items():
                host = hosts[node]
                rails = [*found[host]["rails"], rail] if host in found else [rail]
                row = SlowNode(
                    host=host,
                    rails=rails,
                    bandwidth_gbps=bandwidth,
                    usual_bandwidth_gbps=parts.reference,
                    resent=self._usually_resent(rail, node),
                )
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
        for rail, parts in sorted(self._slow.items()):
            for (first, second), bandwidth in parts.links.items():
                kind = "is slow" + loss_text(self._measured[rail, first, second].resent)
                lines.append(
                    f"the link between {hosts[first]} and {hosts[second]} {kind}: {bandwidth:.3g} GB/s on rail {rail}, "
                    f"usual are {parts.reference:.3g} GB/s; both nodes are fast with most others"
                )
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
                resent=round(found.resent, 4),
            )
            known = slowest.get((first, second))
            if known is None or row["bandwidth_gbps"] < known["bandwidth_gbps"]:
                slowest[first, second] = row
        return list(slowest.values())

    def _find_slow_parts(self) -> dict[int, SlowParts]:
        resent = _by_rail(self._measured, "resent")
        return {
            rail: find_slow_parts(pairs, self._share, lossy_pairs(resent[rail])) for rail, pairs in self._rails.items()
        }

    def _usually_resent(self, rail: int, node: int) -> float:
        """Return the median over a node's pairs of the share of segments that were sent again."""
        pairs = self._rails[rail]
        return round(statistics.median(self._measured[rail, *pair].resent for pair in pairs if node in pair), 4)

    def _suspects_of(self, rail: int, best: Mapping[Pair, float]) -> list[Pair]:
        """Return the pairs of one rail to measure again. best: pair -> its best bandwidth on this rail."""
        repetitions = {pair: self._repetitions[rail, *pair] for pair in best}
        return pairs_to_repeat(best, self._slow[rail], repetitions)


def _by_rail(
    measured: Mapping[RailPair, PairMeasurement], value: str = "bandwidth_gbps"
) -> dict[int, dict[Pair, float]]:
    """Return rail -> pair of nodes -> this value of the measurement."""
    rails: dict[int, dict[Pair, float]] = defaultdict(dict)
    for (rail, first, second), found in measured.items():
        rails[rail][first, second] = getattr(found, value)
    return rails


def _better(one: PairMeasurement, other: PairMeasurement) -> PairMeasurement:
    """Return the better bandwidth, latency and loss of two measurements; wrong values stay wrong."""
    return PairMeasurement(
        max(one.bandwidth_gbps, other.bandwidth_gbps),
        min(one.latency_us, other.latency_us),
        one.correct and other.correct,
        min(one.resent, other.resent),
    )


def slow_node_line(node: SlowNode, grown: Mapping[str, int] = MappingProxyType({})) -> str:
    """Return a sentence about a slow node. grown: its error counters that grew during the tournament."""
    return f"{node['host']} is {slow_node_text(node, grown)}"


def slow_node_text(node: SlowNode, grown: Mapping[str, int] = MappingProxyType({})) -> str:
    """Return the sentence without its subject."""
    counters = f"; errors since the check began: {grown_text(grown)}" if grown else ""
    return (
        f"slow with most other nodes{loss_text(node.get('resent', 0.0))}: {node['bandwidth_gbps']:.3g} GB/s, "
        f"usual are {node['usual_bandwidth_gbps']:.3g} GB/s (rails: {', '.join(map(str, node['rails']))}){counters}"
    )


def loss_text(resent: float) -> str:
    """Return the loss of packets as part of a sentence; "" if it is that of a healthy link."""
    return f" and loses packets ({resent:.0%} of TCP's segments were sent again)" if resent > LOSSY_SHARE else ""
