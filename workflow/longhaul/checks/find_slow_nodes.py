"""Decides from the bandwidths of pairs which node or link is slow: below a share of the usual rate, or losing packets.

A slow node makes all of its pairs slow, so one measurement blames two nodes. The decision is in three steps:

1. The reference is the bandwidth of a typical healthy node: of each node the upper quartile over its pairs, of these the
   median over the nodes. A healthy node has fast pairs as long as it meets healthy nodes, so half of the nodes may be slow.
2. A pair is slow if it is below a share of the reference. A pair that loses packets counts as slow at any bandwidth: the
   bandwidth of such a link changes from moment to moment.
3. The node with the largest share of slow pairs is named, if that is more than half of its pairs. Its pairs are left out, and
   step 3 is repeated. Slow pairs that are left are slow links: both of their nodes are fast with most others.

With two nodes there is one pair and nothing to compare it with.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from longhaul.checks.pair_schedule import Pair
from longhaul.jobs.kinds.fabric_job import FEWEST_COMPARED_NODES

SLOW_SHARES = {"nccl": 0.7, "gloo": 0.3}
"""Backend -> share of the usual bandwidth below which something is slow. Network adapters or PCIe links that run at half of
their rate are far below 0.7. Over gloo the rate depends on the CPU, which other processes may use."""
_REPEATED_PAIRS = 3
LOSSY_SHARE, _LOSSY_RATIO = 0.01, 10.0
"""A healthy link sends less than one of 1,000 segments again; TCP reaches a fraction of a fast link's rate at one of 100."""


@dataclass(frozen=True)
class SlowParts:
    """Slow nodes and links, and the bandwidth of a typical healthy node in the unit of the measurements.

    nodes: index -> median bandwidth of the node's pairs
    links: pair of nodes that are fast with most others -> bandwidth
    """

    reference: float
    nodes: Mapping[int, float]
    links: Mapping[Pair, float]

    def also_in(self, earlier: SlowParts) -> SlowParts:
        """Return the nodes and links that were slow in an earlier decision, too."""
        return SlowParts(
            self.reference,
            {node: bandwidth for node, bandwidth in self.nodes.items() if node in earlier.nodes},
            {pair: bandwidth for pair, bandwidth in self.links.items() if pair in earlier.links},
        )


def find_slow_parts(bandwidths: Mapping[Pair, float], share: float, lossy: Collection[Pair] = frozenset()) -> SlowParts:
    """Return what is slow.

    bandwidths: pair of nodes -> bandwidth in any unit; pairs that were not measured are absent
    share:      a pair is slow below this share of the reference
    lossy:      pairs that lose packets
    """
    by_node = _by_node(bandwidths)
    if len(by_node) < FEWEST_COMPARED_NODES:
        return SlowParts(max(bandwidths.values(), default=0.0), {}, {})
    reference = statistics.median_high(_upper_quartile(list(found.values())) for found in by_node.values())
    slow_pairs = {pair for pair, bandwidth in bandwidths.items() if bandwidth < share * reference or pair in lossy}
    nodes = nodes_of_most_slow_pairs(by_node, slow_pairs)
    links = {pair: bandwidths[pair] for pair in sorted(slow_pairs) if nodes.isdisjoint(pair)}
    medians = {node: statistics.median(by_node[node].values()) for node in sorted(nodes)}
    return SlowParts(reference, medians, links)


def lossy_pairs(resent: Mapping[Pair, float]) -> set[Pair]:
    """Return the pairs that lose packets: many, and many more than most pairs, as a busy network loses packets everywhere.

    resent: pair of nodes -> share of its TCP segments that were sent again
    """
    if not resent:
        return set()
    usual = sorted(resent.values())[len(resent) // 4]  # one of three nodes makes two of three pairs lossy
    return {pair for pair, share in resent.items() if share > max(LOSSY_SHARE, _LOSSY_RATIO * usual)}


def pairs_to_repeat(
    bandwidths: Mapping[Pair, float], slow: SlowParts, repetitions: Mapping[Pair, int] = MappingProxyType({})
) -> list[Pair]:
    """Return the pairs to measure again before anything is named: a busy moment must not cost a node.

    These are the slow links, and of each slow node its fastest pairs with other nodes. Fresh partners come first.

    repetitions: pair -> how often it was measured again
    """
    repeated = list(slow.links)
    for node in slow.nodes:
        pairs = [pair for pair in bandwidths if node in pair and _other(pair, node) not in slow.nodes]
        repeated += sorted(pairs, key=lambda pair: (repetitions.get(pair, 0), -bandwidths[pair]))[:_REPEATED_PAIRS]
    return list(dict.fromkeys(repeated))


def with_repeated(
    bandwidths: Mapping[Pair, float], slow: SlowParts, repeated: Mapping[Pair, float]
) -> dict[Pair, float]:
    """Return the bandwidths for the next decision: of repeated slow nodes only those of the repeated pairs.

    repeated: pair -> its best bandwidth until now
    """
    asked = {node for pair in repeated for node in pair} & set(slow.nodes)
    kept = {pair: value for pair, value in bandwidths.items() if asked.isdisjoint(pair)}
    return kept | dict(repeated)


def _by_node(bandwidths: Mapping[Pair, float]) -> dict[int, dict[Pair, float]]:
    found: dict[int, dict[Pair, float]] = defaultdict(dict)
    for pair, bandwidth in bandwidths.items():
        for node in pair:
            found[node][pair] = bandwidth
    return found


def _upper_quartile(values: list[float]) -> float:
    return sorted(values)[(3 * len(values)) // 4]


def nodes_of_most_slow_pairs(by_node: Mapping[int, Iterable[Pair]], slow_pairs: Iterable[Pair]) -> set[int]:
    """Return the nodes that explain most slow pairs, the worst one first; each one's pairs are left out for the next.

    The pairs of a node's GPUs are judged in this way, too.
    """
    left, named = set(slow_pairs), set[int]()
    counted = {node: set(pairs) for node, pairs in by_node.items()}
    while left:
        shares = {node: len(left & pairs) / len(pairs) for node, pairs in counted.items() if pairs}
        worst = max(shares, key=lambda node: shares[node])
        if shares[worst] <= 0.5:
            break
        named.add(worst)
        gone = counted.pop(worst)
        left -= gone
        counted = {node: pairs - gone for node, pairs in counted.items()}
    return named


def _other(pair: Pair, node: int) -> int:
    return pair[1] if pair[0] == node else pair[0]
