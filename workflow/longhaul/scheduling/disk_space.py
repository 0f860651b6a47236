"""Room for a run's own records. Where they have none, logs stay empty and nobody is told why, unless the terminal is."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
from pathlib import Path

from longhaul.errors import DISK_FULL, DiskFull

RECORDS_BYTES = 1 << 20
"""What must be free for jobs to start and to say how they ended: plans, job files, logs."""


def require_free_space(folder: Path) -> None:
    """Raises DiskFull when RECORDS_BYTES cannot be written to `folder`.

    It is tried, as the free space that a file system states says nothing of a quota.
    """
    probe = folder / f".room.{os.getpid()}"
    try:
        with probe.open("wb") as stream:
            stream.write(os.urandom(RECORDS_BYTES))  # no compression makes it smaller
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        free = shutil.disk_usage(folder).free
        raise DiskFull("the record of a run", folder.absolute(), RECORDS_BYTES, free) from None
    finally:
        probe.unlink(missing_ok=True)


def tell_at_exit(folder: Path) -> None:
    """Has the terminal told of a full disk when this process ends, however it ends."""
    atexit.register(_tell, folder.absolute())  # a library may have gone elsewhere by then


def call_off() -> None:
    """After a run that succeeded there is nothing to explain."""
    atexit.unregister(_tell)


def _tell(folder: Path) -> None:
    try:
        require_free_space(folder)
    except DiskFull as full:
        print(f"error: logs may be empty or cut short: {full}", file=sys.stderr, flush=True)
