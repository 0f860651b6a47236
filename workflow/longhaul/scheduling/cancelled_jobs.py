"""Records in failure.json that a user cancelled a job while it waited in the queue, so that it is not retried."""

from __future__ import annotations

from typing import Protocol

from longhaul.artifacts.job_state import CANCELLED, Failure, current_invocation
from longhaul.artifacts.paths import JobFolder, run_of
from longhaul.errors import UserError
from longhaul.scheduling import slurm_client
from longhaul.scheduling.retry_policy import SnakemakeJob, job_folder_of


class SubmittedJob(Protocol):
    """Fields of Snakemake's SubmittedJobInfo that are read."""

    @property
    def job(self) -> SnakemakeJob: ...
    @property
    def external_jobid(self) -> str: ...


def record_cancelled_wait(submitted: SubmittedJob) -> None:
    """Write failure.json of a job that was cancelled before it started, so that Snakemake does not retry it.

    submitted: Snakemake's SubmittedJobInfo of a job that ended with an error.
    """
    try:
        info = slurm_client.job_info(submitted.external_jobid)
    except (slurm_client.SlurmCommandError, UserError):
        return
    folder = job_folder_of(submitted.job)
    if folder and info and info.state == "CANCELLED" and info.never_started:
        cause = f"job {submitted.external_jobid} was cancelled by scancel while it waited in the queue"
        failure = Failure(
            CANCELLED,
            cause,
            "run it again to resume",
            job_id=submitted.external_jobid,
            invocation=current_invocation(run_of(folder)),
        )
        failure.write(JobFolder(folder).failure)
