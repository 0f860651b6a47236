"""Fetches from squeue the queued jobs of a run, with state, pending reason and expected start; status_text.py prints them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from longhaul.artifacts.paths import JobId, RunPaths
from longhaul.compat.slurm_plugin import job_comment
from longhaul.errors import UserError
from longhaul.jobs.job_kind import wildcard_values
from longhaul.report.run_status import Queue, QueuedJob
from longhaul.scheduling import slurm_client
from longhaul.scheduling.slurm_client import QueueEntry, SlurmCommandError


def queue_asker(paths: RunPaths) -> Callable[[Sequence[JobId]], Queue]:
    """Return a function that asks Slurm which of a run's jobs are in the queue.

    The jobs belong to the owner of the run's folder and work in the folder that holds `results/`. The function raises a
    UserError where Slurm does not answer.
    """
    folder = paths.folder.absolute()
    owner, working_folder = folder.stat().st_uid, str(paths.results.absolute().parent.resolve())

    def ask(jobs: Sequence[JobId]) -> Queue:
        try:
            entries = slurm_client.queue_of(owner, working_folder)
        except SlurmCommandError as error:
            raise UserError(str(error), "ask again later") from None
        return match_jobs(paths.run, jobs, entries)

    return ask


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
