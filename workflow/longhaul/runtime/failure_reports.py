"""The report that a failing process writes about its own failure: failures/rank-*.json."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

from longhaul.artifacts.atomic_files import free_bytes
from longhaul.artifacts.job_state import PERMANENT, TRANSIENT, Failure
from longhaul.artifacts.paths import JobFolder
from longhaul.errors import DISK_FULL_ERRNOS, DiskFull, UserError, first_line
from longhaul.runtime.process_rank import Rank

_MARGIN_BYTES = 10**9
"""Additional free space from which a full disk is no longer full, where the needed size is not known."""


def write_failure_report(folder: Path, error: BaseException, rank: Rank) -> None:
    """Write failures/rank-<rank>.json into a job's folder. A full disk must not hide the first error behind a second one."""
    try:
        classify_error(error, rank).write(JobFolder(folder).rank_failure(rank.rank))
    except OSError:
        print(f"{rank.host}: rank {rank.rank} cannot write to {folder}", flush=True)


def classify_error(error: BaseException, rank: Rank) -> Failure:
    """Return the failure that an exception means.

    A user's mistake, too little memory and a full disk would happen again: they are permanent. Other errors are transient.
    """

    def failure(failure_class: str, cause: str, remedy: str, evidence: list[str], **space: Any) -> Failure:
        job_id = os.environ.get("SLURM_JOB_ID")
        return Failure(failure_class, cause, remedy, evidence, rank.host, rank.rank, job_id, **space)

    if isinstance(error, DiskFull):
        space = {
            "needed_in": str(error.folder),
            "needed_bytes": error.needed_bytes or error.free_bytes + _MARGIN_BYTES,
        }
        return failure(PERMANENT, f"disk full: {error.message}", error.hint, [], **space)
    if isinstance(error, UserError):
        return failure(error.failure_class, error.message, error.hint, [])
    tail = traceback.format_exception(error)[-1].strip().splitlines()[-3:]
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        remedy = "free space or raise the quota; the next run resumes from the last complete checkpoint"
        return failure(PERMANENT, f"disk full: {error}", remedy, tail, **_space_needed_by(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        remedy = "lower micro_batch_size, raise zero.stage, set activation_checkpointing to full, or offload"
        return failure(PERMANENT, "out of memory", remedy, tail)
    return failure(TRANSIENT, f"{type(error).__name__}: {first_line(error)}", "", tail)


def _space_needed_by(error: OSError) -> dict[str, Any]:
    """Return the free space from which the failure no longer applies: a gigabyte more than now, as the error has no size."""
    folder = Path(error.filename).parent if error.filename else Path.cwd()
    return {"needed_in": str(folder), "needed_bytes": free_bytes(folder) + _MARGIN_BYTES}
