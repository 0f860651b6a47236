"""Files that are read as text, plain or compressed: JSON lines and lists, CSV, and whole documents."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from longhaul.data.readers.rows import (
    BUFFER_BYTES,
    BadData,
    Line,
    Part,
    Row,
    damaged,
    decode,
    missing,
    require_columns,
    short_enough,
    too_long,
)

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_MAX_LIST_BYTES = 160_000_000


def jsonl(part: Part, columns: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    """One JSON object a line."""
    for where, line, position in _lines(part, max_bytes):
        try:
            if line is None:
                raise too_long(where, max_bytes)
            yield Row(where, _columns(_parse(line, where), columns, where), position)
        except BadData as error:
            yield Row(where, error, position)


def _lines(part: Part, max_bytes: int) -> Iterator[tuple[Line, bytes | None, int]]:
    """(place, line, bytes read) of each line that is not blank and starts in the part; None for one that is too long."""
    with part.path.open("rb", buffering=BUFFER_BYTES) as raw:
        stream, first = _open(part.path, raw), part.start
        if part.start:
            raw.seek(part.start - 1)
            # A line that goes on behind the part is its neighbours': no need to see where it ends.
            first += _rest_of_line(stream, part.stop) - 1
        is_plain, number, position = stream is raw, 0, first
        while part.stop is None or position < part.stop:
            try:
                line = stream.readline(max_bytes + 1)
            except OSError as error:
                raise damaged(error, f"{part.path} after line {number}") from None
            if not line:
                return
            number += 1
            position += len(line)
            is_long = len(line) > max_bytes and not line.endswith(b"\n")
            if is_long:
                position += _rest_of_line(stream)
            if is_long or not line.isspace():
                yield Line(part.path, number, first), None if is_long else line, position if is_plain else raw.tell()


def _rest_of_line(stream: BinaryIO, stop: int | None = None) -> int:
    """Bytes up to the next line break, which is read too, or to place `stop`; no more than a buffer of them is held."""
    count = 0
    while (stop is None or stream.tell() < stop) and (data := stream.readline(BUFFER_BYTES)):
        count += len(data)
        if data.endswith(b"\n"):
            break
    return count


def _parse(line: bytes, where: Line) -> Any:
    """orjson is strict and fast; the standard parser decides what is wrong, and reads what only it reads (a BOM, NaN)."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        text = decode(line, place=where)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        )
        message = f"{where}: not valid JSON: {reason}"
        raise BadData.because("not valid JSON", message, "mend or remove the line") from None


def _columns(row: Any, columns: tuple[str, ...], where: object) -> tuple[Any, ...]:
    if not isinstance(row, dict):
        message = f"{where}: expected a JSON object, found {type(row).__name__}"
        raise BadData.because("not an object", message, "one {…} for each document")
    for column in columns:
        if column not in row:
            raise missing(where, column, list(row))
    return tuple(row[column] for column in columns)


def json_list(part: Part, columns: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    """A JSON list of objects; a file that does not start with [ is read as JSON lines, as the hub's often are."""
    path = part.path
    with path.open("rb") as raw:
        stream = _open(path, raw)
        start = stream.read(BUFFER_BYTES)
        if not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from jsonl(part, columns, max_bytes)
            return
        data = start + stream.read(_MAX_LIST_BYTES)
    if len(data) > _MAX_LIST_BYTES:
        limit = f"{path}: a JSON list is read as a whole, and this one is larger than {_MAX_LIST_BYTES // 10**6} MB"
        raise BadData.because("too long", limit, "give one object a line as .jsonl: jq -c '.[]'")
    values, size = _parse_whole(data, path), path.stat().st_size
    yield from short_enough(_list_rows(values, columns, path, size), max_bytes)


def _parse_whole(data: bytes, path: Path) -> list[Any]:
    """As _parse; the text of the whole list would take up to four times its bytes."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        text = decode(data, path)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        message = f"{path}: not valid JSON: nested too deep"
        if isinstance(error, json.JSONDecodeError):
            message = f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
        hint = "mend the file, or give one object a line as .jsonl"
        raise BadData.because("not valid JSON", message, hint) from None


def _list_rows(values: list[Any], columns: tuple[str, ...], path: Path, size: int) -> Iterator[Row]:
    for number, value in enumerate(values, start=1):
        where = f"{path} row {number}"
        try:
            yield Row(where, _columns(value, columns, where), size * number // len(values))
        except BadData as error:
            yield Row(where, error, size * number // len(values))


def csv_rows(part: Part, columns: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    """Comma-separated, with a header line; quoted fields may hold line breaks. After a broken quote nothing can be read."""
    csv.field_size_limit(max_bytes)
    path = part.path
    with path.open("rb", buffering=BUFFER_BYTES) as raw:
        reader = csv.reader(_csv_lines(_open(path, raw), path, max_bytes), strict=True)
        try:
            header = next(reader, [])
            require_columns(f"{path}:1", columns, header)
            for fields in filter(None, reader):
                where = f"{path}:{reader.line_num}"
                try:
                    yield Row(where, _fields(fields, header, columns, where), raw.tell())
                except BadData as error:
                    yield Row(where, error, raw.tell())
        except csv.Error as error:
            message = f"{path}:{reader.line_num}: not valid CSV: {error}"
            raise BadData.because("not valid CSV", message, "mend or remove the line") from None


def _csv_lines(stream: BinaryIO, path: Path, max_bytes: int) -> Iterator[str]:
    for number in itertools.count(1):
        line = stream.readline(max_bytes + 1)
        if not line:
            return
        if len(line) > max_bytes:
            raise too_long(f"{path}:{number}", max_bytes)
        # Bytes that are no UTF-8 wait as half surrogates until it is known which row they belong to.
        yield line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")


def _fields(fields: list[str], header: list[str], columns: tuple[str, ...], where: str) -> tuple[str, ...]:
    if len(fields) != len(header):
        message = f"{where}: {len(fields)} fields where the header has {len(header)}"
        raise BadData.because("ragged CSV", message, "quote commas in text")
    values = tuple(fields[header.index(column)] for column in columns)
    for value in values:
        if not value.isascii():
            decode(value.encode("utf-8", "surrogateescape"), place=where)
    return values


def whole_text(part: Part, columns: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    """One document a file."""
    with part.path.open("rb") as raw:
        data = _open(part.path, raw).read(max_bytes + 1)
    if len(data) > max_bytes:
        raise too_long(part.path, max_bytes)
    yield Row(f"{part.path}:1", (decode(data, part.path),), part.path.stat().st_size)


def _open(path: Path, raw: BinaryIO) -> BinaryIO:
    """The uncompressed bytes of an open file; truncated streams raise OSError."""
    import pyarrow

    kind = COMPRESSION.get(path.suffix)
    if kind is None:
        return raw
    stream: Any = pyarrow.CompressedInputStream(raw, kind)
    return io.BufferedReader(stream, BUFFER_BYTES)  # pyright: ignore[reportReturnType]
