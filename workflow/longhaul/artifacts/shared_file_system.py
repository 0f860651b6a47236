"""Looking for what another host wrote, on a file system that answers from memory.

NFS remembers for up to a minute that a name is not there, or what it was (nfs(5), acdirmax); it asks the server when a folder
is opened. So a name is first looked for in a listing. Other clients (FUSE) remember beyond that: a name that is listed and
cannot be found yet is waited for.
"""

from __future__ import annotations

import time
from pathlib import Path

REMEMBERED_S = 60.0
_LOOK_EVERY_S = 0.1


def appears(path: Path, within_s: float = REMEMBERED_S) -> bool:
    """Whether a file or folder is there, whatever this host remembers; waits only for one that its folder lists."""
    if path.name not in names(path.parent):
        return False
    deadline = time.monotonic() + within_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def look_again(folder: Path) -> None:
    """Has the server asked what is in a folder: what this host remembers of it may be an earlier folder of that name."""
    names(folder)


def names(folder: Path) -> set[str]:
    """What is in a folder; nothing when it is not there."""
    for _ in range(2):
        try:
            return {path.name for path in folder.iterdir()}
        except NotADirectoryError:
            break
        except FileNotFoundError:
            if folder == folder.parent or not appears(folder):
                break
    return set()
