"""Simulated ranks of scale.py: rank 0 with its store in one process; in a few others, threads that stand for many ranks."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from longhaul.runtime.heartbeat import HeartbeatCounters, read_counts, send_heartbeat
from longhaul.runtime.process_rank import Rank
from longhaul.runtime.rendezvous import RendezvousError, meet

RANKS_PER_NODE = 8
MEET_TIMEOUT_S = 900.0
MISSING_TIMEOUT_S = 90.0
"""Time-out of the rendezvous to which one rank does not come: enough for the threads of all others to start."""
HEARTBEAT_S, HEARTBEAT_TIMEOUT_S, MEASURED_S = 5.0, 20.0, 30.0
"""Interval and time-out of heartbeats, and how long rank 0's CPU time is measured."""


def run_rank_0(ranks: int, pipe: Connection) -> None:
    """Serve the rendezvous and watch the heartbeats. Send what was measured through the pipe."""
    store = meet(_rank(0, ranks), MEET_TIMEOUT_S)
    pipe.send(time.time())
    watched = connect()
    pipe.recv()  # all ranks send heartbeats
    counters, began_s, cpu_s = HeartbeatCounters(ranks, HEARTBEAT_TIMEOUT_S), time.monotonic(), _cpu_s()
    while time.monotonic() - began_s < MEASURED_S:
        _watch(watched, ranks, counters)
    pipe.send((_cpu_s() - cpu_s) / (time.monotonic() - began_s))
    pipe.recv()  # a rank has stopped
    while not (silent := _watch(watched, ranks, counters)):
        pass
    pipe.send((silent, time.time()))
    pipe.recv()
    del store


def meet_without_last(ranks: int, own: Sequence[int], pipe: Connection) -> None:
    """Stand for the ranks `own` of a rendezvous to which the last rank does not come.

    Send when it began, when the last of these ranks knew who is missing, and how many of them name exactly the last rank.
    """
    messages: list[str] = []

    def join(rank: int) -> None:
        try:
            meet(_rank(rank, ranks), MISSING_TIMEOUT_S)
        except RendezvousError as error:
            messages.append(error.message)

    began_s = time.time()
    _in_threads(join, own)
    expected = f"1 of {ranks} ranks did not arrive within {MISSING_TIMEOUT_S:g} s: {ranks - 1}"
    pipe.send((began_s, time.time(), sum(message.startswith(expected) for message in messages)))


def run_other_ranks(ranks: int, own: Sequence[int], pipe: Connection) -> None:
    """Stand for the ranks `own`: meet the others when told to, and then send heartbeats until the pipe says end."""
    pipe.recv()
    stores: dict[int, TCPStore] = {}

    def join(rank: int) -> None:
        stores[rank] = meet(_rank(rank, ranks), MEET_TIMEOUT_S)

    _in_threads(join, own)
    pipe.send(time.time())
    connections = {rank: connect() for rank in own}
    pipe.send(len(connections))
    _send_heartbeats(connections, pipe)


def _in_threads(action: Callable[[int], None], ranks: Sequence[int]) -> None:
    """Run `action` for each rank in a thread of its own, and wait for all."""
    threads = [threading.Thread(target=action, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _send_heartbeats(connections: dict[int, TCPStore], pipe: Connection) -> None:
    """Send the heartbeats of these ranks, evenly over the interval. The pipe may name a rank that stops."""
    stopped: set[int] = set()
    while True:
        began_s = time.monotonic()
        for number, (rank, store) in enumerate(connections.items()):
            if rank not in stopped:
                send_heartbeat(store, rank)
            time.sleep(max(0.0, began_s + HEARTBEAT_S * (number + 1) / len(connections) - time.monotonic()))
            if pipe.poll():
                if (message := pipe.recv()) == "end":
                    return
                stopped.add(message)


def _watch(store: TCPStore, ranks: int, counters: HeartbeatCounters) -> list[int]:
    """Do what rank 0 does in one interval."""
    time.sleep(HEARTBEAT_S)
    send_heartbeat(store, 0)
    return counters.silent_ranks(read_counts(store, ranks), time.monotonic())


def connect() -> TCPStore:
    """Return a connection to rank 0's store, as the heartbeat opens one."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, timeout=timedelta(seconds=60), wait_for_workers=False)


def _rank(rank: int, ranks: int) -> Rank:
    node, local_rank = divmod(rank, RANKS_PER_NODE)
    return Rank(rank, ranks, local_rank, max(1, ranks // RANKS_PER_NODE), f"node{node:04d}")


def _cpu_s() -> float:
    used: Any = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
