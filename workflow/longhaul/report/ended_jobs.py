"""Explains how Slurm ended a job that left no record: from the state and the exit code in Slurm's accounting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EndedJob:
    """Values that Slurm has of a job that has ended.

    state:     NODE_FAIL, OUT_OF_MEMORY, … (https://slurm.schedmd.com/job_state_codes.html)
    exit_code: `code:signal` of the batch script
    end:       local time, `2026-11-28T18:00:00`
    nodes:     compressed list, n[1-2]
    source:    the command that says so
    """

    state: str
    exit_code: str
    end: str
    nodes: str
    source: str


AskAccounting = Callable[[Sequence[str]], Mapping[str, EndedJob]]
"""Asks Slurm how jobs have ended, by their ids; jobs that Slurm does not know are left out."""

_CAUSES = {
    "NODE_FAIL": ("a node failed", "tell the administrators if it happens again"),
    "BOOT_FAIL": ("a node did not boot", "tell the administrators if it happens again"),
    "OUT_OF_MEMORY": (
        "its processes used more memory of a node than it asked for",
        "ask for more memory in the site file (exclusive: true for a CPU job of few cores), use fewer workers, or offload less",
    ),
    "TIMEOUT": ("it reached its time limit", "if no checkpoint was saved, raise minutes or save more often"),
    "DEADLINE": ("it reached its deadline", "submit without --deadline, or with a later one"),
    "PREEMPTED": ("Slurm gave its nodes to another job", ""),
    "CANCELLED": ("a user or an administrator cancelled it", ""),
    "COMPLETED": ("its batch script ended without an error", "look at the end of its log"),
    "FAILED": ("its batch script failed", "look at the end of its log"),
}
"""State of a job -> its cause, and what to do before the job is started again."""


def how_it_ended(job_id: str, ended: EndedJob) -> tuple[str, str]:
    """Return cause and remedy; the remedy is empty where the job only has to be started again."""
    cause, remedy = _CAUSES.get(ended.state, (f"its state is {ended.state}", ""))
    code, _, signal = ended.exit_code.partition(":")
    # 125 is Slurm's own code of a job without enough memory.
    by_signal = f", killed by signal {signal}" if signal not in ("", "0", "125") else ""
    by_code = f", exit code {code}" if code not in ("", "0") and not by_signal else ""
    when = "an unknown time" if ended.end in ("", "Unknown", "None") else ended.end
    where = f" on {ended.nodes}" if ended.nodes not in ("", "None assigned", "(null)") else ""
    return f"Slurm ended job {job_id} ({ended.state}) at {when}{where}: {cause}{by_signal or by_code}", remedy
