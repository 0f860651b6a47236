"""Patches of Snakemake's Slurm plugin: requeue of preempted jobs, refused submissions, job names in Slurm. Written for
snakemake-executor-plugin-slurm 2.8.

The plugin's `check_active_jobs` yields the jobs that still run; Snakemake forgets the jobs that it does not yield.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

_PREFIX_CHARACTERS = 50
_HASH_CHARACTERS = 8


@dataclass(frozen=True)
class SlurmActions:
    """The calls of Slurm that the patch needs."""

    preempted_jobs: Callable[[str], Iterable[str]]
    """Run id (the jobs' common name in Slurm) -> ids of its preempted jobs."""
    requeue: Callable[[str], str]
    """Requeues a job by its id; returns why Slurm refused, else an empty text."""
    record_error: Callable[[Any], None]
    """Called with Snakemake's SubmittedJobInfo before an error of that job is reported."""
    warn_of_waiting: Callable[[str], None] = lambda run_id: None
    """Called with the run id at each check; it may name jobs that wait and cannot start."""


def patch_check_active_jobs(actions: SlurmActions) -> None:
    """Patch the plugin's executor class; to be called before Snakemake makes an executor.

    - If every status query fails, because slurmctld restarts or the network is down, the plugin yields no job, and
      Snakemake waits for jobs that it never asks about again (upstream issue 207). Here a job without an answer is active.
    - The plugin reports a job that its user cancelled in the queue like any failure, and Snakemake retries it. No
      supervisor ran that could record the reason. Here `record_error` does.
    - The plugin leaves a preempted job to Slurm, which does nothing where preemption cancels jobs (PreemptMode=CANCEL).
      Here such a job is requeued under its own id, or reported as failed, so that a retry submits another one. Upstream
      issue 109 brought the present behaviour.
    """
    from snakemake_executor_plugin_slurm import Executor

    if not hasattr(Executor.check_active_jobs, "unpatched"):
        Executor.check_active_jobs = _patched(Executor.check_active_jobs, actions)  # pyright: ignore[reportAttributeAccessIssue]


def patch_refused_submissions(record_refusal: Callable[[Any, str], float]) -> None:
    """Make the plugin call `record_refusal` with job and message before it reports a job that sbatch refused.

    Snakemake would submit a refused job again at once, ten times in 41 seconds. `record_refusal` returns the seconds to wait
    first. The plugin submits all jobs in two threads, so a thread of its own waits: other jobs are submitted meanwhile.
    Upstream: issues 313 and 320.
    """
    from snakemake_executor_plugin_slurm import Executor

    report = Executor._report_job_error_threadsafe
    if not hasattr(report, "unpatched"):
        Executor._report_job_error_threadsafe = _after_pause(report, record_refusal)  # pyright: ignore[reportAttributeAccessIssue]


def _after_pause(report: Any, record_refusal: Callable[[Any, str], float]) -> Any:
    def report_later(executor: Any, job_info: Any, msg: str) -> None:
        def report_unless_stopped() -> None:
            if executor.wait:  # false once Snakemake stops, which then expects no report
                report(executor, job_info, msg)

        if pause_s := record_refusal(job_info.job, msg):
            timer = threading.Timer(pause_s, report_unless_stopped)
            timer.daemon = True  # it does not keep an interrupted Snakemake alive
            timer.start()
        else:
            report(executor, job_info, msg)

    report_later.unpatched = report  # pyright: ignore[reportFunctionMemberAccess]
    return report_later


def send_no_guesses() -> None:
    """Make the plugin send no account and no partition where a job names none; to be called before submissions.

    The plugin takes the account of the user's last job and the partition that `sinfo` marks as default. At centres that choose
    both by QOS, Slurm refuses these options. job.sbatch, the same job, would not have them either. Upstream issue 76 made the
    account optional; the guess remained.
    """
    from snakemake_executor_plugin_slurm import Executor

    if not hasattr(Executor.get_account_arg, "unpatched"):
        Executor.get_account_arg = _without_guess(Executor.get_account_arg, "slurm_account", lambda: iter([""]))  # pyright: ignore[reportAttributeAccessIssue]
        Executor.get_partition_arg = _without_guess(Executor.get_partition_arg, "slurm_partition", lambda: "")  # pyright: ignore[reportAttributeAccessIssue]


def _without_guess(method: Any, resource: str, nothing: Callable[[], Any]) -> Any:
    def named_only(executor: Any, job: Any) -> Any:
        return method(executor, job) if job.resources.get(resource) else nothing()

    named_only.unpatched = method  # pyright: ignore[reportFunctionMemberAccess]
    return named_only


def _patched(check_active_jobs: Any, actions: SlurmActions) -> Any:
    async def check_all(executor: Any, active_jobs: list[Any]) -> AsyncGenerator[Any, None]:
        if not active_jobs:
            return  # the thread of the checks begins before the executor has a run_uuid, and would end with its error
        ended: set[int] = set()
        with _ReportedJobs(executor, ended, actions.record_error):
            async for _ in check_active_jobs(executor, active_jobs):
                pass
            actions.warn_of_waiting(executor.run_uuid)
            _requeue_preempted(executor, [job for job in active_jobs if id(job) not in ended], actions)
        for job in active_jobs:
            if id(job) not in ended:
                yield job

    check_all.unpatched = check_active_jobs  # pyright: ignore[reportFunctionMemberAccess]
    return check_all


def _requeue_preempted(executor: Any, jobs: list[Any], actions: SlurmActions) -> None:
    preempted = set(actions.preempted_jobs(executor.run_uuid)) if jobs else set()
    for job in jobs:
        if job.external_jobid in preempted and (refused := actions.requeue(job.external_jobid)):
            executor.report_job_error(job, msg=f"job {job.external_jobid} was preempted and not requeued: {refused}. ")


class _ReportedJobs:
    """Notes the jobs that an executor reports as ended, for the length of a `with` block."""

    def __init__(self, executor: Any, ended: set[int], record_error: Callable[[Any], None]) -> None:
        self._executor, self._ended, self._record_error = executor, ended, record_error

    def __enter__(self) -> None:
        executor = self._executor
        executor.report_job_success = self._noting(executor.report_job_success)
        executor.report_job_error = self._noting(executor.report_job_error, self._record_error)

    def __exit__(self, *_: object) -> None:
        for name in ("report_job_success", "report_job_error"):
            delattr(self._executor, name)

    def _noting(self, report: Any, before: Callable[[Any], None] = lambda job: None) -> Any:
        def noted(job: Any, *arguments: Any, **options: Any) -> None:
            self._ended.add(id(job))
            before(job)
            report(job, *arguments, **options)

        return noted


def job_comment(rule: str, wildcards: Iterable[str]) -> str:
    """Return the beginning of the --comment that the plugin gives to a job, which distinguishes the jobs of a run."""
    return "_".join((f"rule_{rule}_wildcards", *wildcards))


def job_name_prefix(run: str) -> str:
    """Return what the names of a run's jobs begin with. The plugin appends `_<uuid>`.

    The plugin accepts 50 characters. A longer name ends in a hash of the whole name, which keeps runs apart whose names begin
    with the same text.
    """
    name = f"longhaul-{run}"
    if len(name) <= _PREFIX_CHARACTERS:
        return name
    ending = "-" + hashlib.sha256(name.encode()).hexdigest()[:_HASH_CHARACTERS]
    return name[: _PREFIX_CHARACTERS - len(ending)] + ending


def name_jobs(run: str) -> None:
    """Patch the plugin's executor: names of a run's jobs in Slurm begin with job_name_prefix, unless the user chose another one.

    The plugin has a setting for it, which a command line or a profile can set, but no Snakefile.
    """
    from snakemake_executor_plugin_slurm import Executor

    usual = Executor.__post_init__
    if hasattr(usual, "unpatched"):
        return

    def with_prefix(executor: Any, *arguments: Any, **options: Any) -> None:
        settings = executor.workflow.executor_settings
        settings.jobname_prefix = settings.jobname_prefix or job_name_prefix(run)
        usual(executor, *arguments, **options)

    with_prefix.unpatched = usual  # pyright: ignore[reportFunctionMemberAccess]
    Executor.__post_init__ = with_prefix  # pyright: ignore[reportAttributeAccessIssue]
