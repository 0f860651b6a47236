"""Expected answers of `longhaul doctor` to each fault of the matrix: a pattern of its first finding."""

from __future__ import annotations

import re

_KILLED = "a process was killed with signal 9"
_NO_RECORD = "the supervisor left no record of an attempt's end"
_MAIN_ENDED = "the main Snakemake process has ended before all jobs were done"
_STOPPED = "stopped by a user or a signal"
"""Without Slurm, the main process sends SIGTERM to its jobs."""
_PREEMPTED = "Slurm gave the nodes to another job"
_ALLOCATION_ENDED = "Slurm ended the allocation before the job was done, for a preemption"
"""Slurm signals a job at the begin of its grace time and does not say why."""
_NODE_LOST = "a node died|does not respond|sent no heartbeat"
_BATCHES_SKIPPED = "the gradient norm of some batches was not finite or jumped, so they were skipped"
STOPPED_FIRST = "cancelled by scancel"
"""Some cases cancel a run before they damage its files. doctor names this cause where the damage changes nothing."""
EXPECTED = {
    "kill -9 of a rank": _KILLED,
    "kill -9 of rank 0": _KILLED,
    "kill -9 of the process": _KILLED,
    "kill -9 of the supervisor": _NO_RECORD,
    "kill -9 of the nested snakemake": f"{_NO_RECORD}|Slurm ended the allocation",
    "kill -9 of the main snakemake": f"{_MAIN_ENDED}|the main process of the run was killed",
    "SIGINT of the main snakemake": f"{_MAIN_ENDED}|cancelled by scancel|{_STOPPED}",
    "SIGTERM of the main snakemake": f"{_MAIN_ENDED}|{_STOPPED}",
    "scancel": STOPPED_FIRST,
    "scontrol requeue": "the job was put back into Slurm's queue",
    "preemption": _PREEMPTED,
    "preemption of one process": _PREEMPTED,
    "preemption with grace": f"{_PREEMPTED}|{_ALLOCATION_ENDED}",
    "preemption that cancels": _PREEMPTED,
    "preemption that cancels, with grace": f"{_PREEMPTED}|{_ALLOCATION_ENDED}",
    "time limit": "time limit|the allocation ended|the allocation ends",
    "time limit of one process": "time limit|the allocation ended|the allocation ends",
    "power-off of a node": _NODE_LOST,
    "power-off of the first node": f"{_NODE_LOST}|{_NO_RECORD}",
    "power-off of the node": f"{_NODE_LOST}|{_NO_RECORD}",
    "link unplugged for 10 s": _NODE_LOST,
    "link unplugged for good": _NODE_LOST,
    "link of the first node unplugged for good": f"{_NODE_LOST}|{_NO_RECORD}",
    "a hung rank": "sent no heartbeat",
    "a hung rank 0": "sent no heartbeat",
    "a slow rank": "a rank is slower than the others",
    "disk full": "disk full",
    "disk of the exports full": "disk full: an export needs",
    "disk too small, then freed": "GB free, checks.min_disk_free_gb is 0.02",
    "weights folder not writable, then writable": "Read-only file system",
    "clock wrong, then right": "clock is [+]3600",
    "host names not resolved": "cannot resolve n",
    "payload in the newest checkpoint": "is not read, because it holds more than tensors",
    "token shard damaged": "does not have the hash",
    "tokenizer damaged": "does not have the hash",
    "records torn": STOPPED_FIRST,
    "newest checkpoint damaged": "a checkpoint is damaged",
    "time limit of the controller job": "controller.sbatch, has ended: the job reached its time limit",
    "NaN in 3 batches, skip": _BATCHES_SKIPPED,
    "NaN in 3 batches, roll_back": _BATCHES_SKIPPED,
}
"""Fault -> pattern."""
NOT_NOTICED = ("slurmctld restarted", "slurmd restarted")
"""Faults that no job of a run notices: its job has no problem."""


def names_the_cause(fault: str, cause: str) -> bool:
    """Return whether a cause that doctor gives is that of a fault."""
    return re.search(EXPECTED[fault], cause) is not None
