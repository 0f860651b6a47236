"""How a job stands and how it ended, as small files in its own folder: results/<run>/stages/<stage>/ or …/jobs/<job>/.

Exit codes are lost on their way through srun and the executor, so these files are the truth:

state.json            where the job stands; the supervisor writes it
failure.json          why it failed, and what to do about it; the supervisor writes it, last
failures/rank-*.json  what a failing process says of itself
outcome.json          a training that left before its last step, on purpose
deadline.json         when the allocation ends; the supervisor writes it, rank 0 reads it
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from longhaul.artifacts.files import content_hash, free_bytes
from longhaul.artifacts.schemas import Artifact
from longhaul.artifacts.shared_file_system import appears, names
from longhaul.errors import UserError

PERMANENT, TRANSIENT, NODE, WALLTIME, CANCELLED = "permanent", "transient", "node", "walltime", "cancelled"
SIGNALLED = "asked to end by a signal"
"""Outcome.reason of a training that got SIGTERM while nothing was known of an end or a preemption."""


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class State(Artifact):
    """state: running | waiting (for its next allocation) | done | failed. leg: allocations so far, this one included."""

    state: str
    job_id: str | None
    host: str
    nodes: list[str]
    leg: int
    since: str
    reason: str = ""

    @property
    def holds_job(self) -> bool:
        """Whether a job of this id may still be at work."""
        return self.state in ("running", "waiting") and self.job_id is not None


@dataclass(frozen=True)
class Outcome(Artifact):
    """A training that saved and left: why, and after which step."""

    reason: str
    step: int


@dataclass(frozen=True)
class Deadline(Artifact):
    """end_s: end of the allocation, in seconds since the epoch; preempted: Slurm wants the nodes for another job."""

    end_s: float | None
    preempted: bool


@dataclass(frozen=True)
class Failure(Artifact):
    """Why a job failed.

    failure_class: permanent (it would fail again), cancelled (by a user), or transient | node | walltime.
    key:           of what was launched; a failure of another key says nothing about this one.
    invocation:    the main Snakemake it happened under: a cancelled job stays so for that one alone.
    needs_bytes:   of free space at needs_path; when they are there the failure is over.
    """

    failure_class: str
    cause: str
    remedy: str
    evidence: list[str] = field(default_factory=list)
    host: str = ""
    rank: int | None = None
    job_id: str | None = None
    time: str = field(default_factory=now)
    key: str = ""
    invocation: str = ""
    needs_bytes: int = 0
    needs_path: str = ""

    def is_current(self, key: str, invocation: str) -> bool:
        """Whether the job would only fail again: same files, and nothing that was asked for has come."""
        if self.failure_class == CANCELLED:
            return bool(invocation) and self.invocation == invocation
        if self.failure_class != PERMANENT or self.key != key:
            return False
        return not (self.needs_bytes and free_bytes(Path(self.needs_path)) >= self.needs_bytes)

    def told(self) -> str:
        """For a log: cause, evidence, remedy."""
        where = f" (rank {self.rank} on {self.host})" if self.rank is not None else ""
        lines = [f"error: {self.cause}{where}", *(f"  {line}" for line in self.evidence)]
        return "\n".join([*lines, f"  remedy: {self.remedy}"] if self.remedy else lines)


def read_state(folder: Path) -> State | None:
    """None when there is none, or none that this release understands."""
    return _read(State, folder / "state.json")


def read_failure(folder: Path) -> Failure | None:
    return _read(Failure, folder / "failure.json")


def read_outcome(folder: Path) -> Outcome | None:
    return _read(Outcome, folder / "outcome.json")


def read_deadline(folder: Path) -> Deadline | None:
    """Of the supervisor on this host: it is read every second."""
    return _read_here(Deadline, folder / "deadline.json")


def _read(kind, path: Path):
    """What may have been written by another host, where this one remembers that it was not there."""
    return _read_here(kind, path) if appears(path) else None


def _read_here(kind, path: Path):
    try:
        return kind.read(path)
    except (UserError, OSError):
        return None


def launch_key(texts: Iterable[str | Path], data: Iterable[str | Path] = ()) -> str:
    """Of what a job is started with: texts as they are, data by size and time of change; what is not there counts as empty."""
    return content_hash([[_text(Path(path)) for path in texts], [_stamp(Path(path)) for path in data]])


def invocation(results: Path, run: str) -> str:
    """The main Snakemake that works on the run, by its lease; empty when there is none."""
    return _text(results / f"{run}.lease.json")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def rank_failures(folder: Path) -> list[Failure]:
    """What the processes of the last attempt said, permanent reasons first, then by rank."""
    said = folder / "failures"
    found = [_read(Failure, said / name) for name in sorted(names(said)) if name.endswith(".json")]
    return sorted((f for f in found if f), key=lambda f: (f.failure_class != PERMANENT, f.failure_class != NODE))


def clear_attempt(folder: Path) -> None:
    """Forgets what the processes of an earlier attempt said."""
    shutil.rmtree(folder / "failures", ignore_errors=True)
    (folder / "outcome.json").unlink(missing_ok=True)


def this_host() -> str:
    return socket.gethostname()
