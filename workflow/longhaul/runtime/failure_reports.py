"""What a failing process records about its own failure: failures/rank-*.json."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

from longhaul.artifacts.files import free_bytes
from longhaul.artifacts.job_state import PERMANENT, TRANSIENT, Failure
from longhaul.errors import DISK_FULL, DiskFull, UserError, first_line
from longhaul.runtime.rank import Rank


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
        remedy = "lower micro_batch_size, raise zero.stage, set activation_checkpointing to full, or offload"
        return failure(PERMANENT, "out of memory", remedy, tail)
    return failure(TRANSIENT, f"{type(error).__name__}: {first_line(error)}", "", tail)


def _wanted_space(error: OSError) -> dict[str, Any]:
    """Nothing tells how much more was to come: the failure is over once there is a gigabyte more than now."""
    path = Path(error.filename).parent if error.filename else Path.cwd()
    return {"needs_path": str(path), "needs_bytes": free_bytes(path) + 10**9}
