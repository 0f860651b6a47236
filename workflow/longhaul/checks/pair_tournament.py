"""Runs the pair tournament: measures all pairs of nodes in rounds, repeats suspicious pairs, names slow nodes and links.

Rank r of a node exchanges messages with rank r of another node, all ranks of both nodes at once. The ranks of the same
number are a rail: on nodes with a network adapter per GPU, each rail has adapters and switches of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from longhaul.artifacts.fabric_report import PairResult, SlowNode
from longhaul.artifacts.paths import QUARANTINE
from longhaul.checks.find_slow_nodes import SLOW_SHARES
from longhaul.checks.hung_steps import COLLECTIVES_OF_RANKS
from longhaul.checks.packet_loss import grown, read_error_counters
from longhaul.checks.pair_bandwidth import PairMeter
from longhaul.checks.pair_evidence import PairEvidence, PairMeasurement, RailPair
from longhaul.checks.pair_schedule import (
    MOST_REPEATED_ROUNDS,
    Pair,
    disjoint_rounds,
    order_of_rounds,
    pairs_of_round,
    planned_rounds,
    planned_seconds,
)
from longhaul.checks.repetition_pauses import REPETITION_PAUSES_S
from longhaul.checks.run_parts_in_child import announce
from longhaul.errors import UserError, first_line
from longhaul.runtime.call_with_deadline import call_within
from longhaul.runtime.process_rank import Rank

_MOST_MEASUREMENT_S = 45.0
"""Shorter than the time-out of the process group, after which the ranks that wait for the next round fail, and name no pair."""


class BrokenLinkError(UserError):
    """Two nodes cannot exchange messages. On other nodes, or a minute later, they may."""

    failure_class = "node"


@dataclass(frozen=True)
class Tournament:
    """Findings of a tournament.

    pairs:        the measured pairs of nodes, each with its slowest rail; on rank 0 alone
    slow_nodes:   nodes that are slow with most others
    slow_links:   one line each
    wrong_values: one line per pair that received other values than were sent
    grown_errors: node -> error counter -> growth during the tournament, of those that grew; on rank 0 alone
    """

    pairs: list[PairResult] = field(default_factory=list)
    slow_nodes: list[SlowNode] = field(default_factory=list)
    slow_links: list[str] = field(default_factory=list)
    wrong_values: list[str] = field(default_factory=list)
    grown_errors: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def is_healthy(self) -> bool:
        return not (self.slow_nodes or self.slow_links or self.wrong_values)


def run_tournament(rank: Rank, hosts: Sequence[str], device: torch.device, budget_s: float) -> Tournament:
    """Measure the pairs of all nodes within a time budget. The process group of all ranks must exist.

    hosts:    name of each node, in the order of their ranks
    budget_s: after this number of seconds no further round starts; the pairs measured until then are an even sample
    """
    if len(hosts) < 2:
        return Tournament()
    announce("pair tournament", [] if device.index is None else [device.index], COLLECTIVES_OF_RANKS)
    table = _MeasuredRounds(rank, hosts, device)
    counters = read_error_counters() if rank.local_rank == 0 else {}
    if rank.is_main:
        rounds, seconds = planned_rounds(len(hosts), budget_s), planned_seconds(len(hosts), budget_s)
        print(f"pair tournament: {len(hosts)} nodes, {rounds} rounds, about {seconds:.0f} s", flush=True)
    table.play_within(budget_s)
    evidence = PairEvidence(table.gather(), SLOW_SHARES[dist.get_backend()])
    for pause_s in REPETITION_PAUSES_S:
        suspects = _on_all_ranks(evidence.suspects())
        if not suspects:
            break
        if rank.is_main:
            print(f"pair tournament: {len(suspects)} suspicious pairs, repeated after {pause_s:g} s", flush=True)
        time.sleep(pause_s)
        table.play(list(disjoint_rounds(suspects))[:MOST_REPEATED_ROUNDS])
        evidence.add(table.gather())
    found = evidence.slow_nodes(hosts), evidence.slow_links(hosts), evidence.wrong_values(hosts)
    grown_errors = table.gather_grown_errors(counters)
    return Tournament(evidence.pair_results(hosts), *_on_all_ranks(found), grown_errors=grown_errors)


class _MeasuredRounds:
    """Plays rounds and keeps the measurements of this rank. The rank on the first node of a pair keeps them for both."""

    def __init__(self, rank: Rank, hosts: Sequence[str], device: torch.device) -> None:
        self._rank, self._hosts, self._nodes, self._device = rank, hosts, len(hosts), device
        self._rails = rank.world_size // len(hosts)
        self._node, self._rail = divmod(rank.rank, self._rails)
        self._meter = PairMeter(rank.rank, device)
        self._measured: dict[RailPair, PairMeasurement] = {}

    def play_within(self, budget_s: float) -> None:
        """Play the rounds of a full tournament until it is complete or the budget is used."""
        started = time.monotonic()
        fewest = planned_rounds(self._nodes, 0.0)
        for played, number in enumerate(order_of_rounds(self._nodes)):
            is_late = played >= fewest and time.monotonic() - started > budget_s
            if self._rank_0_says(is_late):
                return
            self._play_round(pairs_of_round(self._nodes, number))

    def play(self, rounds: Iterable[Sequence[Pair]]) -> None:
        """Play the given rounds. The pairs of a round must be disjoint."""
        for pairs in rounds:
            self._rank_0_says(False)
            self._play_round(pairs)

    def gather(self) -> dict[RailPair, PairMeasurement]:
        """Return on rank 0 what all ranks have measured since the last call; {} on other ranks."""
        own, self._measured = self._measured, {}
        return {pair: found for part in self._gather(own) for pair, found in part.items()}

    def gather_grown_errors(self, before: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """Return on rank 0 the error counters of each node that are larger than `before`; {} on other ranks."""
        own = grown(before, read_error_counters()) if self._rank.local_rank == 0 else {}
        nodes = self._gather(own)[:: self._rails]
        return {host: found for host, found in zip(self._hosts, nodes, strict=False) if found}

    def _gather(self, own: Any) -> list[Any]:
        """Return on rank 0 the values of all ranks; [] on other ranks."""
        announce("results of the pair tournament", subject=COLLECTIVES_OF_RANKS)  # a rank of another pair may be late
        parts: list[Any] | None = [None] * self._rank.world_size if self._rank.is_main else None
        dist.gather_object(own, parts)
        return parts or []

    def _play_round(self, pairs: Sequence[Pair]) -> None:
        own = next((pair for pair in pairs if self._node in pair), None)
        if own is None:
            return
        is_first = own[0] == self._node
        found = self._measure(own)
        if is_first:
            self._measured[(self._rail, *own)] = found

    def _measure(self, pair: Pair) -> PairMeasurement:
        """Measure this rank's exchange with the other node of a pair."""
        names = " and ".join(self._hosts[node] for node in pair)
        announce(f"messages between {names} on rail {self._rail}", subject=COLLECTIVES_OF_RANKS)
        peer = pair[1] if pair[0] == self._node else pair[0]
        try:
            return call_within(_MOST_MEASUREMENT_S, lambda: self._meter.measure(peer * self._rails + self._rail))
        except (RuntimeError, TimeoutError) as error:  # RuntimeError: of gloo or NCCL
            raise BrokenLinkError(
                f"{names} cannot exchange messages on rail {self._rail}: {first_line(error)}",
                f"ask the administrators to test the network of both nodes; to exclude one, add it to {QUARANTINE}",
            ) from None

    def _rank_0_says(self, value: bool) -> bool:
        """Return rank 0's value, when all ranks have come here: the pairs of a round begin together."""
        announce("start of a round of the pair tournament", subject=COLLECTIVES_OF_RANKS)
        said = torch.tensor([int(value and self._rank.is_main)], device=self._device)
        dist.all_reduce(said)
        return bool(said.item())


def _on_all_ranks(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
