"""Plays the rounds of a pair tournament on one rank of a node, and prints how long its pairs and the starts of rounds took."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import torch.distributed as dist

from longhaul.checks.pair_bandwidth import PairMeter
from longhaul.checks.pair_schedule import order_of_rounds, pairs_of_round
from longhaul.runtime.process_rank import this_rank
from longhaul.runtime.rendezvous import process_group


def main() -> None:
    """Play all rounds; the first rank prints {"pair_s": [...], "start_s": [...]} of all ranks."""
    rank = this_rank()
    found: dict[str, list[float]] = {"pair_s": [], "start_s": []}
    with process_group(rank, "gloo", 60.0):
        meter = PairMeter(rank.rank, torch.device("cpu"))
        for number in order_of_rounds(rank.world_size):
            found["start_s"].append(_seconds(lambda: dist.all_reduce(torch.zeros(1))))
            pair = next((pair for pair in pairs_of_round(rank.world_size, number) if rank.rank in pair), None)
            if pair is not None:
                peer = pair[0] if pair[1] == rank.rank else pair[1]
                found["pair_s"].append(_seconds(lambda peer=peer: meter.measure(peer)))
            dist.barrier()  # so that the next start does not wait for slow pairs
        parts: list[Any] = [None] * rank.world_size
        dist.all_gather_object(parts, found)
    if rank.is_main:
        print(json.dumps({key: [seconds for part in parts for seconds in part[key]] for key in found}))


def _seconds(action: Any) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
