"""Classifies an exception (out of memory, disk full, permission, transient), and writes failures/rank-*.json with its remedy."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path
from typing import Any

from longhaul.artifacts.atomic_files import free_bytes
from longhaul.artifacts.job_state import ENVIRONMENT, PERMANENT, TRANSIENT, Failure
from longhaul.artifacts.paths import JobFolder
from longhaul.errors import DISK_FULL_ERRNOS, BadNodesError, DiskFull, UserError, first_line
from longhaul.runtime.process_rank import Rank

_AGAIN = "then run the same command again"
_LESS_MEMORY = "lower micro_batch_size, raise zero.stage, set activation_checkpointing to full, or offload"
_OUT_OF_HOST_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "failed to map segment from shared",
)
_OUT_OF_THREADS = "can't start new thread"
_REPAIRS = {
    errno.EACCES: "let this user read and write there",
    errno.EPERM: "let this user read and write there",
    errno.EROFS: "mount the file system for writing",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the node's limit on open files (fs.file-max)",
}
"""Remedies for errors of the operating system that stay until a person repairs something."""
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

    Mistakes in config or data are permanent, and so is too little memory of a GPU. Disks, permissions, limits and the memory of
    the host are the environment. Other errors are transient.
    """
    more: dict[str, Any] = {}
    evidence = [] if isinstance(error, UserError) else _last_lines(error)
    if isinstance(error, DiskFull):
        needed_bytes = error.needed_bytes or error.free_bytes + _MARGIN_BYTES
        more = {"needed_in": str(error.folder), "needed_bytes": needed_bytes}
        found = error.failure_class, f"disk full: {error.message}", error.hint
    elif isinstance(error, UserError):
        found = error.failure_class, error.message, error.hint
        more = {"bad_nodes": error.nodes} if isinstance(error, BadNodesError) else {}
    elif isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        more = _space_needed_by(error)
        found = ENVIRONMENT, f"disk full: {error}", f"free space or raise the quota; {_AGAIN}"
    elif type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        found = PERMANENT, "out of memory", _LESS_MEMORY
    elif _is_out_of_host_memory(error):
        limit = f"raise the limit on memory (ulimit -v, node.memory_mb), or {_LESS_MEMORY}"
        found = ENVIRONMENT, "out of memory", f"{limit}; {_AGAIN}"
    elif _OUT_OF_THREADS in str(error):
        limits = "raise the limits on processes and on memory (ulimit -u, ulimit -v)"
        found = ENVIRONMENT, f"{type(error).__name__}: {first_line(error)}", f"{limits}; {_AGAIN}"
    elif isinstance(error, OSError) and error.errno in _REPAIRS:
        found = ENVIRONMENT, f"{type(error).__name__}: {first_line(error)}", f"{_REPAIRS[error.errno]}; {_AGAIN}"
    else:
        found = TRANSIENT, f"{type(error).__name__}: {first_line(error)}", ""
    return Failure(*found, evidence, rank.host, rank.rank, os.environ.get("SLURM_JOB_ID"), **more)


def _last_lines(error: BaseException) -> list[str]:
    return traceback.format_exception(error)[-1].strip().splitlines()[-3:]


def _is_out_of_host_memory(error: BaseException) -> bool:
    """Return whether an allocation of host memory failed. torch raises a RuntimeError then."""
    is_refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return is_refused or isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_HOST_MEMORY)


def _space_needed_by(error: OSError) -> dict[str, Any]:
    """Return the free space from which the failure no longer applies: a gigabyte more than now, as the error has no size."""
    folder = Path(error.filename).parent if error.filename else Path.cwd()
    return {"needed_in": str(folder), "needed_bytes": free_bytes(folder) + _MARGIN_BYTES}
