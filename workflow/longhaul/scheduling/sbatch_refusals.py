"""Classifies why sbatch refuses a job: permanently (bad account, QOS, limits) or temporarily (busy), and how long to wait.

The texts are those of slurm_strerror and of job submit plugins; the executor plugin adds those of its own account check.
Reason codes, such as QOSMaxNodePerJobLimit, are those of Slurm's src/common/job_state_reason.c (26.11).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longhaul.artifacts.job_state import REFUSED, TRANSIENT, Failure, current_invocation
from longhaul.artifacts.paths import JobFolder, job_of, run_of
from longhaul.scheduling import slurm_client
from longhaul.scheduling.retry_policy import job_folder_of

FIRST_PAUSE_S, LONGEST_PAUSE_S = 15.0, 600.0
_TEMPORARY = re.compile(
    r"MaxSubmit|submit limit|unable to contact slurm|timed out|temporarily|try again|standby|connection refused|transport"
    r"|slurmdbd|too many (jobs|requests)",
    re.IGNORECASE,
)
# A limit of a QOS (with its flag DenyOnLimit), of an association or of an account that the request would exceed.
_LIMIT_CODE = re.compile(r"\b(?:QOS(?:Grp|Max|Min)|Assoc(?:Grp|Max)|Max(?=\w+PerAccount|\w+PerUser))[A-Z]\w+")
# Limits of the number of jobs: they depend on other jobs. At submission, all other limits are compared with the request alone.
_JOB_COUNT_CODE = re.compile(r"SubmitJob|Jobs")
# Limits of used node hours, CPU hours and the like. RunMinutes are those of running jobs only.
_BUDGET_CODE = r"Grp(?!\w*Run)\w*Minutes|GrpWall"
_ASSOCIATIONS = "sacctmgr show assoc user=$USER format=account,partition,qos"
# Pattern of Slurm's text -> key of a partition in the site file, and the command that shows valid values.
_PERMANENT = (
    (r"Assoc(Grp|Max)", "account, max_nodes or max_minutes", f"{_ASSOCIATIONS},grptres,maxtres,maxwall"),
    (r"QOS|Max\w+Per(Account|User)", "qos, max_nodes or max_minutes", "sacctmgr show qos"),
    (r"account", "account", _ASSOCIATIONS),
    (r"partition|group not permitted", "name", "sinfo -s"),
    (r"feature|constraint", "constraint", "sinfo -o '%P %f'"),
    (r"generic resource|gres|gpu", "gpu_request, gpu_type or gres_extra", "sinfo -o '%P %G'"),
    (r"time limit", "max_minutes", "sinfo -o '%P %l'"),
    (r"reservation", "reservation", "scontrol show reservation"),
    (r"license", "sbatch_extra", "scontrol show licenses"),
    (r"memory|MaxMemPerLimit", "memory or node.memory_mb", "sinfo -o '%P %m'"),
    (r"node configuration|node count|more processors|cpu count", "node or max_nodes", "sinfo -o '%P %D %c %m %G'"),
    (r"unrecognized option|invalid option|unknown option", "sbatch_extra", "sbatch --help"),
    (r"permission denied|invalid", "account, name or qos", _ASSOCIATIONS),
)
# What no key of the site file changes.
_OTHER_REMEDIES = (
    (
        _BUDGET_CODE,
        "the budget of the account or QOS does not cover the job; ask your centre for more, or name another account",
    ),
    (r"held|JobHold", "scontrol show job says who holds it; scontrol release starts a job that you may release"),
    (r"DependencyNeverSatisfied", "cancel it with scancel; the same command submits it again"),
)
# Reasons for which a job waits until its request, a limit, a budget or an account is changed.
_NEVER_STARTS = re.compile(
    r"(Account|QOS|Assoc)NotAllowed|Invalid(Account|QOS)|BadConstraints|Partition(Time|Node)Limit|PartitionConfig"
    r"|Max\w+Per(Job|Node)|QOSMin|MaxMemPerLimit|DependencyNeverSatisfied|Reservation(Deleted|Invalid)"
    rf"|[Hh]eld|JobHoldMaxRequeue|{_BUDGET_CODE}"
)


@dataclass(frozen=True)
class Refusal:
    """Slurm's answer to a request that it does not accept. is_permanent: the same request is refused again."""

    reason: str
    is_permanent: bool
    remedy: str


def read_refusal(text: str) -> Refusal:
    """Return what an error message of sbatch means. An unknown text counts as temporary: a retry costs little."""
    reason = _reason(text)
    code = _LIMIT_CODE.search(reason)
    if remedy := "" if _is_temporary(reason, code and code[0]) else remedy_of(code[0] if code else reason):
        return Refusal(reason, True, remedy)
    return Refusal(reason, False, "longhaul submits it again after a pause; the same command again does so later")


def _is_temporary(reason: str, limit_code: str | None) -> bool:
    """Return whether the same request may be accepted later.

    The text beside a limit's code is the same for all limits, and names the number of submitted jobs, too.
    """
    return bool(_JOB_COUNT_CODE.search(limit_code) if limit_code else _TEMPORARY.search(reason))


def remedy_of(reason: str) -> str:
    """Return what changes this reason; empty where it is unknown."""
    for pattern, remedy in _OTHER_REMEDIES:
        if re.search(pattern, reason, re.IGNORECASE):
            return remedy
    for pattern, key, command in _PERMANENT:
        if re.search(pattern, reason, re.IGNORECASE):
            return f"correct {key} of the partition in the site file; {command} shows what is valid"
    return ""


def never_starts(reason: str) -> bool:
    """Return whether a job that waits for this reason waits until somebody changes something."""
    return _NEVER_STARTS.search(reason) is not None


def warner_of_waiting_jobs() -> Callable[[str], None]:
    """Return a function of a run id that prints each waiting job that cannot start, once.

    Some centres accept a job that a partition does not allow, and let it wait for ever.
    """
    warned: set[str] = set()

    def warn(run_id: str) -> None:
        for job_id, reason in slurm_client.pending_reasons(run_id).items():
            if job_id not in warned and never_starts(reason):
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
    cause = f"Slurm refused the job: {refusal.reason}"
    kind = REFUSED if refusal.is_permanent else TRANSIENT
    failure = Failure(kind, cause, refusal.remedy, invocation=current_invocation(run_of(folder)))
    failure.write(JobFolder(folder).failure)
    if not refusal.is_permanent:
        print(f"warning: {job_of(folder)}: {cause}; next try in {pause_s:.0f} s", file=sys.stderr, flush=True)
    return pause_s


def _reason(text: str) -> str:
    """Return the errors in the text in one line, without sbatch's name and without the command that the plugin repeats."""
    quoted = re.search(r"The error message was '(.*?)'\.?\s*(?:\n|$)", text, re.DOTALL)
    lines = (quoted[1] if quoted else text).splitlines()
    errors = [re.sub(r"^(sbatch|srun): (error: )?", "", line).strip() for line in lines]
    return "; ".join(dict.fromkeys(filter(None, errors)))
