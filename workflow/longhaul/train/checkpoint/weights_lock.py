"""One writer per weights folder: a second copy of a job that still runs waits instead of training beside it.

A main Snakemake that was killed leaves its jobs running, and the next one starts them again. The holder counts up in a
file beside its lease; whoever sees that count stand still for long enough, on its own clock, knows that the holder is dead.
On the holder's own host the operating system is asked instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longhaul.artifacts.files import write_text
from longhaul.artifacts.leases import Holder, Lease
from longhaul.artifacts.shared_file_system import REMEMBERED_S
from longhaul.train.distributed_context import DistributedContext

BEAT_S = 5.0
DEAD_AFTER_S = REMEMBERED_S + 3 * BEAT_S
"""A count may be seen as late as a file system's clients remember."""
SAME_JOB_BEATS = 3
"""An earlier attempt of this very job is waited for no longer: Slurm has ended its processes where it reaches them."""
_RETRY_S = 0.5


@contextmanager
def sole_writer(
    folder: Path, processes: DistributedContext, beat_s: float = BEAT_S, dead_after_s: float = DEAD_AFTER_S
) -> Iterator[None]:
    """All ranks hold `folder` for the length of the block, after whoever holds it now has ended; rank 0 has the lease."""
    lease, beat = Lease(folder / "lease.json"), folder / "lease.beat"
    claim = Claim(lease, beat, dead_after_s, SAME_JOB_BEATS * beat_s)
    # Every rank takes part in every try: a rank left alone in a collective would run into its time-out.
    while not processes.broadcast(processes.is_main and claim.succeeds()):
        time.sleep(_RETRY_S)
    stopped = threading.Event()
    thread = threading.Thread(target=_beat, args=(beat, beat_s, stopped), daemon=True)
    if processes.is_main:
        thread.start()
    try:
        yield
    finally:
        if processes.is_main:
            stopped.set()
            thread.join()
            beat.unlink(missing_ok=True)
            lease.release()


class Claim:
    """Tries to take a lease, and remembers since when its holder's count has stood still."""

    def __init__(self, lease: Lease, beat: Path, dead_after_s: float, same_job_s: float | None = None) -> None:
        self._lease, self._beat, self._dead_after_s = lease, beat, dead_after_s
        self._same_job_s = dead_after_s if same_job_s is None else same_job_s
        self._seen, self._since, self._told = "", time.monotonic(), False

    def succeeds(self) -> bool:
        """One try. A holder that has not counted for `dead_after_s` is taken for dead."""
        if self._lease.try_acquire():
            return True
        holder, count = self._lease.current(), _read(self._beat)
        if count != self._seen:
            self._seen, self._since = count, time.monotonic()
        patience_s = self._patience_s(holder)
        if holder and time.monotonic() - self._since > patience_s:
            print(f"{holder} has not been heard of for {patience_s:g} s; taking over", flush=True)
            self._lease.clear(holder)
        elif holder and not self._told:
            print(f"{holder} works on {self._lease.path.parent}; waiting for it", flush=True)
            self._told = True
        return False

    def _patience_s(self, holder: Holder | None) -> float:
        own = self._lease.holder.job_id
        return self._same_job_s if own and holder and holder.job_id == own else self._dead_after_s


def _beat(path: Path, beat_s: float, stopped: threading.Event) -> None:
    count = 0
    while not stopped.is_set():
        # a file system that is full or away for a while must not make the others take this writer for dead
        with suppress(OSError):
            write_text(path, f"{count}\n")
        count += 1
        stopped.wait(beat_s)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
