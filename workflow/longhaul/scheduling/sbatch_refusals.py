"""Decides whether sbatch may accept a refused job later, and after which pause; remedies are in jobs/slurm_reasons.py.

The texts are those of slurm_strerror and of job submit plugins; the executor plugin adds those of its own account check.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longhaul.artifacts.job_state import REFUSED, TRANSIENT, Failure, current_invocation
from longhaul.artifacts.paths import QUARANTINE, JobFolder, job_of, run_of
from longhaul.artifacts.quarantine import quarantined_nodes
from longhaul.jobs.slurm_reasons import (
    certainly_never_starts,
    is_about_nodes,
    is_by_plugin,
    is_unknown_node,
    limit_code,
    limits_number_of_jobs,
    remedy_of,
)
from longhaul.scheduling import slurm_client
from longhaul.scheduling.node_shortage import quarantine_text, shortage_of_job, shortage_remedy
from longhaul.scheduling.retry_policy import job_folder_of, partition_of

FIRST_PAUSE_S, LONGEST_PAUSE_S = 15.0, 600.0
_TEMPORARY = re.compile(
    r"MaxSubmit|submit limit|submissions disabled|MaxJobCount|unable to contact slurm|timed out|temporarily|try again|standby"
    r"|connection refused|transport|slurmdbd|database|too many (jobs|requests)|in progress|in use|not (available|usable) now"
    r"|currently unavailable|maintenance|partition not available|DOWN state",
    re.IGNORECASE,
)

_SUBMITTED_AGAIN = "longhaul submits it again after a pause; the same command again does so later"
ASK_AGAIN = "Slurm may accept it later; the same command asks again"
"""Remedy of a temporary refusal for verbs that submit nothing of a run."""
# Some centres allow no job without an account: https://docs.csc.fi/computing/running/creating-job-scripts-roihu/
_MISSING_ACCOUNT = (
    "; if no job of yours is queued, name another account in the site file: Slurm says so of a missing one, too"
)


@dataclass(frozen=True)
class Refusal:
    """Slurm's answer to a request that it does not accept. is_permanent: the same request is refused again."""

    reason: str
    is_permanent: bool
    remedy: str


def read_refusal(text: str, later: str = _SUBMITTED_AGAIN) -> Refusal:
    """Return what an error message of sbatch means. An unknown text counts as temporary: a retry costs little.

    later: remedy of a temporary refusal
    """
    reason = _reason(text)
    code = limit_code(reason)
    if remedy := "" if _is_temporary(reason, code) else remedy_of(code or reason):
        return Refusal(reason, True, remedy)
    return Refusal(reason, False, f"{later}{_MISSING_ACCOUNT if code else ''}")


def _is_temporary(reason: str, code: str | None) -> bool:
    """Return whether the same request may be accepted later.

    The text beside a limit's code is the same for all limits, and names the number of submitted jobs, too.
    """
    return limits_number_of_jobs(code) if code else _TEMPORARY.search(reason) is not None


def warner_of_waiting_jobs() -> Callable[[str], None]:
    """Return a function of a run id that prints each waiting job that cannot start, once.

    Some centres accept a job that a partition does not allow, and let it wait without end. A provisional reason is printed
    when the job still has it at the next call.
    """
    warned: set[str] = set()
    before: dict[str, str] = {}

    def warn(run_id: str) -> None:
        nonlocal before
        last, before = before, slurm_client.pending_reasons(run_id)
        for job_id, reason in before.items():
            if job_id not in warned and certainly_never_starts(reason, last.get(job_id)):
                warned.add(job_id)
                text = f"job {job_id} waits and will not start; Slurm's reason: {reason}. {remedy_of(reason)}"
                print(f"warning: {text}", file=sys.stderr, flush=True)

    return warn


def record_refusal(job: Any, message: str) -> float:
    """Record and print why a Snakemake job was refused. Return the seconds to wait before it may be submitted again.

    After a permanent refusal, this main process does not retry the job. The next one does. After a temporary one, the pauses
    grow.
    """
    refusal, folder = read_refusal(message), job_folder_of(job)
    pause_s = 0.0 if refusal.is_permanent else min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (max(1, job.attempt) - 1))
    if folder is None:
        return pause_s
    cause, remedy = _cause_and_remedy(refusal, folder, partition_of(job))
    kind = REFUSED if refusal.is_permanent else TRANSIENT
    failure = Failure(kind, cause, remedy, invocation=current_invocation(run_of(folder)))
    failure.write(JobFolder(folder).failure)
    if not refusal.is_permanent:
        text = f"{cause}; next try in {pause_s:.0f} s; {refusal.remedy}"
        print(f"warning: {job_of(folder)}: {text}", file=sys.stderr, flush=True)
    return pause_s


def _cause_and_remedy(refusal: Refusal, folder: Path, partition: str | None) -> tuple[str, str]:
    """Return cause and remedy of a refusal. The quarantine comes first if it is about nodes: the job excludes some."""
    who = "Snakemake's Slurm plugin" if is_by_plugin(refusal.reason) else "Slurm"
    said = f"{who} refused the job: {refusal.reason}"
    is_unknown = is_unknown_node(refusal.reason)
    excluded = quarantined_nodes(QUARANTINE) if is_unknown or is_about_nodes(refusal.reason) else ()
    if not excluded:
        return said, refusal.remedy
    cause = f"the job excludes quarantined nodes: {quarantine_text(QUARANTINE, excluded)}; {said}"
    if is_unknown:
        return cause, refusal.remedy
    if shortage := shortage_of_job(folder, partition):
        return f"{shortage.cause}; {said}", shortage.remedy
    return cause, f"{shortage_remedy(QUARANTINE)}; if enough nodes are left, {refusal.remedy}"


def _reason(text: str) -> str:
    """Return the errors in the text in one line, without sbatch's name and without the command that the plugin repeats."""
    quoted = re.search(r"The error message was '(.*?)'\.?\s*(?:\n|$)", text, re.DOTALL)
    lines = (quoted[1] if quoted else text).splitlines()
    errors = [re.sub(r"^(sbatch|srun): (error: )?", "", line).strip() for line in lines]
    return "; ".join(dict.fromkeys(filter(None, errors)))
