"""Reads JSON lines, JSON lists, CSV and whole text files, plain or compressed."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from longhaul.config.data_formats import known_compression
from longhaul.data.readers.rows_and_file_ranges import (
    BUFFER_BYTES,
    BadData,
    FileRange,
    LineLocation,
    Row,
    WantedColumns,
    damaged_file,
    decode_utf8,
    missing_column,
    refuse_long_rows,
    require_columns,
    too_long,
)
from longhaul.data.readers.zstd_window import require_readable_window

_MAX_LIST_BYTES = 160_000_000


def read_jsonl(file_range: FileRange, columns: WantedColumns, max_bytes: int) -> Iterator[Row]:
    """Read one JSON object per line."""
    for where, line, position in _read_lines(file_range, max_bytes):
        try:
            if line is None:
                raise too_long(where, max_bytes)
            row = _parse_line(line, where)
            yield Row(where, _select_columns(row, columns, where), position, tuple(row))
        except BadData as error:
            yield Row(where, error, position)


def _read_lines(file_range: FileRange, max_bytes: int) -> Iterator[tuple[LineLocation, bytes | None, int]]:
    """Yield (location, line, bytes read) for each line that is not blank and starts in the range.

    The line is None where it is longer than `max_bytes`.
    """
    path, start, stop = file_range.path, file_range.start, file_range.stop
    with path.open("rb", buffering=BUFFER_BYTES) as raw:
        stream, first = _decompress(path, raw), start
        if start:
            raw.seek(start - 1)
            # A line that continues past the range belongs to a neighbouring range, so its end need not be found.
            first += _skip_line(stream, stop) - 1
        is_plain, number, position = stream is raw, 0, first
        while stop is None or position < stop:
            try:
                line = stream.readline(max_bytes + 1)
            except OSError as error:
                raise damaged_file(error, f"{path} after line {number}") from None
            if not line:
                return
            number += 1
            position += len(line)
            is_long = len(line) > max_bytes and not line.endswith(b"\n")
            if is_long:
                position += _skip_line(stream)
            if is_long or not line.isspace():
                where = LineLocation(path, number, first)
                yield where, None if is_long else line, position if is_plain else raw.tell()


def _skip_line(stream: BinaryIO, stop: int | None = None) -> int:
    """Skip the rest of a line and return its bytes, line break included.

    Stops early at position `stop`. Holds at most one buffer in memory.
    """
    count = 0
    while (stop is None or stream.tell() < stop) and (data := stream.readline(BUFFER_BYTES)):
        count += len(data)
        if data.endswith(b"\n"):
            break
    return count


def _parse_line(line: bytes, where: LineLocation) -> Any:
    """Parse JSON with orjson, which is fast and strict.

    The standard parser then reads what orjson refuses (a BOM, NaN), and its error names the mistake.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        text = decode_utf8(line, where=where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"{where}: not valid JSON: {_mistake(error)}"
        raise BadData.with_reason("not valid JSON", message, "fix or remove the line") from None


def _mistake(error: Exception) -> str:
    """Return what the standard parser found wrong. For too long an integer, Python raises a plain ValueError."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deep"
    return f"an integer of more than {sys.get_int_max_str_digits()} digits"


def _select_columns(row: object, columns: WantedColumns, where: object) -> tuple[object, ...]:
    if not isinstance(row, dict):
        message = f"{where}: expected a JSON object, found {type(row).__name__}"
        raise BadData.with_reason("not an object", message, "write one JSON object {…} for each document")
    for column in columns.required:
        if column not in row:
            raise missing_column(where, column, list(row))
    return tuple(map(row.get, columns.names))


def read_json_list(file_range: FileRange, columns: WantedColumns, max_bytes: int) -> Iterator[Row]:
    """Read a JSON list of objects.

    A file that does not start with [ is read as JSON lines: many .json files on the Hugging Face Hub are.
    """
    path = file_range.path
    with path.open("rb") as raw:
        stream = _decompress(path, raw)
        start = stream.read(BUFFER_BYTES)
        if not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from read_jsonl(file_range, columns, max_bytes)
            return
        data = start + stream.read(_MAX_LIST_BYTES)
    if len(data) > _MAX_LIST_BYTES:
        message = (
            f"{path}: larger than {_MAX_LIST_BYTES // 10**6} MB, the limit for a JSON list, which is read as a whole"
        )
        raise BadData.with_reason("too long", message, "write one object per line as .jsonl: jq -c '.[]'")
    values, size = _parse_list(data, path), path.stat().st_size
    yield from refuse_long_rows(_list_rows(values, columns, path, size), max_bytes)


def _parse_list(data: bytes, path: Path) -> list[Any]:
    """Parse a JSON list like _parse_line; the whole file's text would take up to four times its bytes."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        text = decode_utf8(data, path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else path
        message = f"{where}: not valid JSON: {_mistake(error)}"
        hint = "fix the file, or write one object per line as .jsonl"
        raise BadData.with_reason("not valid JSON", message, hint) from None


def _list_rows(values: list[Any], columns: WantedColumns, path: Path, size: int) -> Iterator[Row]:
    for number, value in enumerate(values, start=1):
        where = f"{path} row {number}"
        try:
            yield Row(where, _select_columns(value, columns, where), size * number // len(values), tuple(value))
        except BadData as error:
            yield Row(where, error, size * number // len(values))


def read_csv(file_range: FileRange, columns: WantedColumns, max_bytes: int) -> Iterator[Row]:
    """Read comma-separated values with a header line; quoted fields may contain line breaks.

    Nothing can be read after an invalid quote.
    """
    csv.field_size_limit(max_bytes)
    path = file_range.path
    with path.open("rb", buffering=BUFFER_BYTES) as raw:
        reader = csv.reader(_csv_lines(_decompress(path, raw), path, max_bytes), strict=True)
        try:
            header = next(reader, [])
            require_columns(f"{path}:1", columns, header)
            for fields in filter(None, reader):
                where = f"{path}:{reader.line_num}"
                try:
                    yield Row(where, _select_fields(fields, header, columns, where), raw.tell(), tuple(header))
                except BadData as error:
                    yield Row(where, error, raw.tell())
        except csv.Error as error:
            message = f"{path}:{reader.line_num}: not valid CSV: {error}"
            raise BadData.with_reason("not valid CSV", message, "fix or remove the line") from None


def _csv_lines(stream: BinaryIO, path: Path, max_bytes: int) -> Iterator[str]:
    for number in itertools.count(1):
        line = stream.readline(max_bytes + 1)
        if not line:
            return
        if len(line) > max_bytes:
            raise too_long(f"{path}:{number}", max_bytes)
        # Invalid UTF-8 becomes surrogates here; _select_fields reports it for the row that contains it.
        yield line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")


def _select_fields(fields: list[str], header: list[str], columns: WantedColumns, where: str) -> tuple[str | None, ...]:
    if len(fields) != len(header):
        message = f"{where}: {len(fields)} fields, but the header has {len(header)}"
        raise BadData.with_reason("wrong number of CSV fields", message, "quote texts that contain commas")
    values = tuple(fields[header.index(name)] if name in header else None for name in columns.names)
    for value in values:
        if value and not value.isascii():
            decode_utf8(value.encode("utf-8", "surrogateescape"), where=where)
    return values


def read_whole_text(file_range: FileRange, columns: WantedColumns, max_bytes: int) -> Iterator[Row]:
    """Read a file as one document."""
    path = file_range.path
    with path.open("rb") as raw:
        data = _decompress(path, raw).read(max_bytes + 1)
    if len(data) > max_bytes:
        raise too_long(path, max_bytes)
    yield Row(f"{path}:1", (decode_utf8(data, path),), path.stat().st_size)


def _decompress(path: Path, raw: BinaryIO) -> BinaryIO:
    """Return a stream of the uncompressed bytes of an open file; reading a truncated stream raises OSError."""
    import pyarrow

    compression = known_compression(path)
    if compression is None:
        return raw
    if compression == "zstd":
        require_readable_window(path, raw)
    stream: Any = pyarrow.CompressedInputStream(raw, compression)
    return io.BufferedReader(stream, BUFFER_BYTES)  # pyright: ignore[reportReturnType]
