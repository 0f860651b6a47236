"""Mends a defect of snakemake-executor-plugin-slurm (2.x) in the main process, without which a run may wait for ever.

The plugin's `check_active_jobs` hands back the jobs that still run; Snakemake forgets those that it does not. When no
status query succeeds, because slurmctld restarts or its network is away, the plugin hands back none, and Snakemake waits
for jobs that it never asks about again. Here a job of which nothing was said counts as running.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any


def keep_unanswered_jobs() -> None:
    """Patches the plugin's executor; to be called before Snakemake makes it."""
    from snakemake_executor_plugin_slurm import Executor

    if not hasattr(Executor.check_active_jobs, "unmended"):
        Executor.check_active_jobs = _mended(Executor.check_active_jobs)  # pyright: ignore[reportAttributeAccessIssue]


def _mended(check_active_jobs: Any) -> Any:
    async def check_all(self: Any, active_jobs: list[Any]) -> AsyncGenerator[Any, None]:
        answered: set[int] = set()
        with _noting_reports(self, answered):
            async for job in check_active_jobs(self, active_jobs):
                answered.add(id(job))
                yield job
        for job in active_jobs:
            if id(job) not in answered:
                yield job

    check_all.unmended = check_active_jobs  # pyright: ignore[reportFunctionMemberAccess]
    return check_all


class _noting_reports:
    """Notes the jobs that an executor reports as ended, for the length of a `with` block."""

    def __init__(self, executor: Any, answered: set[int]) -> None:
        self._executor, self._answered = executor, answered

    def __enter__(self) -> None:
        for name in ("report_job_success", "report_job_error"):
            setattr(self._executor, name, self._noting(getattr(self._executor, name)))

    def __exit__(self, *_: object) -> None:
        for name in ("report_job_success", "report_job_error"):
            delattr(self._executor, name)

    def _noting(self, report: Any) -> Any:
        def noted(job: Any, *arguments: Any, **options: Any) -> None:
            self._answered.add(id(job))
            report(job, *arguments, **options)

        return noted
