"""Types of what the status needs from Slurm's queue; scheduling/read_job_queue.py asks Slurm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from longhaul.artifacts.paths import JobId


@dataclass(frozen=True)
class QueuedJob:
    """A job in Slurm's queue, as squeue lists it.

    state:          PENDING, RUNNING, COMPLETING …
    reason:         why it is pending: Priority, Resources, QOSMaxJobsPerUser …
    expected_start: Slurm's estimate in local time, `2026-11-28T18:00:00`; "N/A" where it has none
    """

    job_id: str
    state: str
    reason: str
    expected_start: str


@dataclass(frozen=True)
class Queue:
    """The part of Slurm's queue that concerns a run.

    by_job: name of a job of the run (`train-base`) -> its entry
    by_id:  Slurm's job id -> entry, for all jobs of the user who owns the run
    """

    by_job: Mapping[str, QueuedJob]
    by_id: Mapping[str, QueuedJob] = field(default_factory=dict)

    def find(self, job: str, recorded_id: str | None) -> QueuedJob | None:
        """Return the entry of a job. recorded_id: the id that its supervisor recorded; the job may have any name and comment."""
        return self.by_job.get(job) or (self.by_id.get(recorded_id) if recorded_id else None)


AskQueue = Callable[[list[JobId]], Queue]
"""Asks Slurm once which of these jobs are in its queue; raises a UserError where Slurm does not answer."""
