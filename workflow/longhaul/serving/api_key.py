"""Creates and reads the file with a server's API key, which its owner alone can read.

The file is YAML with one key, `api-key: "<key>"`, because SGLang takes its key only from such a file or from its command line.
Without the quotes, YAML reads a key of digits as a number. A key must not begin with -, which SGLang takes for an option.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from longhaul.errors import UserError

_KEY = r"[A-Za-z0-9_][A-Za-z0-9_-]{15,255}"
_LINE = re.compile(rf'api-key: (?P<quote>"?)(?P<key>{_KEY})(?P=quote)\n')
_FORM = "16 to 256 letters, digits, _ and -, of which the first is no -"


def create_key_file(path: Path, key: str = "") -> str:
    """Write a key, by default a random one of 256 bits, to a file that must not exist, and return the key.

    path: its name ends in .yaml
    """
    key = key or secrets.token_hex(32)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as stream:
        stream.write(f'api-key: "{key}"\n')
    return key


def keep_key(path: Path, wanted: str | None) -> None:
    """Make sure that a server's key file exists: with the wanted key, else with the key that it has, else with a new one.

    Raises:
        UserError: the wanted key has a wrong form.
    """
    if wanted is None:
        if not path.exists():
            create_key_file(path)
        return
    if not re.fullmatch(_KEY, wanted):
        raise UserError("the wanted API key has a wrong form", f"use {_FORM}")
    path.unlink(missing_ok=True)
    create_key_file(path, wanted)


def read_key_file(path: Path) -> str:
    """Return the key in a file.

    Raises:
        UserError: the file is missing, others may read it, or it holds something else.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except OSError as error:
        raise UserError(
            f"the API key in {path} cannot be read: {error.strerror}", f"delete {path}; a new key is created"
        ) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"others may read the API key in {path}: its mode is {mode & 0o777:o}", f"chmod 600 {path}")
    if found := _LINE.fullmatch(text):
        return found["key"]
    raise UserError(
        f"{path} does not hold one line `api-key: KEY` with a key of {_FORM}",
        f"delete {path}; a new key is created",
    )
