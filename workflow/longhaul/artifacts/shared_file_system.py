"""Waits for files that another host wrote on NFS or FUSE: the client's cache of names (60 s), and fresh listings of folders.

An NFS client caches for up to a minute that a name is absent, and what it was (nfs(5), acdirmax). It asks the server when a
folder is opened. So these functions list the folder first. Other clients (FUSE) cache longer: if the listing has a name that
cannot be opened yet, these functions wait for it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

CACHE_TIMEOUT_S = 60.0
"""Longest time for which a client caches a name: acdirmax of nfs(5)."""
_POLL_INTERVAL_S = 0.1


def exists_on_server(path: Path, wait_s: float = CACHE_TIMEOUT_S) -> bool:
    """Return whether a file or folder exists, despite this host's cache.

    If the listing of its folder has the name, the function waits up to `wait_s` seconds until the path can be opened.
    """
    if path.name not in list_names(path.parent):
        return False
    if path.is_symlink():  # its target may have been removed for good, by a purge of scratch for example
        target = Path(os.path.realpath(path))
        return not target.is_symlink() and exists_on_server(target, wait_s)
    deadline = time.monotonic() + wait_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_INTERVAL_S)
    return True


def refresh_listing(folder: Path) -> None:
    """Make the client ask the server for the listing of `folder`: its cache may hold an earlier folder of that name."""
    list_names(folder)


def list_names(folder: Path) -> set[str]:
    """Return the names in a folder as the server knows them; an empty set if the folder does not exist."""
    for _ in range(2):
        try:
            return {path.name for path in folder.iterdir()}
        except NotADirectoryError:
            break
        except FileNotFoundError:
            if folder == folder.parent or not exists_on_server(folder):
                break
    return set()
