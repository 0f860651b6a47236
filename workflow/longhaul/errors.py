"""Defines UserError (message, hint, exit code 2), InputError, DiskFull, BadNodesError, AllocationTooShort; how messages print."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
"""Values of OSError.errno for a full file system and for an exhausted quota."""


_MAX_CHARACTERS = 8000
# These change what a terminal shows: control characters, marks of text direction, and surrogates, which it cannot show.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text for a terminal: unprintable characters as escapes such as \\x1b, and at most 8,000 characters."""
    shown = escape_unprintable(text)
    return shown if len(shown) <= _MAX_CHARACTERS else f"{shown[:_MAX_CHARACTERS]}…"


def escape_unprintable(text: str) -> str:
    """Return a text of any length whose unprintable characters are written as escapes."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """An error that the user can fix. The CLI prints it without a traceback and exits with `exit_code`.

    `message` states what is wrong, where, the value and the limit. `hint` states the remedy. Both are printable.
    """

    exit_code = 2
    failure_class = "environment"
    """Class of a job's failure that this error causes (longhaul.artifacts.job_state)."""

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = printable(message)
        self.hint = printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.hint}" if self.hint else self.message


class InputError(UserError):
    """An error that follows from the config or the data: a job would fail with it again until they change."""

    failure_class = "permanent"


class BadNodesError(UserError):
    """Nodes of the allocation are not fit for the job. On other nodes it may succeed.

    nodes: Slurm's name of each of these nodes -> its own problem; later jobs exclude them
    """

    failure_class = "node"

    def __init__(self, message: str, hint: str, nodes: Mapping[str, str]) -> None:
        super().__init__(message, hint)
        self.nodes = dict(nodes)


class AllocationTooShort(UserError):
    """The rest of an allocation is too short to save a checkpoint. The next allocation may be long enough."""

    failure_class = "walltime"


class DiskFull(UserError):
    """A file system is full or a quota is exhausted.

    what:         what was to be written; begins the message.
    folder:       where it was to be written.
    needed_bytes: its size; 0 where the size is not known.
    free_bytes:   free space in `folder`.
    choices:      remedies other than freeing space there.
    """

    exit_code = 1
    choices = "lower checkpoints.keep_last or keep_best"

    def __init__(
        self,
        what: str,
        folder: Path,
        needed_bytes: int,
        free_bytes: int,
        choices: str = choices,
    ) -> None:
        needed = f"{_size(needed_bytes)} of" if needed_bytes else "more"
        super().__init__(
            f"{what} needs {needed} free space in {folder}, where {_size(free_bytes)} are free",
            f"free space or raise the quota there, or {choices}; then run the same command again",
        )
        self.folder, self.needed_bytes, self.free_bytes = folder, needed_bytes, free_bytes


def _size(count: int) -> str:
    return f"{count} bytes ({count / 2**30:.2f} GiB)"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
