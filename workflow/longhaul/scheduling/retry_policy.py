"""Decides which failed jobs Snakemake submits again, and refuses a run that would repeat a known failure.

Snakemake retries every failed job as often as its profile says. That is right for a dead node. It is wrong if failure.json
says that the job would only fail again, or that a user cancelled it. Each cause is printed once: before a run that would
repeat the failure submits anything, when a job starts again (run_display.py), or when the main Snakemake process exits.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from longhaul.artifacts.job_state import ENVIRONMENT, Failure, current_invocation, launch_key, read_failure
from longhaul.artifacts.paths import JobFolder, RunPaths, job_of, run_of
from longhaul.errors import UserError
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.scheduling.node_shortage import shortage_of_job


class SnakemakeJob(Protocol):
    """Fields of Snakemake's jobs that are read; Snakemake has no public type with it."""

    @property
    def params(self) -> Mapping[str, str]: ...
    @property
    def resources(self) -> Mapping[str, Any]: ...
    @property
    def jobid(self) -> int: ...
    @property
    def attempt(self) -> int: ...
    @property
    def restart_times(self) -> int: ...


def final_failure(folder: Path) -> Failure | None:
    """Return why a job would only fail again if it were started now, else None. folder: results/<run>/…/<job>."""
    failure = read_failure(folder)
    if failure is None:
        return None
    try:
        job = LaunchSpec.read(JobFolder(folder).launch_spec)
    except UserError:
        return None
    key = launch_key(job.inputs, job.data)
    return failure if failure.still_applies(key, current_invocation(run_of(folder))) else None


def allowed_restarts(job: SnakemakeJob, usual: int) -> int:
    """Return 0 if a Snakemake job would only fail again, else `usual`, the number of restarts by the profile.

    Snakemake asks when the job has failed, and restarts it if the number is not below the number of its attempts.
    """
    folder = job_folder_of(job)
    return 0 if folder and (final_failure(folder) or _failed_for_want_of_nodes(job, folder)) else usual


def next_attempt(job: SnakemakeJob) -> str:
    """Return `attempt 2 of 3` if Snakemake starts a failed job again, and record it for the status; "" if it does not."""
    restarts = job.restart_times
    if restarts < job.attempt:  # Snakemake's own comparison; it counts attempts from 1
        return ""
    text = f"attempt {job.attempt + 1} of {restarts + 1}"
    _record_next_attempt(job, text)
    return text


def cancel_next_attempt(job: SnakemakeJob) -> None:
    """Record of a failed job that Snakemake does not start it again after all."""
    _record_next_attempt(job, "")


def _record_next_attempt(job: SnakemakeJob, text: str) -> None:
    folder = job_folder_of(job)
    failure = read_failure(folder) if folder else None
    if folder and failure and failure.next_attempt != text and is_of_this_process(failure, run_of(folder)):
        with suppress(OSError):  # as of a full disk; the record only gives the status its words
            replace(failure, next_attempt=text).write(JobFolder(folder).failure)


def _failed_for_want_of_nodes(job: SnakemakeJob, folder: Path) -> bool:
    """Return whether the quarantine leaves too few nodes for a job, and record that as its failure: sbatch would refuse it."""
    shortage = shortage_of_job(folder, partition_of(job))
    if shortage is None:
        return False
    spec, invocation = LaunchSpec.read(JobFolder(folder).launch_spec), current_invocation(run_of(folder))
    earlier = read_failure(folder)
    if earlier is None or earlier.invocation != invocation:
        earlier = Failure(ENVIRONMENT, "", "")
    cause, remedy = shortage.after(earlier.cause, earlier.remedy)
    key = launch_key(spec.inputs, spec.data)
    failure = Failure(ENVIRONMENT, cause, remedy, earlier.evidence, key=key, invocation=invocation)
    failure.write(JobFolder(folder).failure)
    return True


def partition_of(job: SnakemakeJob) -> str | None:
    """Return the partition that a Snakemake job requests; None for the default partition."""
    return job.resources.get("slurm_partition")


def refuse_known_failures(jobs: Iterable[SnakemakeJob]) -> None:
    """Refuse to run jobs that would only fail again. jobs: Snakemake's jobs that are about to run.

    Raises:
        UserError: with the stored cause and remedy.
    """
    for folder in filter(None, map(job_folder_of, jobs)):
        if failure := final_failure(folder):
            raise UserError(
                f"{job_of(folder)} failed at {failure.time} and would only fail again: {failure.cause}",
                f"{failure.remedy}; to retry it without a change: longhaul retry {folder}",
            )


def job_folder_of(job: SnakemakeJob) -> Path | None:
    """Return the folder of a Snakemake job's launch.sh and records; None for rules that run in the main process."""
    launch = job.params.get("launch")
    return Path(launch).parent.absolute() if launch else None


def print_failures_at_exit(paths: RunPaths) -> None:
    """Register that the failures under this main Snakemake process are printed to stderr when it exits."""
    atexit.register(_print_failures, RunPaths(paths.run, paths.results.absolute()))


def cancel_print_at_exit() -> None:
    """Cancel that. To be called after a run that succeeded."""
    atexit.unregister(_print_failures)


def _print_failures(paths: RunPaths) -> None:
    for folder, failure in _failures_of_this_process(paths):
        print(f"\n{job_of(folder)} failed ({failure.failure_class}):\n{failure.as_text()}", file=sys.stderr, flush=True)


def _failures_of_this_process(paths: RunPaths) -> Iterable[tuple[Path, Failure]]:
    for folder in paths.job_folders():
        failure = read_failure(folder.path)
        if failure and is_of_this_process(failure, paths):
            yield folder.path, failure


def is_of_this_process(failure: Failure, paths: RunPaths) -> bool:
    """Return whether it happened under the main process that owns the run's lease now. It is then printed at its exit."""
    return failure.invocation == current_invocation(paths)
