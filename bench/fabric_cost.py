"""Simulates how long the fabric check takes on up to 4,096 nodes, from rounds that real ranks play on this machine over gloo.

All ranks share the cores of this machine, so that the measured times are longer than those of nodes.
"""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from bench.machine import MODULE_PATH, describe_machine, write_result
from longhaul.checks.fabric import planned_check_seconds
from longhaul.checks.pair_schedule import MOST_REPEATED_ROUNDS, number_of_rounds, order_of_rounds, planned_rounds
from longhaul.checks.repetition_pauses import REPETITION_PAUSES_S

MEASURED_NODES = (2, 4, 8)
SIMULATED_NODES = (8, 64, 512, 1000, 4096)
RANKS_PER_NODE = 8
REPEATED_ROUNDS = len(REPETITION_PAUSES_S) * MOST_REPEATED_ROUNDS
"""Rounds for suspicious pairs, at most."""
AIM_S = 900.0


@dataclass(frozen=True)
class RoundTimes:
    """Measured times in seconds. start_s: nodes -> median time until all ranks begin a round."""

    pair_s: Sequence[float]
    start_s: dict[int, float]

    def start_of(self, nodes: int) -> float:
        """Return the time to begin a round of this number of nodes; it grows linearly, as in a ring. A tree grows more slowly."""
        largest = max(self.start_s)
        return self.start_s[largest] * max(1.0, nodes / largest)


def main() -> None:
    """Measure, simulate, and write the record."""
    times = measure_rounds()
    pairs = sorted(times.pair_s)
    starts = ", ".join(f"{nodes} ranks {seconds * 1000:.2f} ms" for nodes, seconds in times.start_s.items())
    lines = [
        f"measured: {len(pairs)} pairs, median {statistics.median(pairs):.3f} s, longest {pairs[-1]:.3f} s",
        f"measured: begin of a round, {starts}",
        f"{'nodes':>6} {'rounds':>7} {'of':>5} {'pairs':>8} {'collectives':>12} {'check':>8} {'planned':>8}",
    ]
    for nodes in SIMULATED_NODES:
        planned = planned_check_seconds(nodes, RANKS_PER_NODE)
        pairs_s, rounds = simulate_pairs(nodes, planned["pairs"], times)
        rest_s = sum(planned.values()) - planned["pairs"]
        lines.append(
            f"{nodes:6,} {rounds:7,} {number_of_rounds(nodes):5,} {pairs_s:6.0f} s {rest_s:10.0f} s {pairs_s + rest_s:6.0f} s "
            f"{sum(planned.values()):6.0f} s"
        )
    lines.append(f"aim: 1,000 nodes within {AIM_S:.0f} s")
    write_result("fabric_cost", [*describe_machine(("torch",)), *lines])


def measure_rounds() -> RoundTimes:
    """Let ranks on this machine play tournaments."""
    found = {nodes: _play(nodes) for nodes in MEASURED_NODES}
    starts = {nodes: statistics.median(times["start_s"]) for nodes, times in found.items()}
    return RoundTimes([seconds for times in found.values() for seconds in times["pair_s"]], starts)


def simulate_pairs(nodes: int, budget_s: float, times: RoundTimes, seed: int = 0) -> tuple[float, int]:
    """Return the time of a tournament with all repetitions, and its rounds.

    A round takes as long as the slowest of its pairs, drawn from the measured ones.

    budget_s: time after which no further round starts, as in longhaul.checks.pair_tournament
    """
    draw, fewest = random.Random(seed), planned_rounds(nodes, 0.0)
    seconds, played = 0.0, 0
    for _ in order_of_rounds(nodes):
        if played >= fewest and seconds > budget_s:
            break
        seconds += _round_s(nodes, times, draw)
        played += 1
    repetitions_s = sum(REPETITION_PAUSES_S) + sum(_round_s(nodes, times, draw) for _ in range(REPEATED_ROUNDS))
    return seconds + repetitions_s, played


def _round_s(nodes: int, times: RoundTimes, draw: random.Random) -> float:
    return times.start_of(nodes) + max(draw.choices(times.pair_s, k=max(1, nodes // 2)))


def _play(nodes: int) -> dict[str, list[float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, **MODULE_PATH, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(nodes), "LOCAL_WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "bench.fabric_cost_worker"]
    ranks = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": "0", "SLURMD_NODENAME": f"n{rank}"},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(nodes)
    ]
    output, _ = ranks[0].communicate(timeout=600)
    if any(rank.wait(timeout=60) for rank in ranks):
        raise SystemExit(f"a rank of {nodes} failed")
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    main()
