"""Reads and appends .jsonl files line by line, and skips damaged or half-written lines; line_record_fields.py lists their fields.

A process that is killed while it writes leaves half a line. Such files only describe a run, so no reader fails because of a
bad line: it is left out. A warning names it, unless it is the file's incomplete last line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Generic, TypeVar

from longhaul.artifacts.atomic_files import require_regular
from longhaul.artifacts.typed_json import parse_json
from longhaul.errors import UserError

T = TypeVar("T")

_MOST_WARNINGS = 10
_PART_BYTES = 64 * 1024
"""Part of a file, at its start or its end, of which the first or the last records are read."""


@dataclass(frozen=True)
class RecordLine(Generic[T]):
    """One line: its bytes without the line break, and its record, or what is wrong with it."""

    text: bytes
    record: T | None
    problem: str = ""


def read_lines(path: Path, kind: type[T]) -> Iterator[RecordLine[T]]:
    """Yield each line of a file with its record, checked as parse_json does; nothing if there is no file.

    Raises:
        UserError: the file cannot be read, or is a pipe or a device.
    """
    bad = 0
    try:
        require_regular(path)
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                parsed = _parsed(path, number, line, kind)
                bad += parsed.record is None
                if parsed.record is None and line.endswith(b"\n") and bad <= _MOST_WARNINGS:
                    print(f"warning: {parsed.problem}; the line is left out", file=sys.stderr, flush=True)
                yield parsed
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_read(path, error) from None


def _cannot_read(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read: {error.strerror}", "make it a file that you can read")


def _parsed(path: Path, number: int, line: bytes, kind: type[T]) -> RecordLine[T]:
    text = line.rstrip(b"\n")
    try:
        return RecordLine(text, parse_json(text, kind))
    except ValueError as error:
        return RecordLine(text, None, f"{path}, line {number}: {error}")


def read_records(path: Path, kind: type[T]) -> list[T]:
    """Return the records of all valid lines; [] if there is no file."""
    return [line.record for line in read_lines(path, kind) if line.record is not None]


def read_first_records(path: Path, kind: type[T], most: int) -> list[T]:
    """Return the first valid records of a file, of its first 64 KiB; [] if there is no file. No warning is printed.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return list(islice(_valid_records(_first_lines(stream), kind), most))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _cannot_read(path, error) from None


def _first_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of the first 64 KiB. The caller usually needs few of them."""
    left = _PART_BYTES
    while left > 0 and (line := stream.readline(left)):
        left -= len(line)
        yield line


def read_last_records(
    path: Path, kind: type[T], most: int, containing: bytes = b"", within_bytes: int = _PART_BYTES
) -> list[T]:
    """Return the last valid records of a file, in their order; [] if there is no file. No warning is printed.

    containing:   text of the lines to look at. Parsing takes far longer than this search, so it saves time.
    within_bytes: the end of the file that is searched, from its last 64 KiB on, until `most` records are found

    Raises:
        UserError: the file cannot be read.
    """
    found: list[T] = []
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            for part in _growing_parts(min(size, within_bytes)):
                stream.seek(size - part)
                lines = _lines_from_end(stream.read(part), containing)
                found = list(islice(_valid_records(lines, kind), most))
                if len(found) == most:
                    break
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _cannot_read(path, error) from None
    return found[::-1]


def _growing_parts(largest: int) -> Iterator[int]:
    """Yield 64 KiB, then four times as much, and so on up to `largest`."""
    part = _PART_BYTES
    while part < largest:
        yield part
        part *= 4
    yield largest


def _lines_from_end(data: bytes, containing: bytes) -> Iterator[bytes]:
    """Yield the lines that contain a text, the last one first. Searching is faster than splitting all lines."""
    end = len(data)
    while end >= 0 and (found := data.rfind(containing, 0, end)) >= 0:
        start = data.rfind(b"\n", 0, found) + 1
        stop = data.find(b"\n", found)
        yield data[start : stop if stop >= 0 else len(data)]
        end = start - 1


def _valid_records(lines: Iterable[bytes], kind: type[T]) -> Iterator[T]:
    """Yield the valid records of some lines of a file, of which the first and the last may be cut."""
    for line in lines:
        with suppress(ValueError):
            yield parse_json(line, kind)


def append_record(path: Path, record: Mapping[str, object]) -> None:
    """Append one line. Half a line that a killed process left gets its line break first, so that both stay apart."""
    with open_for_append(path) as stream:
        stream.write(json.dumps(record) + "\n")


def open_for_append(path: Path) -> IO[str]:
    """Open a file of records for appending, at the beginning of a line."""
    with path.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, 2)
            is_torn = stream.read(1) != b"\n"
            if is_torn:
                stream.write(b"\n")
    return path.open("a", encoding="utf-8")
