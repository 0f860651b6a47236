"""Schedules the pair tournament: which nodes exchange messages in which round, in which order, and how long it will take.

Round-robin by the circle method: with n nodes (n + 1 if n is odd), place n - 1 stays where it is, and the other places are
numbers modulo n - 1. In round r the places whose sum is r modulo n - 1 meet. In n - 1 rounds every node meets every other
node once, and all pairs of a round are disjoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import gcd

from longhaul.checks.repetition_pauses import REPETITION_PAUSES_S
from longhaul.jobs.kinds.fabric_job import FEWEST_COMPARED_NODES

Pair = tuple[int, int]
"""Indices of two nodes, the smaller one first."""

ROUND_S = 0.3
"""Planned duration of a round in seconds; the first connection between two nodes included."""
_GOLDEN_RATIO = 0.618
_FEWEST_ROUNDS = 8
"""With fewer partners a healthy node could meet mostly slow ones."""
MOST_REPEATED_ROUNDS = 16
"""Most rounds of one repetition of suspicious pairs."""


def number_of_rounds(nodes: int) -> int:
    """Return how many rounds it takes until every node has met every other node."""
    return 0 if nodes < 2 else nodes - 1 + nodes % 2


def pairs_of_round(nodes: int, number: int) -> list[Pair]:
    """Return the disjoint pairs of one round. With an odd number of nodes one node pauses."""
    rounds = number_of_rounds(nodes)
    pairs: list[Pair] = []
    for first in range(rounds):
        second = (number - first) % rounds
        if first < second:
            pairs.append((first, second))
        elif first == second and rounds < nodes:  # it meets the place that stays, which is empty for an odd number
            pairs.append((first, rounds))
    return pairs


def order_of_rounds(nodes: int) -> list[int]:
    """Return the numbers of all rounds so that the first ones are an even sample.

    Neighbouring rounds let a node meet neighbouring nodes, which often share a switch. So the order takes large steps.
    """
    rounds = number_of_rounds(nodes)
    step = max(1, round(rounds * _GOLDEN_RATIO))
    while gcd(step, max(1, rounds)) != 1:
        step += 1
    return [(index * step) % rounds for index in range(rounds)]


def planned_rounds(nodes: int, budget_s: float) -> int:
    """Return how many rounds fit into the budget by plan. Fewer than number_of_rounds: a sample of the pairs."""
    return min(number_of_rounds(nodes), max(_FEWEST_ROUNDS, int(budget_s / ROUND_S)))


def planned_seconds(nodes: int, budget_s: float) -> float:
    """Return the planned duration of a tournament in seconds, the repetitions of suspicious pairs apart."""
    return planned_rounds(nodes, budget_s) * ROUND_S if nodes > 1 else 0.0


def planned_repetition_seconds(nodes: int) -> float:
    """Return the planned duration of all repetitions of suspicious pairs in seconds, the pauses before them included."""
    if nodes < FEWEST_COMPARED_NODES:
        return 0.0
    rounds = min(MOST_REPEATED_ROUNDS, number_of_rounds(nodes))
    return sum(REPETITION_PAUSES_S) + len(REPETITION_PAUSES_S) * rounds * ROUND_S


def disjoint_rounds(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Yield rounds that contain each of the given pairs once. No node is in two pairs of a round."""
    left = list(dict.fromkeys(pairs))
    while left:
        busy: set[int] = set()
        chosen = []
        for pair in left:
            if busy.isdisjoint(pair):
                chosen.append(pair)
                busy.update(pair)
        left = [pair for pair in left if pair not in chosen]
        yield chosen
