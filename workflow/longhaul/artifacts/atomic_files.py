"""Writes files atomically (temporary file, fsync, rename), hashes them (SHA-256, BLAKE3), reads JSON, and turns a full disk into
DiskFull.

Every arrow between two rules is one small JSON file. It refers to big data by path, size and hash. A file that is an input
of a training rule must not contain a time, a host or a duration: its bytes decide whether the weights are trained again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from longhaul.errors import DISK_FULL_ERRNOS, DiskFull, UserError

_MOST_DIGITS = 308
"""A double holds each integer with this many digits. It holds some with 309, too; no file of a run has such a number."""
_MANY_DIGITS = re.compile(rb"(?<![0-9])[0-9]{%d}" % (_MOST_DIGITS + 1))
_TEXT_OR_LONG_INTEGER = re.compile(rb'"(?:[^"\\]|\\.)*"|(?<![0-9.])([0-9]{%d,})' % (_MOST_DIGITS + 1), re.DOTALL)
"""Strings and long integers of a JSON text; group 1 is the integer. Digits in a string are no number."""


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text, with any order of keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_hash(value: object, length: int = 16) -> str:
    """Return the first `length` hex digits of the SHA-256 of `value`'s canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex digits; the file is read in blocks.

    Raises:
        UserError: it is a pipe or a device, which may never end.
    """
    return _file_hash(path, hashlib.sha256)


def file_blake3(path: Path) -> str:
    """Return the BLAKE3 hash of a file's bytes as hex digits, as b3sum does; the file is read in blocks.

    Files of checkpoints have it, because SHA-256 can be slower than a fast disk.

    Raises:
        UserError: it is a pipe or a device, which may never end.
    """
    return _file_hash(path, blake3)


def _file_hash(path: Path, algorithm: Callable[[], Any]) -> str:
    require_regular(path)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`.

    When the block succeeds, the temporary file is fsynced and renamed to `path`. When it fails, the file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    # Beside `path` by the same way: a working folder of another mount and its absolute path are two devices for a rename.
    temporary = path.with_name(Path(name).name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def writable_file(path: Path) -> Path:
    """Return the path that a user named for a file to write. A file there is replaced, as a device would be.

    Raises:
        UserError: there is a folder, a pipe or a device, or no file can be made.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is a folder, a pipe or a device, not a file", "name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "name a file in a folder of your own") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_link(link: Path, target: str) -> None:
    """Make a symbolic link to `target`, or let an existing link name it; the link exists at every moment.

    target: relative to the link's folder, so that the results can be moved

    Raises:
        UserError: something that is no link has the name.
    """
    if link.exists() and not link.is_symlink():
        raise UserError(f"{link} is not a link", f"move it away: longhaul makes a link to {target} there")
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


DELETE_HINT = "delete it; the next run writes it again"


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file of the run.

    Raises:
        UserError: the file is missing or cannot be read, or it is a pipe or a device, which may never end.
    """
    try:
        require_regular(path)
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist", "name another file, or run what writes it: longhaul run CONFIG"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file", "give the path of a file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "make it a file that you can read") from None


def require_regular(path: Path) -> None:
    """Raise UserError for a pipe or a device, and OSError if there is no file."""
    if stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"{path} is a pipe or a device, not a file", "give the path of a file")


def refuse_long_integers(text: bytes) -> None:
    """Raise ValueError for an integer in a JSON text that may be beyond a double: Python cannot compute with it as a float."""
    if not _MANY_DIGITS.search(text):
        return
    if found := next(filter(None, (match[1] for match in _TEXT_OR_LONG_INTEGER.finditer(text))), b""):
        raise ValueError(f"the integer {found[:20].decode()}… has {len(found)} digits; {_MOST_DIGITS} are the most")


def read_json(path: Path, hint: str = DELETE_HINT) -> Any:
    """Read a JSON file whose content has no fixed types. For all others: artifacts.typed_json.

    hint: the remedy for a file that is not valid JSON

    Raises:
        UserError: the file is missing, cannot be read or is not valid JSON.
    """
    try:
        text = read_bytes(path)
        refuse_long_integers(text)
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}", hint) from None


@contextmanager
def disk_full_as_user_error(what: str, folder: Path, needed_bytes: int = 0, choices: str = "") -> Iterator[None]:
    """Raise DiskFull when a write in the block does not fit.

    what:    what the block writes, such as "an export"
    folder:  where it writes. Both are for errors without a file name, as failed writes raise them
    choices: remedies other than freeing space
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        full = Path(error.filename).parent if error.filename else folder
        raise DiskFull(
            error.filename or what, full, needed_bytes, free_bytes(full), choices or DiskFull.choices
        ) from error


def free_bytes(path: Path) -> int:
    """Return the free space in bytes of the file system that holds `path`, or would hold it."""
    existing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(existing).free
