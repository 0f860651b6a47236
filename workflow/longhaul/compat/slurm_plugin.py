"""Mends three defects of snakemake-executor-plugin-slurm (2.x) in the main process, with which a run may wait for ever.

The plugin's `check_active_jobs` hands back the jobs that still run; Snakemake forgets those that it does not.
- When no status query succeeds, because slurmctld restarts or its network is away, the plugin hands back none, and Snakemake
  waits for jobs that it never asks about again (upstream issue 207). Here a job of which nothing was said counts as running.
- It reports a job that its user cancelled in the queue as any failure, which Snakemake tries again; no supervisor was there to
  write down why. Here that is done for it.
- It leaves a preempted job to Slurm, which does nothing where preemption cancels (PreemptMode=CANCEL). Here such a job is
  queued again under its own id, or fails, so that a retry submits another.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from longhaul.artifacts.job_state import CANCELLED, Failure, invocation
from longhaul.errors import UserError
from longhaul.scheduling import slurm_client
from longhaul.scheduling.retry_policy import folder_of

Requeue = Callable[[str], str]


def patch_slurm_executor(may_requeue: bool) -> None:
    """Patches the plugin's executor class; to be called before Snakemake makes one. may_requeue: the site allows it."""
    from snakemake_executor_plugin_slurm import Executor

    if not hasattr(Executor.check_active_jobs, "unpatched"):
        requeue = slurm_client.requeue if may_requeue else lambda job_id: "the site forbids requeue"
        Executor.check_active_jobs = _mended(Executor.check_active_jobs, requeue)  # pyright: ignore[reportAttributeAccessIssue]


def _mended(check_active_jobs: Any, requeue: Requeue) -> Any:
    async def check_all(executor: Any, active_jobs: list[Any]) -> AsyncGenerator[Any, None]:
        ended: set[int] = set()
        with _Reports(executor, ended):
            async for _ in check_active_jobs(executor, active_jobs):
                pass
            _requeue_preempted(executor, [job for job in active_jobs if id(job) not in ended], requeue)
        for job in active_jobs:
            if id(job) not in ended:
                yield job

    check_all.unpatched = check_active_jobs  # pyright: ignore[reportFunctionMemberAccess]
    return check_all


def _requeue_preempted(executor: Any, jobs: list[Any], requeue: Requeue) -> None:
    preempted = set(slurm_client.preempted_jobs(executor.run_uuid)) if jobs else set()
    for job in jobs:
        if job.external_jobid in preempted and (refused := requeue(job.external_jobid)):
            executor.report_job_error(job, msg=f"job {job.external_jobid} was preempted; not queued again: {refused}. ")


def _write_down_a_cancelled_wait(job: Any) -> None:
    """failure.json of a job that was cancelled before it began; job: a SubmittedJobInfo that ended badly."""
    try:
        info = slurm_client.job_info(job.external_jobid)
    except (slurm_client.SlurmSilentError, UserError):
        return
    folder = folder_of(job.job)
    if folder and info and info.state == "CANCELLED" and info.has_not_begun:
        cause = f"job {job.external_jobid} was cancelled by scancel while it waited in the queue"
        this_main = invocation(folder.parents[2], folder.parents[1].name)
        failure = Failure(CANCELLED, cause, "the next run goes on", job_id=job.external_jobid, invocation=this_main)
        failure.write(folder / "failure.json")


class _Reports:
    """Notes the jobs that an executor reports as ended, for the length of a `with` block."""

    def __init__(self, executor: Any, ended: set[int]) -> None:
        self._executor, self._ended = executor, ended

    def __enter__(self) -> None:
        executor = self._executor
        executor.report_job_success = self._noting(executor.report_job_success)
        executor.report_job_error = self._noting(executor.report_job_error, _write_down_a_cancelled_wait)

    def __exit__(self, *_: object) -> None:
        for name in ("report_job_success", "report_job_error"):
            delattr(self._executor, name)

    def _noting(self, report: Any, before: Callable[[Any], None] = lambda job: None) -> Any:
        def noted(job: Any, *arguments: Any, **options: Any) -> None:
            self._ended.add(id(job))
            before(job)
            report(job, *arguments, **options)

        return noted
