"""Fetches from squeue the queued jobs of a run, with state, pending reason and expected start; status_text.py prints them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from longhaul.artifacts.job_state import read_state
from longhaul.artifacts.paths import JobId, RunPaths
from longhaul.compat.slurm_plugin import job_comment
from longhaul.errors import UserError
from longhaul.jobs.job_kind import wildcard_values
from longhaul.report.run_status import Queue, QueuedJob
from longhaul.scheduling import slurm_client
from longhaul.scheduling.slurm_client import QueueEntry, SlurmCommandError


def queue_asker(paths: RunPaths) -> Callable[[Sequence[JobId]], Queue]:
    """Return a function that asks Slurm which of a run's jobs are in the queue.

    The function raises a UserError where Slurm does not answer.
    """
    return lambda jobs: match_jobs(paths.run, jobs, _queue_of_folder(paths))


def jobs_in_queue(paths: RunPaths) -> list[str]:
    """Return the ids of all jobs of a run that are in Slurm's queue, also of stages that its config no longer has.

    A job that a user submitted with job.sbatch has no comment; its supervisor recorded its id.

    Raises:
        UserError: Slurm does not answer.
    """
    states = filter(None, (read_state(folder.path) for folder in paths.job_folders()))
    recorded = {state.job_id for state in states if state.may_be_active}
    mine = f"_wildcards_{paths.run}_"
    return [
        entry.job_id for entry in _queue_of_folder(paths) if mine in f"{entry.comment}_" or entry.job_id in recorded
    ]


def _queue_of_folder(paths: RunPaths) -> Sequence[QueueEntry]:
    """Return the jobs of the owner of the run's folder that work in the folder that holds `results/`."""
    folder = paths.folder.absolute()
    owner, working_folder = folder.stat().st_uid, str(paths.results.absolute().parent.resolve())
    try:
        return slurm_client.queue_of(owner, working_folder)
    except SlurmCommandError as error:
        raise UserError(str(error), "ask again later") from None


def match_jobs(run: str, jobs: Sequence[JobId], entries: Sequence[QueueEntry]) -> Queue:
    """Return the entry of each job that is in the queue.

    A job's comment in Slurm is made of its rule and wildcards.
    """
    by_comment = {entry.comment: entry for entry in entries}
    found = {str(job): by_comment.get(job_comment(job.kind, (run, *wildcard_values(job)))) for job in jobs}
    return {
        name: QueuedJob(entry.job_id, entry.state, entry.reason, entry.expected_start)
        for name, entry in found.items()
        if entry
    }
