"""Asks Slurm again and again for the end of the allocation and for a preemption, and writes deadline.json for the trainer."""

from __future__ import annotations

import threading
from pathlib import Path

from longhaul.artifacts.job_state import Deadline, read_deadline
from longhaul.artifacts.paths import JobFolder
from longhaul.scheduling.slurm_client import SlurmCommandError, clock_offset_s, job_info


class DeadlineUpdater:
    """A thread that asks Slurm every `interval_s` seconds, and when `refresh_now` is called, during a `with` block.

    The end is converted to this host's clock, which is rank 0's. The clock of slurmctld may differ by minutes.
    """

    def __init__(self, job_id: str, folder: Path, interval_s: float) -> None:
        self._job_id, self._folder, self._interval_s = job_id, folder, interval_s
        self._wake, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> DeadlineUpdater:
        JobFolder(self._folder).deadline.unlink(missing_ok=True)
        self._clock_offset_s = clock_offset_s()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self.refresh_now()
        self._thread.join()

    def refresh_now(self) -> None:
        """Make the thread ask Slurm now. Signal handlers may call this."""
        self._wake.set()

    def _run(self) -> None:
        while not self._stopped:
            self._refresh()
            self._wake.wait(self._interval_s)
            self._wake.clear()

    def _by_this_clock(self, slurm_s: float | None) -> float | None:
        return None if slurm_s is None else slurm_s + self._clock_offset_s

    def _refresh(self) -> None:
        try:
            info = job_info(self._job_id)
            # EndTime of a job that was ended is now. A scancel must not look like the end of the allocation.
            running = info if info and info.state == "RUNNING" else None
            found = running and Deadline(self._by_this_clock(running.end_s), running.preempted)
            if found and found != read_deadline(self._folder):
                found.write(JobFolder(self._folder).deadline)
        except (SlurmCommandError, OSError) as error:
            print(f"warning: deadline.json could not be updated: {error}", flush=True)
