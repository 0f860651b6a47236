"""Calls scontrol, squeue, sacct, sacctmgr, sbatch --test-only and srun: job info, queue, requeue, node lists, down nodes. An
error of Slurm is never mistaken for a job that is unknown to Slurm or finished.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from longhaul.errors import UserError

COMMAND_TIMEOUT_S = 30.0
_EXCLUDE_TIMEOUT_S = 2.0
"""Slurm kills what is left of a requeued job KillWait seconds after its SIGTERM; the default is 30 s."""
END_STATES = {
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


class SlurmCommandError(Exception):
    """Slurm did not answer in time, or its command failed."""


@dataclass(frozen=True)
class JobInfo:
    """One job as `scontrol show job` describes it.

    submit_s, end_s: last submission and end of the job, in seconds since the epoch by slurmctld's clock. Add `clock_offset_s`
                     for this host's clock.
    restarts:        how often the job was requeued.
    exit_code:       `code:signal` of the batch script.
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
    exit_code: str = ""

    @property
    def has_ended(self) -> bool:
        return self.state in END_STATES

    @property
    def never_started(self) -> bool:
        """Return whether the job never had nodes."""
        return self.node_list in ("", "(null)")

    def was_cancelled(self, restarts_at_start: int) -> bool:
        """Return whether the job was cancelled by scancel.

        restarts_at_start: `restarts` when the current allocation began.

        While the job's processes end, its state is COMPLETING, for any cause. Other causes leave a trace: a time limit
        and a dead node set Reason, a preemption sets PreemptTime, and a requeue increments Restarts at once.
        """
        no_other_cause = self.reason == "None" and not self.preempted and self.restarts == restarts_at_start
        return self.state == "CANCELLED" or (self.state == "COMPLETING" and no_other_cause)

    @property
    def reached_time_limit(self) -> bool:
        return self.state == "TIMEOUT" or (self.state == "COMPLETING" and self.reason == "TimeLimit")


def job_info(job_id: str) -> JobInfo | None:
    """Return a job's description; None if the job is unknown to Slurm (it never existed, or Slurm has purged it).

    Raises:
        SlurmCommandError: Slurm does not answer.
    """
    try:
        return parse_job(_scontrol("--oneliner", "show", "job", job_id))
    except SlurmCommandError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def parse_job(line: str) -> JobInfo:
    """Parse one line of `scontrol --oneliner show job`."""
    fields = dict(re.findall(r"(\w+)=(\S*)", line))
    nodes = re.match(r"\d+", fields.get("NumNodes", "0"))
    return JobInfo(
        state=fields.get("JobState", ""),
        nodes=int(nodes[0]) if nodes else 0,
        node_list=fields.get("NodeList", ""),
        end_s=_epoch_s(fields.get("EndTime", "")),
        preempted=_epoch_s(fields.get("PreemptTime", "")) is not None,
        submit_s=_epoch_s(fields.get("SubmitTime", "")),
        partition=fields.get("Partition", ""),
        reason=fields.get("Reason", "None"),
        restarts=int(fields.get("Restarts", 0)),
        exit_code=fields.get("ExitCode", ""),
    )


def clock_offset_s() -> float:
    """Return this host's clock minus slurmctld's, rounded down to a second; 0 if Slurm does not answer.

    scontrol computes RunTime and TimeLeft with the clock of its own host. Only the date of the configuration is slurmctld's.
    """
    before_s = time.time()
    try:
        found = re.search(r"Configuration data as of (\S+)", _scontrol("show", "config"))
    except SlurmCommandError:
        return 0.0
    answered_s = _epoch_s(found[1]) if found else None
    return 0.0 if answered_s is None else before_s - answered_s - 1.0  # the date was cut to a whole second


def job_has_ended(job_id: str) -> bool:
    """Return whether the job is finished or unknown to Slurm; False if Slurm does not answer."""
    try:
        info = job_info(job_id)
    except (SlurmCommandError, UserError):
        return False
    return info is None or info.has_ended


def preempted_jobs(name: str) -> list[str]:
    """Return ids of jobs of this name that a preemption ended and that are not queued; [] if Slurm does not answer."""
    try:
        return _run("squeue", "--noheader", f"--name={name}", "--states=PREEMPTED", "--format=%i").split()
    except SlurmCommandError:
        return []


@dataclass(frozen=True)
class QueueEntry:
    """One job as squeue lists it. expected_start: local time, or "N/A"."""

    job_id: str
    state: str
    reason: str
    expected_start: str
    name: str
    comment: str
    in_folder: bool = True


def queue_of(user_id: int, working_folder: str, timeout_s: float = COMMAND_TIMEOUT_S) -> list[QueueEntry]:
    """Return the jobs of a user in Slurm's queue; `in_folder` says which of them work in a folder.

    Raises:
        SlurmCommandError: Slurm does not answer.
    """
    columns = "%i|%T|%r|%S|%j|%k|%Z"
    lines = _run("squeue", "--noheader", f"--user={user_id}", f"--format={columns}", timeout_s=timeout_s).splitlines()
    found = [line.split("|", 5) for line in lines if line.count("|") >= 6]
    split = [(*fields[:5], *fields[5].rsplit("|", 1)) for fields in found]
    return [QueueEntry(*fields[:6], in_folder=fields[6] == working_folder) for fields in split]


def accounting(job_ids: Sequence[str], columns: Sequence[str]) -> list[list[str]]:
    """Return these columns of sacct for jobs, one row each.

    Raises:
        SlurmCommandError: there is no accounting, or it does not answer.
    """
    lines = _run("sacct", "-XnP", f"--jobs={','.join(job_ids)}", f"--format={','.join(columns)}").splitlines()
    return [fields for line in lines if len(fields := line.split("|")) == len(columns)]


def pending_reasons(name: str) -> dict[str, str]:
    """Return job id -> Slurm's reason for all jobs of this name that wait; {} if Slurm does not answer."""
    try:
        shown = _run("squeue", "--noheader", f"--name={name}", "--states=PENDING", "--format=%i %r")
    except SlurmCommandError:
        return {}
    return dict(line.split(maxsplit=1) for line in shown.splitlines() if " " in line.strip())


def partition_nodes(partition: str) -> list[str]:
    """Return all nodes of a partition, in any state; [] if Slurm does not answer."""
    try:
        return list(dict.fromkeys(_run("sinfo", "--noheader", "-N", "-p", partition, "-o", "%N").split()))
    except SlurmCommandError:
        return []


def try_submission(options: Sequence[str]) -> str:
    """Return what sbatch says to a job with these options, which is not submitted: when and where it could start.

    sbatch counts such a question as a job ("Job 7 to start at …"), and users look for that job in the queue.

    Raises:
        SlurmCommandError: sbatch would refuse it.
    """
    done = _completed("sbatch", "--test-only", *options, "--output=/dev/null", "--wrap=true")
    return re.sub(r"\bJob \d+ to start at\b", "could start at", done.stderr.strip().removeprefix("sbatch: "))


def submit(options: Sequence[str], script: Path) -> str:
    """Submit a job script with these options, and return the job's id.

    Raises:
        SlurmCommandError: sbatch refuses the job.
    """
    printed = _run("sbatch", "--parsable", *options, str(script)).strip()
    job_id = printed.partition(";")[0]  # a cluster's name may follow
    if not job_id.isdigit():
        raise SlurmCommandError(f"sbatch printed {printed!r} instead of a job id")
    return job_id


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; print a warning if Slurm does not answer."""
    try:
        if job_ids:
            _run("scancel", *job_ids)
    except SlurmCommandError as error:
        print(f"warning: jobs {', '.join(job_ids)} could not be cancelled: {error}", flush=True)


def show_all(kind: str) -> list[dict[str, str]]:
    """Return the fields of every partition or node, as `scontrol show` prints them, also of partitions that it hides."""
    lines = _scontrol("--all", "--oneliner", "show", kind).splitlines()
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines if "=" in line]


def settings() -> dict[str, str]:
    """Return slurmctld's configuration, as `scontrol show config` prints it; {} if Slurm does not answer."""
    try:
        lines = _scontrol("show", "config").splitlines()
    except SlurmCommandError:
        return {}
    return {key.strip(): value.strip() for key, equals, value in (line.partition("=") for line in lines) if equals}


def controller_hosts() -> list[str]:
    """Return the addresses or names of slurmctld's hosts, the primary one first; none if Slurm does not answer."""
    values = [value for key, value in settings().items() if key.startswith("SlurmctldHost[")]
    return [re.sub(r".*\((.+)\)", r"\1", value) for value in values]  # head(10.0.0.1), or head alone


def accounts_are_checked() -> bool:
    """Return whether Slurm refuses an account that it does not know; True if it does not say.

    Each of these values of AccountingStorageEnforce includes associations (https://slurm.schedmd.com/slurm.conf.html).
    """
    enforced = settings().get("AccountingStorageEnforce")
    return enforced is None or bool({"all", "associations", "limits", "qos", "safe", "wckeys"} & {*enforced.split(",")})


@dataclass(frozen=True)
class Association:
    """A user's right to use an account.

    partition:   empty where it holds for all partitions
    default_qos: that of a job without --qos; empty where there is none
    parents:     the accounts above it; a partition that accepts one of them accepts it, too
    """

    account: str
    partition: str
    qos: frozenset[str]
    default_qos: str = ""
    parents: frozenset[str] = frozenset()


def associations(user: str, cluster: str) -> list[Association]:
    """Return the associations of a user; [] where there is no accounting or users may not ask.

    cluster: its ClusterName; the database may hold associations of other clusters, too. Empty: all clusters
    """
    rows = accounting_rows(
        "assoc", *association_filter(user, cluster), fields=("Account", "Partition", "QOS", "DefaultQOS")
    )
    accounts = accounting_rows("assoc", *association_filter("", cluster), fields=("Account", "ParentName"))
    parent = {row["Account"]: row["ParentName"] for row in accounts}
    return [
        Association(
            row["Account"],
            row["Partition"],
            frozenset(filter(None, row["QOS"].split(","))),
            row["DefaultQOS"],
            _parents(row["Account"], parent),
        )
        for row in rows
    ]


def _parents(account: str, parent: Mapping[str, str]) -> frozenset[str]:
    """Return the accounts above one; parent: account -> the account above it."""
    found: set[str] = set()
    while (account := parent.get(account, "")) and account not in found:
        found.add(account)
    return frozenset(found)


def association_filter(user: str, cluster: str) -> list[str]:
    """Return the conditions of sacctmgr for the associations of a user on a cluster; user "": those of accounts themselves."""
    return [f"user={user}", *([f"cluster={cluster}"] if cluster else [])]


def accounting_rows(kind: str, *conditions: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of `sacctmgr show kind` with these fields; [] without accounting, or where users may not ask."""
    try:
        shown = _run("sacctmgr", "-nP", "show", kind, *conditions, f"format={','.join(fields)}")
    except (SlurmCommandError, UserError):
        return []
    rows = (line.split("|") for line in shown.splitlines())
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def expand_node_list(node_list: str) -> list[str]:
    """Return the single names of Slurm's compressed node list: n[1-2] -> n1, n2."""
    return _scontrol("show", "hostnames", node_list).split()


def requeue(job_id: str, excluded: Sequence[str] = ()) -> str:
    """Requeue a job and exclude nodes from its next allocation. Return "", or why Slurm refused."""
    try:
        _scontrol("requeue", job_id)
    except SlurmCommandError as error:
        return str(error)
    if excluded:
        _exclude_nodes(job_id, excluded)
    return ""


def _exclude_nodes(job_id: str, excluded: Sequence[str]) -> None:
    """Exclude nodes from a queued job. Slurm's SIGTERM to the requeued job may end scontrol, which is then called again."""
    deadline = time.monotonic() + _EXCLUDE_TIMEOUT_S
    while True:
        try:
            _scontrol("update", f"JobId={job_id}", f"ExcNodeList={','.join(excluded)}")
            return
        except SlurmCommandError as error:
            if time.monotonic() > deadline:
                print(f"warning: {', '.join(excluded)} could not be excluded: {error}", flush=True)
                return
            time.sleep(0.1)


def down_nodes(nodes: list[str]) -> list[str]:
    """Return those nodes that Slurm lists as down, failing or not responding; [] if Slurm does not answer."""
    try:
        shown = _run("sinfo", "--noheader", "-N", "-n", ",".join(nodes), "-o", "%N %T")
    except SlurmCommandError:
        return []
    states = dict(line.split(maxsplit=1) for line in shown.splitlines() if " " in line)
    return [node for node in nodes if re.match(r"down|fail|drain\w*\*|.*\*$", states.get(node, ""))]


def unresponsive_nodes(nodes: list[str], timeout_s: float) -> list[str]:
    """Return those nodes of this job's allocation on which srun cannot run a process within `timeout_s` seconds."""

    def responds(node: str) -> bool:
        where = [f"--nodelist={node}", "--nodes=1", "--ntasks=1"]
        try:
            _run("srun", "--overlap", *where, "--mpi=none", "true", timeout_s=timeout_s)
            return True
        except SlurmCommandError:
            return False

    with ThreadPoolExecutor(min(32, len(nodes))) as pool:
        return [node for node, responded in zip(nodes, pool.map(responds, nodes), strict=True) if not responded]


def _scontrol(*arguments: str) -> str:
    return _run("scontrol", *arguments)


def _run(*command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    return _completed(*command, timeout_s=timeout_s).stdout


def _completed(*command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # Slurm keeps names and comments of jobs in any encoding
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on the PATH of this node", "submit through Slurm, or load its module"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmCommandError(f"{command[0]} did not answer within {timeout_s:g} s") from None
    if done.returncode:
        raise SlurmCommandError((done.stderr or done.stdout).strip() or f"{command[0]} exited with {done.returncode}")
    return done


def _epoch_s(time: str) -> float | None:
    """Convert Slurm's local time to seconds since the epoch; None for "None", "Unknown" and the like."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return None
