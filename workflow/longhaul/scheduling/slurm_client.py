"""Slurm's own commands, and an answer that never confuses «I do not know» with «it is gone»."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from longhaul.errors import UserError

_ANSWER_S = 30.0
_ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}


class SlurmSilentError(Exception):
    """Slurm did not answer, or answered with an error of its own."""


@dataclass(frozen=True)
class JobInfo:
    """One job as `scontrol show job` has it; submit_s (of its last queueing) and end_s in seconds since the epoch.

    Both by slurmctld's clock: add `clock_ahead_s` for this host's.
    """

    state: str
    nodes: int
    node_list: str
    end_s: float | None
    preempted: bool
    submit_s: float | None = None
    partition: str = ""
    reason: str = "None"
    restarts: int = 0

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED

    @property
    def has_not_begun(self) -> bool:
        """Whether it never had nodes."""
        return self.node_list in ("", "(null)")

    def is_cancelled(self, restarts: int) -> bool:
        """By scancel; restarts: how often the job had been queued again when it started.

        While its processes end, COMPLETING hides why. A time limit and a dead node are a Reason then, a preemption has its time,
        and what is queued again counts as restarted at once.
        """
        ends_without_a_word = self.reason == "None" and not self.preempted and self.restarts == restarts
        return self.state == "CANCELLED" or (self.state == "COMPLETING" and ends_without_a_word)

    @property
    def is_at_its_limit(self) -> bool:
        return self.state == "TIMEOUT" or (self.state == "COMPLETING" and self.reason == "TimeLimit")


def job_info(job_id: str) -> JobInfo | None:
    """None when Slurm knows no such job (any more).

    Raises:
        SlurmSilentError: Slurm does not answer.
    """
    try:
        return parse_job(_scontrol("--oneliner", "show", "job", job_id))
    except SlurmSilentError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def parse_job(shown: str) -> JobInfo:
    """One line of `scontrol --oneliner show job`."""
    found = dict(re.findall(r"(\w+)=(\S*)", shown))
    return JobInfo(
        state=found.get("JobState", ""),
        nodes=int(re.match(r"\d+", found.get("NumNodes", "0"))[0]),  # pyright: ignore[reportOptionalSubscript]
        node_list=found.get("NodeList", ""),
        end_s=_seconds(found.get("EndTime", "")),
        preempted=_seconds(found.get("PreemptTime", "")) is not None,
        submit_s=_seconds(found.get("SubmitTime", "")),
        partition=found.get("Partition", ""),
        reason=found.get("Reason", "None"),
        restarts=int(found.get("Restarts", 0)),
    )


def clock_ahead_s() -> float:
    """This host's clock minus slurmctld's, at least, to a second; 0 when Slurm does not answer.

    scontrol reckons RunTime and TimeLeft by its own host's clock; only the date of the configuration is slurmctld's now.
    """
    before_s = time.time()
    try:
        found = re.search(r"Configuration data as of (\S+)", _scontrol("show", "config"))
    except SlurmSilentError:
        return 0.0
    answered_s = _seconds(found[1]) if found else None
    return 0.0 if answered_s is None else before_s - answered_s - 1.0  # it was up to a second later


def job_has_ended(job_id: str) -> bool:
    """Whether it is surely over; a Slurm that does not answer says nothing."""
    try:
        info = job_info(job_id)
    except (SlurmSilentError, UserError):
        return False
    return info is None or info.has_ended


def preempted_jobs(name: str) -> list[str]:
    """Ids of the jobs of this name that a preemption ended, and that are not in the queue again; [] without an answer."""
    try:
        return _run("squeue", "--noheader", f"--name={name}", "--states=PREEMPTED", "--format=%i").split()
    except SlurmSilentError:
        return []


def nodes_of(partition: str) -> list[str]:
    """Every node of a partition, whatever its state; [] when Slurm does not answer."""
    try:
        return list(dict.fromkeys(_run("sinfo", "--noheader", "-N", "-p", partition, "-o", "%N").split()))
    except SlurmSilentError:
        return []


def too_few_nodes(partition: str, wanted: int, left_out: list[str]) -> str:
    """Why a job of `wanted` nodes cannot be placed without those that are left out; "" when it can, or Slurm is silent."""
    nodes = nodes_of(partition) if left_out and partition else []
    left = [node for node in nodes if node not in left_out]
    if not nodes or len(left) >= wanted:
        return ""
    out = ", ".join(node for node in nodes if node in left_out)
    return f"{wanted} nodes are needed; partition {partition} has {len(nodes)}, of which {out} are quarantined"


def hostnames(node_list: str) -> list[str]:
    return _scontrol("show", "hostnames", node_list).split()


def requeue(job_id: str, excluded: Sequence[str] = ()) -> str:
    """Puts the job back into the queue, away from `excluded` nodes; returns why it could not be done, else ""."""
    try:
        _scontrol("requeue", job_id)
    except SlurmSilentError as error:
        return str(error)
    if excluded:
        try:
            _scontrol("update", f"JobId={job_id}", f"ExcNodeList={','.join(excluded)}")
        except SlurmSilentError as error:
            print(f"warning: {', '.join(excluded)} could not be excluded: {error}", flush=True)
    return ""


def down_nodes(nodes: list[str]) -> list[str]:
    """Those that Slurm has down, failing or not responding; [] when it does not answer."""
    try:
        shown = _run("sinfo", "--noheader", "-N", "-n", ",".join(nodes), "-o", "%N %T")
    except SlurmSilentError:
        return []
    states = dict(line.split(maxsplit=1) for line in shown.splitlines() if " " in line)
    return [node for node in nodes if re.match(r"down|fail|drain\w*\*|.*\*$", states.get(node, ""))]


def silent_nodes(nodes: list[str], wait_s: float) -> list[str]:
    """Nodes of this job's allocation on which no process can be started within `wait_s` seconds."""

    def answers(node: str) -> bool:
        try:
            _run(
                "srun",
                "--overlap",
                "--nodes=1",
                "--ntasks=1",
                f"--nodelist={node}",
                "--mpi=none",
                "true",
                wait_s=wait_s,
            )
            return True
        except SlurmSilentError:
            return False

    with ThreadPoolExecutor(min(32, len(nodes))) as pool:
        return [node for node, answered in zip(nodes, pool.map(answers, nodes), strict=True) if not answered]


def _scontrol(*words: str) -> str:
    return _run("scontrol", *words)


def _run(*words: str, wait_s: float = _ANSWER_S) -> str:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=wait_s, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise UserError(
            f"{words[0]} is not on the PATH of this node", "submit through Slurm, or load its module"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmSilentError(f"{words[0]} did not answer within {wait_s:g} s") from None
    if done.returncode:
        raise SlurmSilentError((done.stderr or done.stdout).strip() or f"{words[0]} ended with {done.returncode}")
    return done.stdout


def _seconds(time: str) -> float | None:
    """Slurm's local time; None for "None", "Unknown" and the like."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return None
