"""Folders on a node's own disk that hold a rank's optimizer states while it trains, and what killed ranks left of theirs.

A rank holds a lock on its folder for as long as it lives; the kernel takes it away with the process. So whoever gets the
lock of a folder knows that nobody uses it. Such a folder is on one node's file system, where flock(2) can be relied on.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longhaul.runtime.compiled_ops import make_private


def swap_root(scratch: str) -> Path:
    """Where all swap folders of this user lie on this node; made where it is not there, for this user alone.

    Raises:
        UserError: it cannot be made, or belongs to somebody else.
    """
    root = Path(scratch).absolute() / f"longhaul-swap-{os.getuid()}"
    make_private(root, "optimizer states")
    return root


@contextmanager
def swap_folder(scratch: str, name: str) -> Iterator[Path]:
    """A new folder of this process below `scratch`, for the length of the block; `name` tells people whose it is."""
    root = swap_root(scratch)
    with _locked(root):
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
        held = _try_lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def clear_stale_swaps(scratch: str) -> list[str]:
    """Removes the folders of processes that were killed; returns their names."""
    root, cleared = swap_root(scratch), []
    with _locked(root):
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            held = _try_lock(folder)
            if held is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)
                cleared.append(folder.name)
    return cleared


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Between making a folder and locking it, nobody else may find it unlocked."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _try_lock(folder: Path) -> int | None:
    """The open folder whose lock this process now has; None where a living one has it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    os.close(handle)
    return None
