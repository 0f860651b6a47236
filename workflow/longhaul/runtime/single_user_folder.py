"""Creates folders on a node's disk that only this user may write to."""

from __future__ import annotations

import os
from pathlib import Path

from longhaul.errors import UserError


def create_private_folder(folder: Path, content: str) -> None:
    """Create a folder that only this user may write to, if it does not exist. content: what will be read back from it.

    Raises:
        UserError: the folder cannot be created, or another user owns it or may write to it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise UserError(
            f"the folder {folder} for {content} cannot be created: {error.strerror}",
            "set storage.scratch to a folder that you may write to",
        ) from None
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink():
        raise UserError(
            f"{folder} is not a folder that only this user may write to; {content} would be read from it",
            "remove it, or set storage.scratch to a folder of your own",
        )
