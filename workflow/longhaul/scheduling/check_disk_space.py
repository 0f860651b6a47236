"""Checks before a run that results/ has space (writes 1 MiB), and tells the user at exit if the disk is full.

When the disk is full, log files stay empty. So these errors go to the terminal.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from longhaul.errors import DISK_FULL_ERRNOS, DiskFull, UserError

RECORDS_BYTES = 1 << 20
"""Free space in bytes that jobs need to start and to record how they ended: plans, job files, logs."""


def require_free_space(folder: Path) -> None:
    """Check by writing that `folder` has RECORDS_BYTES of free space.

    The free space that a file system reports does not include quotas.

    Raises:
        DiskFull: the disk is full.
        UserError: the bytes cannot be written for another reason.
    """
    probe = folder / f".disk-space-probe.{os.getpid()}"
    try:
        with probe.open("wb") as stream:
            stream.write(os.urandom(RECORDS_BYTES))  # random bytes, because a file system may compress
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise UserError(
                f"cannot write {RECORDS_BYTES} bytes to {folder.absolute()}: {error.strerror}",
                "let this user write there (permissions, mount, ulimit -f), then run the same command again",
            ) from None
        free = shutil.disk_usage(folder).free
        raise DiskFull("writing the run's records", folder.absolute(), RECORDS_BYTES, free) from None
    finally:
        with suppress(OSError):
            probe.unlink()


def print_full_disk_at_exit(folder: Path) -> None:
    """Register a check that prints to stderr, when this process exits, that the disk of `folder` is full."""
    atexit.register(_print_full_disk, folder.absolute())  # absolute, because a library may change the working folder


def cancel_print_at_exit() -> None:
    """Cancel that check. To be called after a run that succeeded."""
    atexit.unregister(_print_full_disk)


def _print_full_disk(folder: Path) -> None:
    try:
        require_free_space(folder)
    except UserError as error:
        print(f"error: log files may be empty or incomplete: {error}", file=sys.stderr, flush=True)
