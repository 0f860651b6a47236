"""Measures how fast the job's cores work, on all nodes at once; warns of nodes or fails them if other processes, a limit or heat
slow their cores down. Needs no torch.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from longhaul.artifacts.node_check_row import CheckRow, Result
from longhaul.checks.build_check_rows import Component
from longhaul.checks.repetition_pauses import REPETITION_PAUSES_S
from longhaul.jobs.kinds.fabric_job import FEWEST_COMPARED_NODES

_WINDOW_S = 0.5
_ROUNDS_PER_CALL = 5000
"""About 2 ms of SHA-256 without Python's lock, so that the threads of all cores run at once."""
_BYTES = bytes(32)
"""OpenSSL in FIPS mode refuses shorter passwords and salts."""
_FAILED_SHARE, _SLOW_SHARE = 0.3, 0.8
"""Shares of the nodes' median below which a node fails, and warns. It also warns of a core that works less of the time."""
_REMEDY = (
    "look for other processes on its cores (top: also the steal time st of virtual machines), for a limit of the job's cgroup "
    "(nr_throttled in cpu.stat) and for low clocks (turbostat); exclude the node"
)


@dataclass(frozen=True)
class CoreSpeed:
    """The slowest core of a node while all of its cores work.

    rate:      millions of rounds of SHA-256 per second
    run_share: share of the time that this core worked for the job
    """

    core: int
    rate: float
    run_share: float


def measure_slowest_core() -> CoreSpeed:
    """Keep each core that this process may use busy for _WINDOW_S with a thread of its own."""
    found: list[CoreSpeed] = []
    threads = [threading.Thread(target=_measure_core, args=(core, found)) for core in sorted(os.sched_getaffinity(0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return min(found, key=lambda speed: speed.rate)


def _measure_core(core: int, found: list[CoreSpeed]) -> None:
    with suppress(OSError):  # the scheduler then spreads the threads over the cores
        os.sched_setaffinity(0, {core})  # 0 is this thread alone
    started, cpu_started, calls = time.perf_counter(), time.thread_time(), 0
    while (elapsed_s := time.perf_counter() - started) < _WINDOW_S:
        hashlib.pbkdf2_hmac("sha256", _BYTES, _BYTES, _ROUNDS_PER_CALL)
        calls += 1
    run_share = (time.thread_time() - cpu_started) / elapsed_s
    found.append(CoreSpeed(core, calls * _ROUNDS_PER_CALL / elapsed_s / 1e6, run_share))


def measure_all_nodes(
    gather: Callable[[CoreSpeed], list[CoreSpeed]], measure: Callable[[], CoreSpeed] = measure_slowest_core
) -> list[CoreSpeed]:
    """Return the speed of each node by rank. While one is slow, all measure again after a pause, and the best of each counts.

    gather: returns the values of all nodes on all nodes, which are ready to measure together
    """
    best = gather(measure())
    for pause_s in REPETITION_PAUSES_S:
        if min(speed.rate for speed in best) >= _FAILED_SHARE * _usual_rate(best):
            break
        time.sleep(pause_s)
        best = [max(pair, key=lambda speed: speed.rate) for pair in zip(best, gather(measure()), strict=True)]
    return best


def _usual_rate(speeds: Sequence[CoreSpeed]) -> float:
    """Return the median over the nodes; 0 of too few: that of two does not say which one is slow."""
    return statistics.median(speed.rate for speed in speeds) if len(speeds) >= FEWEST_COMPARED_NODES else 0.0


def is_judged(nodes: int, owns_cores: bool) -> bool:
    """Return whether core_speed_rows judges anything; owns_cores as there."""
    return owns_cores or nodes >= FEWEST_COMPARED_NODES


def core_speed_rows(speeds: Mapping[str, CoreSpeed], owns_cores: bool) -> Iterator[CheckRow]:
    """Yield a row per node. speeds: node -> its slowest core; empty where nothing was measured

    owns_cores: the job has the cores for itself, as on GPU nodes. Virtual hosts share theirs, and warn of nothing.
    """
    usual = _usual_rate(list(speeds.values()))
    share = _SLOW_SHARE if owns_cores else _FAILED_SHARE
    limits = [f"{share * usual:.3g} million hashes/s ({share:.0%} of the median of the nodes)"] if usual else []
    limits += [f"{_SLOW_SHARE:.0%} of the time for the job"] if owns_cores else []
    expected = f">= {', and '.join(limits)}" if limits else "measured only"
    for node, speed in speeds.items():
        is_slow = owns_cores and (speed.rate < _SLOW_SHARE * usual or speed.run_share < _SLOW_SHARE)
        result: Result = "fail" if speed.rate < _FAILED_SHARE * usual else "warn" if is_slow else "ok"
        value = f"{speed.rate:.3g} million hashes/s by core {speed.core}, which ran {speed.run_share:.0%} of the time"
        yield Component(node).row("slowest core of the job", value, expected, result, _REMEDY)
