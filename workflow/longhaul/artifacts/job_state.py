"""Types of state.json, failure.json, outcome.json, deadline.json; failure classes, and which failures prevent a retry.

Exit codes get lost between srun and Snakemake's executor. These files replace them:

| file                  | content                                                    | writer                       |
| state.json            | the job's state                                            | supervisor                   |
| failure.json          | why the job failed, and the remedy                         | supervisor, as its last file |
| failures/rank-*.json  | why one process failed                                     | that process                 |
| outcome.json          | why a training stopped on purpose before its last step     | rank 0                       |
| deadline.json         | the end of the allocation                                  | supervisor; rank 0 reads it  |
| jobs_to_run.json      | jobs that the run had to run when it started               | main process                 |
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from longhaul.artifacts.artifact_schemas import Artifact
from longhaul.artifacts.atomic_files import content_hash, free_bytes
from longhaul.artifacts.paths import JobFolder, RunPaths
from longhaul.artifacts.shared_file_system import exists_on_server, list_names
from longhaul.artifacts.typed_json import HostName, SlurmJobId
from longhaul.errors import UserError, printable

PERMANENT, ENVIRONMENT, CANCELLED, REFUSED = "permanent", "environment", "cancelled", "refused"
TRANSIENT, NODE, WALLTIME = "transient", "node", "walltime"
FINAL = (PERMANENT, ENVIRONMENT)
"""Classes of failures after which this main Snakemake process does not start the job again."""
SIGNALLED = "stopped by a signal"
"""Outcome.reason of a training that got SIGTERM while no end of the allocation and no preemption were known."""

StateName = Literal["running", "waiting", "done", "failed"]
A = TypeVar("A", bound=Artifact)


def utc_now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class State(Artifact):
    """State of a job.

    state:      running | waiting (for its next allocation) | done | failed
    job_id:     Slurm's job id; None without Slurm
    allocation: number of the job's allocation, counted from 1
    since:      time of the last change, in UTC
    """

    state: StateName
    job_id: SlurmJobId | None
    host: str
    nodes: list[HostName]
    allocation: int
    since: str
    reason: str = ""

    @property
    def may_be_active(self) -> bool:
        """Return whether a Slurm job with this id may still run, or wait in the queue."""
        return self.state in ("running", "waiting") and self.job_id is not None


@dataclass(frozen=True)
class Outcome(Artifact):
    """Reason for which a training saved and stopped early, and the last step that it did."""

    reason: str
    step: int


@dataclass(frozen=True)
class Deadline(Artifact):
    """The end of an allocation.

    end_s:     seconds since the epoch, by the clock of rank 0's host; None if there is no limit
    preempted: Slurm needs the nodes for another job
    """

    end_s: float | None
    preempted: bool


@dataclass(frozen=True)
class Failure(Artifact):
    """Cause of a job's failure.

    failure_class: permanent (it follows from config and data), environment (it would fail again until a person has repaired
                   something), cancelled (by a user), refused (by sbatch), transient, node or walltime
    evidence:      last lines of the traceback
    key:           launch_key of the job; the failure does not apply to a job with another key
    invocation:    identity of the main Snakemake process under which it happened; a job that was cancelled, refused, or failed
                   because of its environment, is not retried by that one
    needed_bytes:  free space in `needed_in` with which the failure no longer applies; 0 if space is not the cause
    bad_nodes:     node of the allocation that is not fit for the job -> its own problem
    next_attempt:  `attempt 2 of 3` where that main Snakemake process starts the job again; "" where it does not
    """

    schema_version: ClassVar[int] = 2

    failure_class: str
    cause: str
    remedy: str
    evidence: list[str] = field(default_factory=list)
    host: str = ""
    rank: int | None = None
    job_id: str | None = None
    time: str = field(default_factory=utc_now)
    key: str = ""
    invocation: str = ""
    needed_bytes: int = 0
    needed_in: str = ""
    bad_nodes: dict[HostName, str] = field(default_factory=dict)
    next_attempt: str = ""

    def still_applies(self, key: str, invocation: str) -> bool:
        """Return whether a retry would only fail again.

        key:        the job's launch_key now
        invocation: the main Snakemake process now. A new one tries again what depended on the environment: a person may have
                    repaired it.
        """
        if self.failure_class in FINAL and self.key != key:
            return False
        if self.failure_class == PERMANENT:
            return True
        only_now = self.failure_class in (ENVIRONMENT, CANCELLED, REFUSED)
        if not only_now or not invocation or self.invocation != invocation:
            return False
        return not (self.needed_bytes and free_bytes(Path(self.needed_in)) >= self.needed_bytes)

    def as_text(self) -> str:
        """Return cause, evidence and remedy, one per line, for a log."""
        where = f" (rank {self.rank} on {self.host})" if self.rank is not None else ""
        lines = [f"error: {self.cause}{where}", *(f"  {line}" for line in self.evidence)]
        remedy = f"\n  remedy: {printable(self.remedy)}" if self.remedy else ""
        return printable("\n".join(lines)) + remedy


@dataclass(frozen=True)
class JobsToRun(Artifact):
    """The jobs that the newest main process had to run when it started; some were done in an earlier run.

    It is written once the main process has refused what would only fail again.

    invocation: identity of that process; "" once it starts no job any more
    left:       job -> `since` of the state that an earlier run left; "" if there was none
    """

    invocation: str = ""
    left: dict[str, str] = field(default_factory=dict)

    def is_left(self, job: str, state: State) -> bool:
        """Return whether an earlier run left this state, and the job runs again. Times of two hosts are not compared."""
        return self.left.get(job) == state.since

    def starts_again(self, job: str, invocation: str) -> bool:
        """Return whether this main process runs a job that failed under an earlier one; "" is none."""
        return bool(invocation) and self.invocation == invocation and job in self.left


def read_jobs_to_run(paths: RunPaths) -> JobsToRun:
    """Read jobs_to_run.json; no jobs if it is missing, damaged or of another release."""
    return _read_from_server(JobsToRun, paths.jobs_to_run) or JobsToRun()


def read_state(folder: Path) -> State | None:
    """Read state.json; None if it is missing, damaged or of another release."""
    return _read_from_server(State, JobFolder(folder).state)


def read_failure(folder: Path) -> Failure | None:
    """Read failure.json; None if it is missing, damaged or of another release."""
    return _read_from_server(Failure, JobFolder(folder).failure)


def unreadable_records(folder: Path) -> Iterator[str]:
    """Yield what is wrong with state.json and failure.json of a job, where they exist and cannot be read."""
    records: tuple[tuple[type[Artifact], Path], ...] = (
        (State, JobFolder(folder).state),
        (Failure, JobFolder(folder).failure),
    )
    for kind, path in records:
        try:
            if path.exists():
                kind.read(path)
        except UserError as error:
            yield error.message
        except OSError as error:
            yield f"{path} cannot be read: {error.strerror}"


def read_outcome(folder: Path) -> Outcome | None:
    """Read outcome.json; None if it is missing, damaged or of another release."""
    return _read_from_server(Outcome, JobFolder(folder).outcome)


def read_deadline(folder: Path) -> Deadline | None:
    """Read deadline.json; None if it is missing.

    The supervisor on this host writes it, and rank 0 reads it every second. So this function does not list the folder.
    """
    return _read_valid(Deadline, JobFolder(folder).deadline)


def _read_from_server(kind: type[A], path: Path) -> A | None:
    """Read a file that another host may have written, although this host's cache says that it is absent."""
    return _read_valid(kind, path) if exists_on_server(path) else None


def _read_valid(kind: type[A], path: Path) -> A | None:
    try:
        return kind.read(path)
    except (UserError, OSError):
        return None


def launch_key(texts: Iterable[str | Path], data: Iterable[str | Path] = ()) -> str:
    """Return a hash of a job's inputs: small texts by content, data files by size and mtime. A missing file counts as empty."""
    return content_hash([[_text(Path(path)) for path in texts], [_size_and_mtime(Path(path)) for path in data]])


def current_invocation(paths: RunPaths) -> str:
    """Return the identity of the main Snakemake process that holds the run's lease; "" if there is none."""
    return _text(paths.lease)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _size_and_mtime(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def rank_failures(folder: Path) -> list[Failure]:
    """Return the failures that processes of the last attempt reported: final ones first, then node, then by rank."""
    reports = JobFolder(folder).rank_failures
    names = [name for name in sorted(list_names(reports)) if name.endswith(".json")]
    found = [_read_valid(Failure, reports / name) for name in names]  # listed above: one listing for each would be slow
    return sorted((f for f in found if f), key=lambda f: (f.failure_class not in FINAL, f.failure_class != NODE))


def clear_attempt(folder: Path) -> None:
    """Remove the failure reports and the outcome of an earlier attempt."""
    shutil.rmtree(JobFolder(folder).rank_failures, ignore_errors=True)
    JobFolder(folder).outcome.unlink(missing_ok=True)


def this_host() -> str:
    return socket.gethostname()
