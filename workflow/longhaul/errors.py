"""The exceptions that speak to users."""

from __future__ import annotations

import errno
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What OSError.errno is when there is no room, or the quota is used up."""


class UserError(Exception):
    """A mistake the user can mend: the CLI prints it without a traceback and exits with code 2.

    `message` says what is wrong, where, the value and the limit; `hint` says what to do about it.
    """

    exit_code = 2
    failure_class = "permanent"
    """Of a job that ends with it (longhaul.artifacts.job_state): run again unchanged, it would fail again."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.hint}" if self.hint else self.message


class AllocationTooShort(UserError):
    """Nothing could be saved in what is left of an allocation. The next one may be long enough."""

    failure_class = "walltime"


class DiskFull(UserError):
    """A file system has no room, or a quota is used up: `folder` needed `needed_bytes`, where `free_bytes` were free.

    needed_bytes is 0 where it is not known; choices: what else than freeing space there would help.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        folder: Path,
        needed_bytes: int,
        free_bytes: int,
        choices: str = "lower checkpoints.keep_last or keep_best",
    ) -> None:
        needs = f" needs {needed_bytes} bytes ({needed_bytes / 2**30:.2f} GiB) and" if needed_bytes else ""
        super().__init__(
            f"{what}{needs} has no room in {folder}: {free_bytes} bytes ({free_bytes / 2**30:.2f} GiB) are free",
            f"free space or raise the quota there, or {choices}; then run the same command again",
        )
        self.folder, self.needed_bytes, self.free_bytes = folder, needed_bytes, free_bytes


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type where it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
