"""Finds the causes for `longhaul doctor`: failure.json, waiting jobs (jobs/slurm_reasons.py), problems in logs, past faults;
formats the findings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from longhaul.artifacts.job_state import State, read_jobs_to_run, read_state
from longhaul.artifacts.leases import Lease
from longhaul.artifacts.line_record_fields import read_events
from longhaul.artifacts.paths import SERVE_KIND, STAGE_KIND, AttemptLogs, JobFolder, RunPaths
from longhaul.errors import UserError, printable
from longhaul.jobs.slurm_reasons import advice_while_waiting, never_starts, passes_by_itself, remedy_of
from longhaul.report.ended_jobs import AskAccounting, EndedJob, how_it_ended
from longhaul.report.past_attempts import past_faults
from longhaul.report.run_status import (
    DONE,
    FAILED,
    INTERRUPTED,
    NOT_STARTED,
    QUEUED,
    RUNNING,
    STARTS_AGAIN,
    UNKNOWN,
    JobStatus,
    RunStatus,
)
from longhaul.report.search_logs import NOT_NEEDED, Finding, search_log
from longhaul.report.stalled_collectives import stalled_collectives

_SEARCHED_ATTEMPTS = 5
_MAIN_PROCESS = "main process"
_OF_BATCH_SCRIPT = re.compile(r"\*\*\* JOB \d|\b\d+\.batch\b")
"""Part of slurmstepd's lines about a job's batch script. Others are about steps: Snakemake repeats logs of failed jobs."""


@dataclass
class _JobLogs:
    """The logs of one job: of its rule, of its newest attempts, the oldest first, and those of sbatch."""

    of_rule: list[Path] = field(default_factory=list)
    attempts: list[Path] = field(default_factory=list)
    of_sbatch: list[Path] = field(default_factory=list)


def diagnose(
    paths: RunPaths, status: RunStatus, slurm_logs: Path, ask_accounting: AskAccounting = lambda job_ids: {}
) -> list[Finding]:
    """Return what explains the state of a run: what stops it now, then what its jobs have survived.

    slurm_logs:     folder of the logs that the Slurm plugin asks sbatch to write; it may be absent
    ask_accounting: called once, if jobs have left Slurm's queue without a record of their end
    """
    jobs = status.jobs_and_servers
    logs = _logs_by_job(paths, jobs, slurm_logs)
    present = [finding for job in jobs for finding in _present_problems(job, logs[job.name])]
    return [
        *_recorded_failures(jobs, ask_accounting),
        *_waiting_jobs(jobs),
        *sorted(present, key=lambda finding: (finding.follows, finding.rank)),
        *_failed_fetches(status),
        *_ended_main_process(paths, status),
        *_unchecked_main_process(paths, status),
        *_ended_controllers(paths),
        *_unknown_queue(status),
        *_removed_logs(jobs, logs),
        *(fault for job in jobs for fault in _past_faults(job, logs[job.name])),
    ]


def _present_problems(job: JobStatus, logs: _JobLogs) -> Iterator[Finding]:
    """Yield what the logs of a job that is not done show.

    Of a job that runs, the newest attempt alone counts. All attempts of a job that waits in Slurm's queue have ended.
    """
    if job.state == DONE:
        return
    attempts = {QUEUED: [], RUNNING: logs.attempts[-1:]}.get(job.state, logs.attempts)
    of_sbatch = [] if job.state in (QUEUED, RUNNING) else logs.of_sbatch
    for path in [*logs.of_rule, *attempts, *of_sbatch]:
        yield from search_log(job.name, path)
    if attempts:
        yield from stalled_collectives(job.name, logs.attempts[-1], _nodes(job))


def _nodes(job: JobStatus) -> list[str]:
    """Return the nodes of a job's newest allocation, in the order of its ranks."""
    path = JobFolder(Path(job.folder)).state
    try:
        return State.read(path).nodes if path.exists() else []
    except UserError:
        return []  # the status names the damaged file


def _past_faults(job: JobStatus, logs: _JobLogs) -> list[Finding]:
    """Return the faults that a job has survived; of a failed job, its failure says them."""
    if job.state in (FAILED, STARTS_AGAIN, INTERRUPTED, UNKNOWN, NOT_STARTED):
        return []
    ended = logs.attempts if job.state == QUEUED else logs.attempts[:-1]
    found = [finding for path in [*ended, *logs.of_sbatch] for finding in search_log(job.name, path)]
    if job.state == DONE:
        found += [finding for path in logs.attempts[-1:] for finding in search_log(job.name, path) if finding.is_note]
    found += [finding for path in ended for finding in stalled_collectives(job.name, path, [])]
    history = JobFolder(Path(job.folder)).history
    return past_faults(job.name, history, read_events(history), found)


def _recorded_failures(jobs: list[JobStatus], ask_accounting: AskAccounting) -> Iterator[Finding]:
    lost = [job.slurm_job_id for job in jobs if job.slurm_job_id and _left_no_record(job)]
    ended = ask_accounting(lost) if lost else {}
    for job in jobs:
        job_id = job.slurm_job_id or ""
        if job.state == INTERRUPTED and job_id in ended:
            yield _ended_by_slurm(job, job_id, ended[job_id])
        elif job.state in (FAILED, STARTS_AGAIN, INTERRUPTED, UNKNOWN):
            record = JobFolder(Path(job.folder))
            is_of_failure = (
                job.state in (FAILED, STARTS_AGAIN) or str(record.failure) in job.detail
            )  # which may be that it is damaged
            evidence = record.failure if is_of_failure else record.state
            yield Finding(job.name, job.detail, str(evidence), job.remedy or _start_again(job))


def _left_no_record(job: JobStatus) -> bool:
    """Return whether no process recorded why the job ended. A supervisor that waits for another allocation recorded it."""
    state = read_state(Path(job.folder)) if job.state == INTERRUPTED else None
    return state is not None and state.state == "running"


def _ended_by_slurm(job: JobStatus, job_id: str, ended: EndedJob) -> Finding:
    cause, remedy = how_it_ended(job_id, ended)
    return Finding(job.name, cause, ended.source, "; ".join(filter(None, (remedy, _start_again(job)))))


def _start_again(job: JobStatus) -> str:
    if job.kind == SERVE_KIND:
        return f"start the server again: longhaul serve CONFIG {job.name.removeprefix(f'{SERVE_KIND}-')}"
    if job.state == STARTS_AGAIN:
        return "wait: the main process starts the job again"
    continues = ": the job continues from its last checkpoint" if job.kind == STAGE_KIND else ""
    return f"run the same command again{continues}"


def _waiting_jobs(jobs: list[JobStatus]) -> Iterator[Finding]:
    for job in jobs:
        if job.state == QUEUED:
            reason = job.detail.removeprefix("waits: ")
            waits = f"the job waits in Slurm's queue{', and will not start' if never_starts(reason) else ''}: {reason}"
            remedy = remedy_of(reason) if never_starts(reason) else advice_while_waiting(reason)
            evidence = f"squeue, job {job.slurm_job_id}"
            yield Finding(job.name, waits, evidence, remedy, continues=passes_by_itself(reason))


def _failed_fetches(status: RunStatus) -> Iterator[Finding]:
    for fetch in status.failed_fetches:
        yield Finding(fetch.name, fetch.cause, fetch.evidence, fetch.remedy)


def _ended_main_process(paths: RunPaths, status: RunStatus) -> Iterator[Finding]:
    """Yield that nothing works on a run whose jobs are not all done."""
    left = [job.name for job in status.jobs if job.state != DONE]
    never_started = status.state == NOT_STARTED and not read_jobs_to_run(paths).left
    if status.main_process or not left or status.state == FAILED or never_started:
        return
    has_jobs_in_slurm = any(job.slurm_job_id for job in status.jobs)
    in_queue = ", and waits for jobs that are still in Slurm's queue" if has_jobs_in_slurm else ""
    owner = Lease(paths.lease).current_owner()
    how = f"{owner} ended without releasing the run: it was killed, or its host failed" if owner else "it was stopped"
    yield Finding(
        _MAIN_PROCESS,
        f"the main Snakemake process has ended before all jobs were done, {how}; left: {', '.join(left)}",
        str(paths.lease) if owner else f"{paths.lease} does not exist",
        "run the same command again: it continues" + in_queue,
    )


def _unchecked_main_process(paths: RunPaths, status: RunStatus) -> Iterator[Finding]:
    """Yield that the main process may have ended, where no job in Slurm's queue shows that the run continues."""
    goes_on = any(job.slurm_job_id and job.state in (RUNNING, QUEUED) for job in status.jobs)
    host = status.unchecked_host
    if host and not goes_on and status.state != DONE:
        yield Finding(
            _MAIN_PROCESS,
            f"whether {status.main_process} still runs cannot be checked from this host",
            str(paths.lease),
            f"run `longhaul doctor` on {host}; if {host} will not come back, rm {paths.lease} and run the same command again",
        )


def _ended_controllers(paths: RunPaths) -> Iterator[Finding]:
    """Yield why Slurm ended jobs of controller.sbatch. Other lines of their log are about the run's jobs, which have own logs."""
    for finding in search_log(_MAIN_PROCESS, paths.controller_log, _OF_BATCH_SCRIPT):
        remedy = f"{NOT_NEEDED} while the successor that it submitted waits or runs"
        yield replace(finding, cause=f"its job, controller.sbatch, has ended: {finding.cause}", remedy=remedy)


def _unknown_queue(status: RunStatus) -> Iterator[Finding]:
    if status.queue_problem:
        cause = f"Slurm's queue is unknown, so states are those that the jobs recorded last: {status.queue_problem}"
        yield Finding("Slurm", cause, "squeue", "ask on a host of the cluster where Slurm answers")


def _removed_logs(jobs: list[JobStatus], logs: dict[str, _JobLogs]) -> Iterator[Finding]:
    """Yield the jobs whose logs would explain more, and have been removed."""
    for job in jobs:
        found = logs[job.name]
        has_logs = found.of_rule or found.attempts or found.of_sbatch
        if job.state in (FAILED, INTERRUPTED) and not has_logs:
            cause = "its logs do not exist any more: only its records were read"
            yield Finding(job.name, cause, job.log, "run the same command again: a new attempt writes a new log")


def _logs_by_job(paths: RunPaths, jobs: list[JobStatus], slurm_logs: Path) -> dict[str, _JobLogs]:
    """Return the logs of every job: of its rule, of its newest attempts, and those of sbatch by job id."""
    found = {job.name: _JobLogs() for job in jobs}
    for folder in sorted({path.parent for path in paths.logs.rglob("*.log")}):
        attempts = AttemptLogs(folder).logs()
        if logs := found.get(_job_name(paths, folder)):
            logs.attempts += attempts[-_SEARCHED_ATTEMPTS:]
        for path in sorted(set(folder.glob("*.log")) - set(attempts)):
            if logs := found.get(_job_name(paths, path.with_suffix(""))):
                logs.of_rule.append(path)
    of_sbatch = {path.stem: path for path in slurm_logs.rglob("*.log")}
    for job in jobs:
        events = read_events(JobFolder(Path(job.folder)).history)
        ids = dict.fromkeys(str(event["job_id"]) for event in events if event.get("job_id"))
        found[job.name].of_sbatch += [of_sbatch[job_id] for job_id in ids if job_id in of_sbatch]
    return found


def _job_name(paths: RunPaths, log: Path) -> str:
    """Return the name of the job that logs/<kind>/<names> belongs to."""
    return "-".join(log.relative_to(paths.logs).parts)


def findings_text(findings: list[Finding], status: RunStatus) -> str:
    """Return the findings for people: numbered problems, the most likely cause first, then notes about what needs no action."""
    problems = [finding for finding in findings if not finding.is_note]
    notes = [finding for finding in findings if finding.is_note]
    parts = [_finding_text(f"{number}.", finding) for number, finding in enumerate(problems, 1)]
    if not problems:
        parts.append(f"No problem found: run {status.run} is {status.state}.")
    if notes:
        parts += ["Notes (the run goes on):", *(_finding_text(" -", finding) for finding in notes)]
    return "\n\n".join(parts)


def _finding_text(mark: str, finding: Finding) -> str:
    often = f" ({finding.count} times)" if finding.count > 1 else ""
    effect = " This is usually the effect of another problem." if finding.follows else ""
    return printable(
        f"{mark} {finding.job}: {finding.cause}{often}.{effect}\n"
        f"   evidence: {finding.evidence}\n"
        f"   remedy: {finding.remedy}"
    )
