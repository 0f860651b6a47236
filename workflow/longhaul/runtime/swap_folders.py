"""Makes a rank's folder for states offloaded to NVMe, and removes folders that killed ranks left.

A rank locks its folder with flock(2) while it lives; the kernel releases the lock with the process. So a process that gets
the lock of a folder knows that no other process uses it. The folders are on a node's own file system, where flock(2) works.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longhaul.runtime.single_user_folder import create_private_folder


def swap_root(scratch: str) -> Path:
    """Return the folder of all this user's swap folders on this node. Create it, for this user only, if it does not exist.

    Raises:
        UserError: it cannot be created, or another user owns it or may write to it.
    """
    root = Path(scratch).absolute() / f"longhaul-swap-{os.getuid()}"
    create_private_folder(root, "optimizer states")
    return root


@contextmanager
def swap_folder(scratch: str, name: str) -> Iterator[Path]:
    """Provide a new folder below `scratch` for this process during a `with` block. name: prefix that shows users its owner."""
    root = swap_root(scratch)
    with _root_lock(root):
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
        lock = _try_lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_stale_swap_folders(scratch: str) -> list[str]:
    """Remove the folders of processes that were killed. Return the names of these folders."""
    root, removed = swap_root(scratch), []
    with _root_lock(root):
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            lock = _try_lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
                removed.append(folder.name)
    return removed


@contextmanager
def _root_lock(root: Path) -> Iterator[None]:
    """Lock the root folder: between its creation and its lock, a swap folder must not look unused."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _try_lock(folder: Path) -> int | None:
    """Return the descriptor of the folder with its lock; None if a living process has the lock."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    os.close(handle)
    return None
