"""How a job stands and how it ended, as small files in its own folder: results/<run>/stages/<stage>/ or …/jobs/<job>/.

Exit codes are lost on their way through srun and the executor, so these files are the truth:

state.json            where the job stands; the supervisor writes it
failure.json          why it failed, and what to do about it; the supervisor writes it, last
failures/rank-*.json  what a failing process says of itself
outcome.json          a training that left before its last step, on purpose
deadline.json         when the allocation ends; the supervisor writes it, rank 0 reads it
"""

from __future__ import annotations

import os
import shutil
import socket
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longhaul.artifacts import Artifact, content_hash
from longhaul.errors import DISK_FULL, DiskFull, UserError
from longhaul.ranks import Rank
from longhaul.shared_files import appears, names

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
        return not (self.needs_bytes and _free_bytes(Path(self.needs_path)) >= self.needs_bytes)

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


# What a failing process says of itself


def report_failure(folder: Path, error: BaseException, rank: Rank) -> None:
    """Writes failures/rank-<rank>.json; a disk that is full must not hide the first error behind a second."""
    try:
        failure_of(error, rank).write(folder / "failures" / f"rank-{rank.rank:05d}.json")
    except OSError:
        print(f"{rank.host}: rank {rank.rank} cannot write to {folder}", flush=True)


def failure_of(error: BaseException, rank: Rank) -> Failure:
    """Classifies an exception: a mistake, no memory or no space would happen again; anything else may not."""

    def failure(failure_class: str, cause: str, remedy: str, evidence: list[str], **space: Any) -> Failure:
        job_id = os.environ.get("SLURM_JOB_ID")
        return Failure(failure_class, cause, remedy, evidence, rank.host, rank.rank, job_id, **space)

    if isinstance(error, DiskFull):
        space = {"needs_path": str(error.folder), "needs_bytes": error.needed_bytes or error.free_bytes + 10**9}
        return failure(PERMANENT, f"disk full: {error.message}", error.hint, [], **space)
    if isinstance(error, UserError):
        return failure(error.failure_class, error.message, error.hint, [])
    tail = traceback.format_exception(error)[-1].strip().splitlines()[-3:]
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        remedy = "free space or raise the quota; the next run goes on from the last complete checkpoint"
        return failure(PERMANENT, f"disk full: {error}", remedy, tail, **_wanted_space(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        remedy = "lower micro_batch, raise zero.stage, set activation_checkpointing to full, or offload"
        return failure(PERMANENT, "out of memory", remedy, tail)
    return failure(TRANSIENT, f"{type(error).__name__}: {_first_line(error)}", "", tail)


def _wanted_space(error: OSError) -> dict[str, Any]:
    """Nothing tells how much more was to come: the failure is over once there is a gigabyte more than now."""
    path = Path(error.filename).parent if error.filename else Path.cwd()
    return {"needs_path": str(path), "needs_bytes": _free_bytes(path) + 10**9}


def _free_bytes(path: Path) -> int:
    existing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def rank_failures(folder: Path) -> list[Failure]:
    """What the processes of the last attempt said, permanent reasons first, then by rank."""
    said = folder / "failures"
    found = [_read(Failure, said / name) for name in sorted(names(said)) if name.endswith(".json")]
    return sorted((f for f in found if f), key=lambda f: (f.failure_class != PERMANENT, f.failure_class != NODE))


def clear_attempt(folder: Path) -> None:
    """Forgets what the processes of an earlier attempt said."""
    shutil.rmtree(folder / "failures", ignore_errors=True)
    (folder / "outcome.json").unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


# The quarantine: nodes that later submissions leave out


@dataclass(frozen=True)
class Quarantine(Artifact):
    """results/quarantine.json: [{"node", "cause", "time", "evidence"}]; a person may edit it."""

    nodes: list[dict[str, str]] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry["node"] for entry in self.nodes))


def read_quarantine(path: Path) -> Quarantine:
    """Raises UserError when a person's edit broke it."""
    return Quarantine.read(path) if path.exists() else Quarantine()


def quarantine(path: Path, nodes: Iterable[str], cause: str, evidence: str) -> None:
    """Adds nodes to the list."""
    before = read_quarantine(path)
    added = [{"node": n, "cause": cause, "time": now(), "evidence": evidence} for n in nodes if n not in before.names]
    if added:
        Quarantine([*before.nodes, *added]).write(path)


def this_host() -> str:
    return socket.gethostname()
