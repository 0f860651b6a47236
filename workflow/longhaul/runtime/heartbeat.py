"""Detects hung processes and lost nodes by counters in rank 0's store (heartbeat_timeout_s), reports and ends them.

Every rank increments a counter in rank 0's store. Rank 0 looks for counters that do not change. The other ranks notice when
rank 0's store does not answer. The rank that notices writes a failure report and exits. The launcher then ends the others.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from longhaul.artifacts.job_state import NODE, Failure
from longhaul.artifacts.paths import JobFolder
from longhaul.runtime.process_rank import Rank, exit_without_cleanup
from longhaul.runtime.rendezvous import host_key

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


class Heartbeat:
    """Sends and watches heartbeats during a `with` block. With a single process it does nothing."""

    def __init__(self, rank: Rank, folder: Path, heartbeat_timeout_s: float) -> None:
        """folder: the job's folder, for the failure report."""
        self._rank, self._folder, self._timeout_s = rank, folder, heartbeat_timeout_s
        self._interval_s = min(5.0, heartbeat_timeout_s / 5)
        self._last_answer_s = time.monotonic()
        self._stopped = threading.Event()

    def __enter__(self) -> Heartbeat:
        self._last_answer_s = time.monotonic()
        # Two threads, because a store whose process hangs accepts a request and never answers.
        for run in (self._send, self._watch_rank_0) if self._rank.world_size > 1 else ():
            threading.Thread(target=run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _send(self) -> None:
        """Increment this rank's counter; on rank 0, also check the other counters."""
        counters, store = HeartbeatCounters(self._rank.world_size, self._timeout_s), None
        while not self._stopped.wait(self._interval_s):
            try:
                store = store or self._connect()
                send_heartbeat(store, self._rank.rank)
                self._last_answer_s = time.monotonic()
                if self._rank.is_main:
                    self._exit_if_rank_is_silent(store, counters)
            except (RuntimeError, OSError):
                store = None

    def _watch_rank_0(self) -> None:
        while not self._stopped.wait(self._interval_s):
            if time.monotonic() - self._last_answer_s > self._timeout_s:
                self._report_and_exit("rank 0", 0, os.environ.get("MASTER_ADDR", ""))

    def _connect(self) -> TCPStore:
        """Open a connection of its own: the main thread may be blocked in another one."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        timeout = timedelta(seconds=max(1.0, self._timeout_s / 2))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(address, port, timeout=timeout, wait_for_workers=False)

    def _exit_if_rank_is_silent(self, store: TCPStore, counters: HeartbeatCounters) -> None:
        if silent := counters.silent_ranks(read_counts(store, self._rank.world_size), time.monotonic()):
            host = store.get(host_key(silent[0])).decode()
            names = ", ".join(f"rank {rank}" for rank in silent)
            self._report_and_exit(names, silent[0], host)

    def _report_and_exit(self, names: str, rank: int, host: str) -> None:
        cause = f"{names} on {host} sent no heartbeat for {self._timeout_s:g} s"
        remedy = "check that node; if a step takes that long, raise recovery.heartbeat_timeout_s"
        print(f"{self._rank.host}: {cause}", file=sys.stderr, flush=True)
        report = JobFolder(self._folder).missed_heartbeat(noticed_by=self._rank.rank)
        Failure(NODE, cause, remedy, host=host, rank=rank).write(report)
        exit_without_cleanup(1)


def send_heartbeat(store: TCPStore, rank: int) -> None:
    """Increment a rank's counter."""
    store.add(_counter_key(rank), 1)


def read_counts(store: TCPStore, world_size: int) -> dict[int, bytes]:
    """Return rank -> counter, without ranks that have not sent a heartbeat yet. Two requests when all have sent one."""
    ranks = list(range(world_size))
    if not store.check([_counter_key(rank) for rank in ranks]):
        ranks = [rank for rank in ranks if store.check([_counter_key(rank)])]
    return dict(zip(ranks, store.multi_get([_counter_key(rank) for rank in ranks]), strict=True))


def _counter_key(rank: int) -> str:
    return f"longhaul/heartbeat/{rank}"


class HeartbeatCounters:
    """The ranks' counters, and since when each has not changed by the watcher's own clock."""

    def __init__(self, world_size: int, heartbeat_timeout_s: float) -> None:
        self._timeout_s = heartbeat_timeout_s
        self._counts: dict[int, bytes] = {}
        self._unchanged_since_s: dict[int, float] = {}
        self._world_size = world_size

    def silent_ranks(self, counts: dict[int, bytes], now_s: float) -> list[int]:
        """Return the ranks whose counter has not changed for `heartbeat_timeout_s`, measured from the first call at least.

        counts: rank -> counter; without ranks that have not sent a heartbeat yet.
        """
        for rank in range(self._world_size):
            if rank not in self._unchanged_since_s or counts.get(rank) != self._counts.get(rank):
                self._unchanged_since_s[rank] = now_s
        self._counts = counts
        return [rank for rank, since_s in self._unchanged_since_s.items() if now_s - since_s > self._timeout_s]
