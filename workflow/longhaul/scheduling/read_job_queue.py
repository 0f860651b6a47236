"""Asks squeue for the queued jobs of a run, for some seconds: state, reason, expected start; status_text.py prints them."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence

from longhaul.artifacts.job_state import read_state
from longhaul.artifacts.paths import JobId, RunPaths, job_of
from longhaul.compat.slurm_plugin import job_comment, job_name_prefix
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_name_by_hand, wildcard_values
from longhaul.report.slurm_queue_types import AskQueue, Queue, QueuedJob
from longhaul.scheduling import slurm_client
from longhaul.scheduling.slurm_client import COMMAND_TIMEOUT_S, QueueEntry, SlurmCommandError

_STATUS_TIMEOUT_S = 5.0
_UUID = "[0-9a-f-]{36}"


def queue_asker(paths: RunPaths) -> AskQueue:
    """Return a function with which a status asks Slurm. It gives up soon: the status then says why the queue is unknown."""
    return lambda jobs: read_queue(paths, jobs, _STATUS_TIMEOUT_S)


class RecentQueue:
    """Asks Slurm with `ask`, at most once in `every_s` seconds: many users who ask often slow slurmctld down for all."""

    def __init__(self, ask: AskQueue, every_s: float) -> None:
        self._ask, self._every_s = ask, every_s
        self._asked_s = -math.inf
        self._answer: Queue | UserError = Queue({})

    def __call__(self, jobs: list[JobId]) -> Queue:
        """Return the last answer, or raise the UserError that took its place."""
        if time.monotonic() - self._asked_s >= self._every_s:
            self._asked_s = time.monotonic()  # before the question: what happens during it is asked for next time
            try:
                self._answer = self._ask(jobs)
            except UserError as error:
                self._answer = error
        if isinstance(self._answer, UserError):
            raise self._answer
        return self._answer

    def forget(self) -> None:
        """Ask again at the next call, because a job has been submitted or has ended. Any thread may call this."""
        self._asked_s = -math.inf


def read_queue(paths: RunPaths, jobs: Sequence[JobId], timeout_s: float = COMMAND_TIMEOUT_S) -> Queue:
    """Return which of a run's jobs are in Slurm's queue.

    Raises:
        UserError: Slurm does not answer.
    """
    return match_jobs(paths.run, jobs, _queue_of_owner(paths, timeout_s))


def jobs_in_queue(paths: RunPaths) -> list[str]:
    """Return the ids of all jobs of a run that are in Slurm's queue, also of stages that its config no longer has.

    A job that a user submitted with job.sbatch has no comment. It has a name, and its supervisor records its id.

    Raises:
        UserError: Slurm does not answer.
    """
    states = filter(None, (read_state(folder.path) for folder in paths.job_folders()))
    recorded = {state.job_id for state in states if state.may_be_active}
    names = {job_name_by_hand(paths.run, job_of(folder.path)) for folder in paths.job_folders()}
    comment = f"_wildcards_{paths.run}_"
    return [
        entry.job_id
        for entry in _queue_of_owner(paths)
        if (entry.in_folder and comment in f"{entry.comment}_" and not _is_of_another_run(entry, paths.run))
        or (entry.in_folder and entry.name in names)
        or entry.job_id in recorded
    ]


def _queue_of_owner(paths: RunPaths, timeout_s: float = COMMAND_TIMEOUT_S) -> Sequence[QueueEntry]:
    """Return the jobs of the owner of the run's folder, and whether they work in the folder that holds `results/`."""
    folder = paths.folder.absolute()
    owner, working_folder = folder.stat().st_uid, str(paths.results.absolute().parent.resolve())
    try:
        return slurm_client.queue_of(owner, working_folder, timeout_s)
    except SlurmCommandError as error:
        raise UserError(str(error), "ask again later") from None


def match_jobs(run: str, jobs: Sequence[JobId], entries: Sequence[QueueEntry]) -> Queue:
    """Return the jobs that are in the queue, by their comment, which the plugin makes of rule and wildcards, or by their name.

    `longhaul serve` submits job.sbatch, too: its jobs have both, and are found by their name.
    """
    # A node that hangs keeps an ended attempt COMPLETING for hours. The next attempt, with the same comment, is the job.
    here = sorted((entry for entry in entries if entry.in_folder), key=lambda entry: entry.state != "COMPLETING")
    by_comment = {entry.comment: entry for entry in here if not _is_of_another_run(entry, run)}
    by_name = {entry.name: entry for entry in here}
    found = {
        str(job): by_comment.get(job_comment(job.kind, (run, *wildcard_values(job))))
        or by_name.get(job_name_by_hand(run, str(job)))
        for job in jobs
    }
    return Queue(
        by_job={name: _queued(entry) for name, entry in found.items() if entry},
        by_id={entry.job_id: _queued(entry) for entry in entries},
    )


def _is_of_another_run(entry: QueueEntry, run: str) -> bool:
    """Return whether a job's name says that its comment, which this run's jobs may have as well, was made by another run.

    Stage `a_b` of run `r` and stage `b` of run `r_a` have one comment. A user may have chosen a prefix that names no run.
    """
    is_by_longhaul = entry.name.startswith(job_name_prefix(""))
    return is_by_longhaul and not re.fullmatch(rf"{re.escape(job_name_prefix(run))}_{_UUID}", entry.name)


def _queued(entry: QueueEntry) -> QueuedJob:
    return QueuedJob(entry.job_id, entry.state, entry.reason, entry.expected_start)
