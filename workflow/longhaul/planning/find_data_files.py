"""Finds the files that a dataset's path, folder or glob names: hidden files, links, order, one format per folder.

A folder holds data of one format. Links to folders are followed, in folders and in globs with `**`. Hidden files, hidden
folders and files such as README.md and _SUCCESS are left out of folders; a file that is named itself is always read.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longhaul.config.data_formats import KNOWN_SUFFIXES, describes_a_folder, known_format
from longhaul.errors import UserError

_MAX_ENTRIES = 200_000
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class FoundFiles:
    """Files in a stable order. left_out: files of a folder that are no data."""

    files: list[Path]
    left_out: list[Path]


def find_files(key: str, pattern: Path, file_format: str) -> FoundFiles:
    """Return the files that an absolute path or glob names; none where it matches nothing.

    key:         config key, for messages
    file_format: the dataset's `format`

    Raises:
        UserError: the pattern is invalid or names too much, a link is broken or leads in a circle, or formats are mixed.
    """
    try:
        if pattern.is_dir():
            return _files_of_folder(key, pattern, file_format)
        if pattern.exists():
            _check_file(key, pattern, "name a file, or a folder of files")
            return FoundFiles([pattern], [])
        return FoundFiles(sorted(_matches(key, pattern)), [])
    except OSError as error:
        raise UserError(
            f"{key}: cannot read {error.filename}: {error.strerror}", "make it readable, or name other files"
        ) from None


def check_format(key: str, path: Path, file_format: str) -> None:
    """Raise UserError if no reader is known for a file."""
    if file_format == "auto" and known_format(path) is None:
        raise UserError(f"{key}: {path}: unknown file suffix", f"set `format`, or use one of {KNOWN_SUFFIXES}")


def _files_of_folder(key: str, folder: Path, file_format: str) -> FoundFiles:
    found = sorted(_walk(key, folder))
    left_out = [path for path in found if describes_a_folder(path)]
    files = [path for path in found if not describes_a_folder(path)]
    if file_format == "auto":
        _check_one_format(key, folder, files)
    return FoundFiles(files, left_out)


def _check_one_format(key: str, folder: Path, files: list[Path]) -> None:
    formats = Counter(known_format(path) or "unknown format" for path in files)
    if len(formats) > 1:
        counts = ", ".join(f"{count} of {name}" for name, count in sorted(formats.items()))
        example = next(path for path in files if known_format(path) != known_format(files[0]))
        raise UserError(
            f"{key}: {folder} holds files of several formats: {counts}; for example {files[0].name} and {example.name}",
            "name the files with a glob such as folder/**/*.jsonl, or set `format` to read all of them in one way",
        )


def _walk(key: str, folder: Path) -> Iterator[Path]:
    """Yield all files below a folder. Links to folders are followed; hidden names are left out."""
    if folder in (Path(folder.anchor), Path.home()):
        raise UserError(f"{key}: {folder} is no folder of data alone", "name a folder that holds only data")
    pending: list[tuple[Path, tuple[tuple[int, int], ...]]] = [(folder, (_identity(folder),))]
    entries = 0
    while pending:
        current, above = pending.pop()
        for entry in os.scandir(current):
            entries += 1
            if entries > _MAX_ENTRIES:
                raise UserError(f"{key}: {folder} has more than {_MAX_ENTRIES} entries", "name a smaller folder")
            path = current / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                _require_complete(key, path)
                pending.append((path, (*above, _new_identity(key, path, above))))
            else:
                _check_file(key, path)
                yield path


def _require_complete(key: str, folder: Path) -> None:
    """Raise UserError if a folder holds what tasks of Spark or Hadoop have written; their job moves or removes it at its end."""
    if folder.name == "_temporary":
        raise UserError(
            f"{key}: {folder} is left of a job of Spark or Hadoop that has not ended, or that failed",
            "wait for its end, or remove the folder; if the job failed, run it again",
        )


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _new_identity(key: str, folder: Path, above: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Return the identity of a folder; raise UserError if it is one of the folders above it."""
    identity = _identity(folder)
    if identity in above:
        raise UserError(f"{key}: {folder} is a link to a folder above it", "remove the link, or name other folders")
    return identity


def _check_file(key: str, path: Path, remedy: str = "remove it from the folder") -> None:
    if not path.exists():
        raise UserError(f"{key}: {path} is a broken link", "remove the link, or restore its target")
    if not path.is_file():
        raise UserError(f"{key}: {path} is a pipe or a device, not a file", remedy)


def _matches(key: str, pattern: Path) -> Iterator[Path]:
    """Yield the files that match a glob. `**` stands for any number of folders."""
    parts = pattern.parts
    if wrong := next((part for part in parts if "**" in part and part != "**"), None):
        raise UserError(
            f"{key}: {wrong!r} contains **, which must be a folder's whole name", "write ** between slashes"
        )
    first = next((index for index, part in enumerate(parts) if _MAGIC.search(part)), len(parts))
    base = Path(*parts[:first])
    if first == len(parts) or not base.is_dir():
        return
    if "**" in parts:
        globbed = parts[first:]
        tail = tuple(
            part for part, before in zip(globbed, ("", *globbed), strict=False) if part != "**" or before != "**"
        )
        yield from (path for path in _walk(key, base) if _is_match(path.relative_to(base).parts, tail))
        return
    for path in base.glob(str(Path(*parts[first:]))):
        if not path.is_dir():
            _check_file(key, path)
            yield path


def _is_match(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Return whether the names of a relative path match the parts of a glob; `**` is any number of folders."""
    if not parts or not names:
        return not parts and not names
    if parts[0] != "**":
        return fnmatch.fnmatchcase(names[0], parts[0]) and _is_match(names[1:], parts[1:])
    rest = parts[1:]
    return not rest or any(_is_match(names[skipped:], rest) for skipped in range(len(names)))
