"""A link that breaks during the pair tournament is named, and a host that is busy for some seconds is not.

test_fabric.py and a cluster test healthy and slow links.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import pytest
import torch

from longhaul.checks import pair_bandwidth, pair_tournament
from longhaul.checks.pair_bandwidth import PairMeter
from longhaul.checks.pair_evidence import PairMeasurement
from longhaul.checks.pair_tournament import BrokenLinkError
from longhaul.runtime.process_rank import Rank

HOSTS = ("n1", "n2", "n3")


def rounds_of(rank: int, ranks_per_node: int = 2) -> pair_tournament._MeasuredRounds:
    world_size = len(HOSTS) * ranks_per_node
    this = Rank(rank, world_size, rank % ranks_per_node, len(HOSTS), HOSTS[rank // ranks_per_node])
    return pair_tournament._MeasuredRounds(this, HOSTS, torch.device("cpu"))


def test_link_that_breaks_is_named_with_its_rail_and_the_error(monkeypatch: pytest.MonkeyPatch):
    def fail(meter: PairMeter, peer: int) -> PairMeasurement:
        raise RuntimeError("Timed out waiting 60000ms for recv operation to complete\nmore")

    monkeypatch.setattr(PairMeter, "measure", fail)
    with pytest.raises(BrokenLinkError) as raised:
        rounds_of(3)._play_round([(1, 2)])
    assert raised.value.failure_class == "node" and "results/quarantine.json" in raised.value.hint
    assert raised.value.message == (
        "n2 and n3 cannot exchange messages on rail 1: Timed out waiting 60000ms for recv operation to complete"
    )


def test_rank_that_waits_for_the_results_of_others_blames_no_pair(monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    monkeypatch.setattr(pair_tournament, "announce", lambda text, *_, subject: steps.append(text))
    monkeypatch.setattr(PairMeter, "measure", lambda meter, peer: PairMeasurement(1.0, 1.0, True, 0.0))
    monkeypatch.setattr(pair_tournament.dist, "gather_object", lambda own, parts: None)
    rounds = rounds_of(3)
    rounds._play_round([(1, 2)])
    rounds.gather()
    assert steps == ["messages between n2 and n3 on rail 1", "results of the pair tournament"]


def test_link_on_which_a_call_never_returns_is_named(monkeypatch: pytest.MonkeyPatch):
    """NCCL blocks where it opens the first connection between two nodes."""
    ended = threading.Event()
    monkeypatch.setattr(PairMeter, "measure", lambda meter, peer: ended.wait())
    monkeypatch.setattr(pair_tournament, "_MOST_MEASUREMENT_S", 0.05)
    with pytest.raises(
        BrokenLinkError, match=r"^n2 and n3 cannot exchange messages on rail 1: no answer within 0\.05 s"
    ):
        rounds_of(3)._play_round([(1, 2)])
    ended.set()


def test_broken_link_is_named_before_the_waiting_ranks_fail():
    from longhaul.checks.fabric import _TIMEOUT_S

    assert pair_bandwidth._MOST_WAIT_S < pair_tournament._MOST_MEASUREMENT_S < _TIMEOUT_S


@pytest.mark.parametrize(("rank", "pair", "peer", "kept"), [(1, (0, 2), 5, True), (4, (0, 2), 0, False)])
def test_each_rank_meets_the_rank_of_its_rail_and_the_first_node_keeps_the_result(
    monkeypatch: pytest.MonkeyPatch, rank: int, pair: tuple[int, int], peer: int, kept: bool
):
    peers: list[int] = []
    found = PairMeasurement(1.0, 2.0, True)
    monkeypatch.setattr(PairMeter, "measure", lambda meter, other: peers.append(other) or found)
    rounds = rounds_of(rank)
    rounds._play_round([pair])
    rounds._play_round([(1, 2)] if rank == 1 else [(0, 1)])
    assert peers == [peer] and rounds._measured == ({(rank % 2, *pair): found} if kept else {})


class BusyHosts:
    """Stands for the rounds of real ranks: pairs of `busy` hosts have 0.28 of the rate until `until_s` by its clock."""

    def __init__(self, hosts: Sequence[str], busy: Sequence[str], until_s: float) -> None:
        self.hosts, self.busy, self.until_s = hosts, busy, until_s
        self.clock_s, self.pauses_s, self.measured = 0.0, list[float](), dict[tuple[int, int, int], PairMeasurement]()
        self.partners: list[set[int]] = []

    def sleep(self, seconds: float) -> None:
        self.clock_s += seconds
        self.pauses_s.append(seconds)

    def play_within(self, budget_s: float) -> None:
        self._measure(combinations(range(len(self.hosts)), 2))

    def play(self, rounds: Iterable[Sequence[tuple[int, int]]]) -> None:
        pairs = [pair for played in rounds for pair in played]
        self.partners.append({node for pair in pairs for node in pair if self.hosts[node] not in self.busy})
        self._measure(pairs)

    def gather(self) -> dict[tuple[int, int, int], PairMeasurement]:
        found, self.measured = self.measured, {}
        return found

    def gather_grown_errors(self, before: Mapping[str, int]) -> dict[str, dict[str, int]]:
        return {}

    def _measure(self, pairs: Iterable[tuple[int, int]]) -> None:
        for pair in pairs:
            is_slow = self.clock_s < self.until_s and any(self.hosts[node] in self.busy for node in pair)
            self.measured[0, *pair] = PairMeasurement(0.28 if is_slow else 1.0, 30.0, True)


@pytest.mark.parametrize(
    ("until_s", "named", "pauses_s"),
    [(0.0, [], []), (1.0, [], [0.0, 2.0]), (9.0, [], [0.0, 2.0, 10.0]), (float("inf"), ["n3"], [0.0, 2.0, 10.0])],
)
def test_host_that_is_busy_for_seconds_is_not_named_and_one_that_stays_slow_is(
    monkeypatch: pytest.MonkeyPatch, until_s: float, named: list[str], pauses_s: list[float]
):
    hosts = [f"n{number}" for number in range(1, 9)]
    rounds = BusyHosts(hosts, ["n3"], until_s)
    monkeypatch.setattr(pair_tournament, "_MeasuredRounds", lambda *_: rounds)
    monkeypatch.setattr(pair_tournament, "_on_all_ranks", lambda value: value)
    monkeypatch.setattr(pair_tournament.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(pair_tournament.time, "sleep", rounds.sleep)
    found = pair_tournament.run_tournament(Rank(0, 8, 0, 8, "n1"), hosts, torch.device("cpu"), 20.0)
    assert [node["host"] for node in found.slow_nodes] == named and not found.slow_links
    assert rounds.pauses_s == pauses_s
    assert all(len(partners) == 3 for partners in rounds.partners)
    assert len(set().union(*rounds.partners)) == min(7, 3 * len(pauses_s)), "each repetition has fresh partners"
