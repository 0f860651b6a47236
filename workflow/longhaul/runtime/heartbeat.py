"""A process that hangs or a node that is gone, found in bounded time and named, instead of a collective that waits.

Every rank counts up in rank 0's store. Rank 0 looks for counts that stand still; the others notice when rank 0's store is
not there any more. Whoever finds one writes why and ends its process, and the launcher ends the rest.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from longhaul.artifacts.job_state import NODE, Failure
from longhaul.runtime.rank import Rank, leave

_KEY = "longhaul/beat"


class Heartbeat:
    """Beats and watches for the length of a `with` block; does nothing for one process alone."""

    def __init__(self, rank: Rank, folder: Path, heartbeat_timeout_s: float) -> None:
        self._rank, self._folder, self._hang_s = rank, folder, heartbeat_timeout_s
        self._every_s = min(5.0, heartbeat_timeout_s / 5)
        self._answered = time.monotonic()
        self._stopped = threading.Event()

    def __enter__(self) -> Heartbeat:
        self._answered = time.monotonic()
        # Two threads, as a store whose process hangs takes a request and never answers.
        for run in (self._beat, self._watch_rank_0) if self._rank.world_size > 1 else ():
            threading.Thread(target=run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _beat(self) -> None:
        watch, store = Watch(self._rank.world_size, self._hang_s), None
        while not self._stopped.wait(self._every_s):
            try:
                store = store or self._connect()
                store.add(f"{_KEY}/{self._rank.rank}", 1)
                self._answered = time.monotonic()
                if self._rank.is_main:
                    self._end_if_silent(store, watch)
            except (RuntimeError, OSError):
                store = None

    def _watch_rank_0(self) -> None:
        while not self._stopped.wait(self._every_s):
            if time.monotonic() - self._answered > self._hang_s:
                self._end("rank 0", 0, os.environ.get("MASTER_ADDR", ""))

    def _connect(self):
        """A connection of its own: the main thread may wait in another one."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        wait = timedelta(seconds=max(1.0, self._hang_s / 2))
        return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=wait, wait_for_workers=False)

    def _end_if_silent(self, store, watch: Watch) -> None:
        known = [rank for rank in range(self._rank.world_size) if store.check([f"{_KEY}/{rank}"])]
        counts = dict(zip(known, store.multi_get([f"{_KEY}/{rank}" for rank in known]), strict=True))
        if silent := watch.silent(counts, time.monotonic()):
            host = store.get(f"longhaul/host/{silent[0]}").decode()
            names = ", ".join(f"rank {rank}" for rank in silent)
            self._end(names, silent[0], host)

    def _end(self, names: str, rank: int, host: str) -> None:
        cause = f"{names} on {host} has not been heard of for {self._hang_s:g} s"
        remedy = "look at that node; if it only computes that long, raise recovery.heartbeat_timeout_s"
        print(f"{self._rank.host}: {cause}", file=sys.stderr, flush=True)
        Failure(NODE, cause, remedy, host=host, rank=rank).write(
            self._folder / "failures" / f"heard-by-{self._rank.rank:05d}.json"
        )
        leave(1)


class Watch:
    """Since when each rank's count has stood still, on the watcher's own clock."""

    def __init__(self, world_size: int, heartbeat_timeout_s: float) -> None:
        self._hang_s = heartbeat_timeout_s
        self._counts: dict[int, bytes] = {}
        self._since: dict[int, float] = {}
        self._world_size = world_size

    def silent(self, counts: dict[int, bytes], now_s: float) -> list[int]:
        """Ranks whose count has not changed for `heartbeat_timeout_s`, counted from the first look."""
        for rank in range(self._world_size):
            if rank not in self._since or counts.get(rank) != self._counts.get(rank):
                self._since[rank] = now_s
        self._counts = counts
        return [rank for rank, since in self._since.items() if now_s - since > self._hang_s]
