"""Remedies for the reasons why Slurm refuses a job or keeps it pending; which reasons never end, and which end by themselves.

The codes are those of Slurm's src/common/job_state_reason.c (26.11), https://slurm.schedmd.com/job_reason_codes.html
"""

from __future__ import annotations

import re

# A limit of a QOS (with its flag DenyOnLimit), of an association or of an account that the request would exceed.
_LIMIT_CODE = re.compile(r"\b(?:QOS(?:Grp|Max|Min)|Assoc(?:Grp|Max)|Max(?=\w+PerAccount|\w+PerUser))[A-Z]\w+")
# Limits of the number of jobs: they depend on other jobs. At submission, all other limits are compared with the request alone.
_JOB_COUNT_CODE = re.compile(r"SubmitJob|Jobs")
# Limits of used node hours, CPU hours and the like. RunMinutes are those of running jobs only.
_BUDGET_CODE = r"Grp(?!\w*Run)\w*Minutes|GrpWall"
_ASSOCIATIONS = "sacctmgr show assoc user=$USER format=account,partition,qos"
_BY_PLUGIN = "not allowed in the 'slurm_extra'"
_UNKNOWN_NODE = "invalid node name"
_NODES = "PartitionNodeLimit|node configuration|node count"
_PROVISIONAL = "PartitionConfig"
# Pattern of Slurm's text -> key of a partition in the site file, and the command that shows valid values.
_PERMANENT = (
    (_PROVISIONAL, "name, account, qos, max_nodes or max_minutes", "scontrol show partition"),
    (r"Assoc(Grp|Max)", "account, max_nodes or max_minutes", f"{_ASSOCIATIONS},grptres,maxtres,maxwall"),
    (r"QOS|Max\w+Per(Account|User)", "qos, max_nodes or max_minutes", "sacctmgr show qos"),
    (r"account", "account", _ASSOCIATIONS),
    (r"feature|constraint", "constraint", "sinfo -o '%P %f'"),
    (r"generic resource|\bgres|gpu", "gpu_request, gpu_type or gres_extra", "sinfo -o '%P %G'"),
    (r"time ?limit", "max_minutes", "sinfo -o '%P %l'"),
    (r"reservation", "reservation", "scontrol show reservation"),
    (r"license", "sbatch_extra", "scontrol show licenses"),
    (r"memory|MaxMemPerLimit", "memory or node.memory_mb", "sinfo -o '%P %m'"),
    (rf"{_NODES}|more processors|(cpu|task) count", "node, max_nodes or name", "sinfo -o '%P %s %D %c %m %G'"),
    (r"partition|group not permitted", "name", "sinfo -s"),
    (
        r"(unrecognized|unknown) option|invalid (option|--)|burst buffer (permission|request)|wckey",
        "sbatch_extra",
        "sbatch --help",
    ),
    (r"permission denied|invalid", "account, name or qos", _ASSOCIATIONS),
)
# Texts with another remedy.
_OTHER_REMEDIES = (
    # Jobs name nodes only to exclude them.
    (
        _UNKNOWN_NODE,
        "release quarantined nodes that the cluster no longer has: longhaul nodes --release NODE; sinfo -N lists its nodes",
    ),
    (_BY_PLUGIN, "remove this option from sbatch_extra of the partition in the site file"),
    (
        _BUDGET_CODE,
        "the budget of the account or QOS does not cover the job; ask your centre for more, or name another account",
    ),
    (r"held|JobHold", "scontrol show job says who holds it; scontrol release starts a job that you may release"),
    (r"DependencyNeverSatisfied", "cancel it with scancel; the same command submits it again"),
)
# Reasons for which a job waits until its request, a limit, a budget or an account is changed.
_NEVER_STARTS = re.compile(
    r"(Account|QOS|Assoc)NotAllowed|Invalid(Account|QOS)|BadConstraints|Partition(Time|Node)Limit"
    r"|Max\w+Per(Job|Node)|QOSMin|MaxMemPerLimit|DependencyNeverSatisfied|Reservation(Deleted|Invalid)"
    rf"|[Hh]eld|JobHoldMaxRequeue|{_BUDGET_CODE}|{_PROVISIONAL}"
)
_MAY_PASS = {
    "QOS": "a limit of the job's QOS is reached: wait, or choose another QOS in the site file",
    "Assoc": "a limit of your account is reached: wait, or ask for a larger one",
    "ReqNodeNotAvail": "nodes that the job needs are down or reserved: see `scontrol show reservation`",
    "Resources": "the nodes are busy: wait",
    "Priority": "other jobs are in front: wait",
    "Dependency": "it waits for another job",
    "BeginTime": "Slurm holds a requeued job back for some minutes: wait",
}
"""Beginning of a reason that may pass -> what to do."""
_PASSES_BY_ITSELF = ("Resources", "Priority", "Dependency", "BeginTime")


def limit_code(text: str) -> str | None:
    """Return the code of the limit that a text of sbatch names; None if it names none."""
    found = _LIMIT_CODE.search(text)
    return found[0] if found else None


def limits_number_of_jobs(code: str) -> bool:
    """Return whether a limit's code is about the number of jobs, which passes when other jobs end."""
    return _JOB_COUNT_CODE.search(code) is not None


def is_about_nodes(reason: str) -> bool:
    """Return whether a partition has too few nodes for a request, without those that it excludes."""
    return re.search(_NODES, reason, re.IGNORECASE) is not None


def is_unknown_node(reason: str) -> bool:
    """Return whether Slurm has no node with a name in the request."""
    return re.search(_UNKNOWN_NODE, reason, re.IGNORECASE) is not None


def is_by_plugin(reason: str) -> bool:
    """Return whether Snakemake's Slurm plugin refused an option, before sbatch."""
    return _BY_PLUGIN in reason


def never_starts(reason: str) -> bool:
    """Return whether a job that waits for this reason waits until somebody changes something."""
    return _NEVER_STARTS.search(reason) is not None


def certainly_never_starts(reason: str, last_reason: str | None) -> bool:
    """Return whether a job never starts, by its reasons now and at the last look (None: this is the first look).

    A job beyond any limit of its partition has a provisional reason when it is submitted, and the name of the limit after the
    next scheduling cycle (_select_nodes_parts and job_limits_check in src/slurmctld/job_mgr.c). Limits without a name keep it.
    """
    return never_starts(reason) and (_PROVISIONAL not in reason or reason == last_reason)


def remedy_of(reason: str) -> str:
    """Return what changes this reason; empty where it is unknown."""
    for pattern, remedy in _OTHER_REMEDIES:
        if re.search(pattern, reason, re.IGNORECASE):
            return remedy
    for pattern, key, command in _PERMANENT:
        if re.search(pattern, reason, re.IGNORECASE):
            return f"correct {key} of the partition in the site file; {command} shows what is valid"
    return ""


def advice_while_waiting(reason: str) -> str:
    """Return what to do about a job that waits for a reason that may pass."""
    return _advice(reason) or "wait, or ask the administrators"


def passes_by_itself(reason: str) -> bool:
    """Return whether a job that waits for this reason starts without anybody's help.

    A limit of nodes or cores may be one that the request alone exceeds; one of the number of jobs passes with other jobs.
    """
    return reason.startswith(_PASSES_BY_ITSELF) or (bool(_advice(reason)) and limits_number_of_jobs(reason))


def _advice(reason: str) -> str:
    return next((advice for start, advice in _MAY_PASS.items() if reason.startswith(start)), "")
