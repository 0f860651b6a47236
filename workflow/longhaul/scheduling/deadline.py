"""Keeps deadline.json: when the allocation ends, and whether Slurm wants its nodes for another job."""

from __future__ import annotations

import threading
from pathlib import Path

from longhaul.artifacts.job_state import Deadline, read_deadline
from longhaul.scheduling.slurm_client import SlurmSilentError, clock_ahead_s, job_info


class DeadlineKeeper:
    """Asks Slurm every `every_s` seconds, and at once when `ask` is called, for the length of a `with` block.

    The end is written by this host's clock, which is rank 0's; slurmctld's may be minutes away.
    """

    def __init__(self, job_id: str, folder: Path, every_s: float) -> None:
        self._job_id, self._folder, self._every_s = job_id, folder, every_s
        self._wake, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> DeadlineKeeper:
        (self._folder / "deadline.json").unlink(missing_ok=True)
        self._ahead_s = clock_ahead_s()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self.ask()
        self._thread.join()

    def ask(self) -> None:
        """Asks now; safe in a signal handler."""
        self._wake.set()

    def _keep(self) -> None:
        while not self._stopped:
            self._refresh()
            self._wake.wait(self._every_s)
            self._wake.clear()

    def _on_this_clock(self, slurm_s: float | None) -> float | None:
        return None if slurm_s is None else slurm_s + self._ahead_s

    def _refresh(self) -> None:
        try:
            info = job_info(self._job_id)
            # Of a job that was ended, EndTime is now: scancel must not look like the end of the allocation.
            running = info if info and info.state == "RUNNING" else None
            found = running and Deadline(self._on_this_clock(running.end_s), running.preempted)
            if found and found != read_deadline(self._folder):
                found.write(self._folder / "deadline.json")
        except (SlurmSilentError, OSError) as error:
            print(f"warning: the end of the allocation is not known anew: {error}", flush=True)
