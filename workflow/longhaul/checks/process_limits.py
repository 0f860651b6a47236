"""Reads the limits of this process (ulimit) that distributed training meets: open files, processes, locked memory."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessLimits:
    """Soft limits of this process; None: no limit."""

    open_files: int | None
    processes: int | None
    locked_bytes: int | None


def read_process_limits() -> ProcessLimits:
    return ProcessLimits(_limit(resource.RLIMIT_NOFILE), _limit(resource.RLIMIT_NPROC), lockable_bytes())


def lockable_bytes() -> int | None:
    """Return the memory in bytes that a process may lock; None without a limit. CAP_IPC_LOCK (bit 14) removes the limit."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return None if int(status["CapEff"], 16) >> 14 & 1 else _limit(resource.RLIMIT_MEMLOCK)


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft
