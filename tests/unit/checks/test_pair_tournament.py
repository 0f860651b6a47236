"""A link that breaks during the pair tournament is named. test_fabric.py and a cluster test healthy and slow links."""

from __future__ import annotations

import pytest
import torch

from longhaul.checks import pair_tournament
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
