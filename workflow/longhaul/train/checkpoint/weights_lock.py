"""Locks a weights folder for one writer: a second copy of a running job waits until the first shows no sign of life for a time,
which this module sets.

When a main Snakemake process is killed, its jobs continue, and the next one starts them again. The owner of a weights folder
holds a lease and increments a counter in a file beside it. Whoever sees that counter stand still for long enough, by its own
clock, knows that the owner is dead. On the owner's own host the operating system answers instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longhaul.artifacts.atomic_files import write_text
from longhaul.artifacts.leases import Lease, LeaseOwner
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.shared_file_system import CACHE_TIMEOUT_S
from longhaul.train.distributed_context import DistributedContext

BEAT_S = 5.0
DEAD_AFTER_S = CACHE_TIMEOUT_S + 3 * BEAT_S
"""A host may see the counter as late as its file system client caches."""
SAME_JOB_BEATS = 3
"""Beats to wait for an earlier attempt of the same job: Slurm ends its processes wherever it reaches them."""
_RETRY_S = 0.5


@contextmanager
def hold_weights_lock(
    folder: Path, context: DistributedContext, beat_s: float = BEAT_S, dead_after_s: float = DEAD_AFTER_S
) -> Iterator[None]:
    """Hold `folder` for the length of the block, on all ranks; rank 0 owns the lease. Wait until its current owner has ended."""
    lease, beat = Lease(WeightsFolder(folder).lease), WeightsFolder(folder).lease_beat
    claim = LeaseClaim(lease, beat, dead_after_s, SAME_JOB_BEATS * beat_s)
    # All ranks take part in every attempt: a rank that is left alone in a collective runs into its time-out.
    while not context.broadcast(context.is_main and claim.try_acquire()):
        time.sleep(_RETRY_S)
    stopped = threading.Event()
    thread = threading.Thread(target=_beat, args=(beat, beat_s, stopped), daemon=True)
    if context.is_main:
        thread.start()
    try:
        yield
    finally:
        if context.is_main:
            stopped.set()
            thread.join()
            beat.unlink(missing_ok=True)
            lease.release()


class LeaseClaim:
    """Attempts to acquire a lease, which remember since when its owner's counter has stood still.

    dead_after_s: how long the counter of an owner must stand still; same_job_s: the same for an owner of this Slurm job
    """

    def __init__(self, lease: Lease, beat: Path, dead_after_s: float, same_job_s: float | None = None) -> None:
        self._lease, self._beat, self._dead_after_s = lease, beat, dead_after_s
        self._same_job_s = dead_after_s if same_job_s is None else same_job_s
        self._counter, self._unchanged_since, self._has_printed = "", time.monotonic(), False

    def try_acquire(self) -> bool:
        """Try once. The lease of a dead owner is removed, so that the next attempt can succeed."""
        if self._lease.try_acquire():
            return True
        owner, counter = self._lease.current_owner(), _read(self._beat)
        if counter != self._counter:
            self._counter, self._unchanged_since = counter, time.monotonic()
        dead_after_s = self._dead_after_s_of(owner)
        if owner and time.monotonic() - self._unchanged_since > dead_after_s:
            print(f"{owner} has not updated {self._beat} for {dead_after_s:g} s; taking over its lease", flush=True)
            self._lease.remove_dead(owner)
        elif owner and not self._has_printed:
            print(f"{owner} owns {self._lease.path.parent}; waiting until it ends", flush=True)
            self._has_printed = True
        return False

    def _dead_after_s_of(self, owner: LeaseOwner | None) -> float:
        own_job = self._lease.owner.job_id
        return self._same_job_s if own_job and owner and owner.job_id == own_job else self._dead_after_s


def _beat(path: Path, beat_s: float, stopped: threading.Event) -> None:
    counter = 0
    while not stopped.is_set():
        # If the file system is full or unavailable for a while, others must not treat this owner as dead at once.
        with suppress(OSError):
            write_text(path, f"{counter}\n")
        counter += 1
        stopped.wait(beat_s)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
