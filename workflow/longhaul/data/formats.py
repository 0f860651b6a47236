"""Data files -> raw values of one column, each with its place, in every format and compression longhaul reads."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from longhaul.errors import UserError

_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}


class Row(NamedTuple):
    """One raw value: where it stands ("file:line" or "file row n"), and the share of its file read so far."""

    where: str
    value: Any
    read_share: float


def rows(path: Path, file_format: str, column: str) -> Iterator[Row]:
    """Reads a column of one file; UserError with file and line for whatever cannot be read."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "check the dataset's `files`") from None
    if not size:
        raise UserError(f"{path} is empty", "remove it from the dataset's `files`, or fill it")
    chosen = format_of(path) if file_format == "auto" else file_format
    with _readable(path):
        yield from _READERS[chosen](path, column)


def format_of(path: Path) -> str:
    """Format by file ending, compression set aside; UserError for an ending that says nothing."""
    endings = [ending for ending in path.suffixes[-2:] if ending not in _COMPRESSION]
    found = _ENDINGS.get(endings[-1]) if endings else None
    if found is None:
        known = ", ".join(sorted(_ENDINGS))
        raise UserError(f"{path}: the ending does not tell its format", f"set the dataset's `format`, or use {known}")
    return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what files and Arrow raise into a UserError that names the file."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise UserError(f"cannot read {path}: {reason}", "the file is damaged or cut short: fetch it again") from None


def _open(path: Path, raw: BinaryIO) -> BinaryIO:
    """The uncompressed bytes of an open file; truncated streams raise OSError."""
    import pyarrow

    kind = _COMPRESSION.get(path.suffix)
    if kind is None:
        return raw
    stream: Any = pyarrow.CompressedInputStream(raw, kind)
    return io.BufferedReader(stream, _BUFFER_BYTES)  # pyright: ignore[reportReturnType]


def _lines(path: Path) -> Iterator[tuple[int, str, float]]:
    """(line number, text, share read) of each line that is not blank."""
    size = path.stat().st_size
    with path.open("rb", buffering=_BUFFER_BYTES) as raw:
        for number, line in enumerate(_open(path, raw), start=1):
            text = _decode(line, path, number)
            if text.strip():
                yield number, text, raw.tell() / size


def _decode(data: bytes, path: Path, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not valid UTF-8 ({error.reason})",
            "convert the file: iconv -f <its encoding> -t utf-8",
        ) from None


def _jsonl(path: Path, column: str) -> Iterator[Row]:
    for number, line, share in _lines(path):
        where = f"{path}:{number}"
        yield Row(where, _column(_parse(line, where), column, where), share)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        )
        raise UserError(f"{where}: not valid JSON: {reason}", "mend or remove the line") from None


def _column(row: Any, column: str, where: str) -> Any:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}", "one {…} for each document")
    if column not in row:
        raise _missing(where, column, list(row))
    return row[column]


def _missing(where: str, column: str, found: list[str]) -> UserError:
    columns = ", ".join(map(repr, found[:12])) or "none"
    return UserError(f"{where}: no column {column!r}; found {columns}", "name the column under the dataset's `columns`")


def _json(path: Path, column: str) -> Iterator[Row]:
    """A JSON list of objects; a file that does not start with [ is read as JSON lines, as the hub's often are."""
    with path.open("rb") as raw:
        stream = _open(path, raw)
        start = stream.read(_BUFFER_BYTES)
        if not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _jsonl(path, column)
            return
        text = _decode(start + stream.read(), path)
    values = _parse_whole(text, path)
    for number, value in enumerate(values, start=1):
        where = f"{path} row {number}"
        yield Row(where, _column(value, column, where), number / len(values))


def _parse_whole(text: str, path: Path) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        message = f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
        raise UserError(message, "mend the file, or give one object a line as .jsonl") from None


def _csv(path: Path, column: str) -> Iterator[Row]:
    """Comma-separated, with a header line; quoted fields may hold line breaks."""
    csv.field_size_limit(sys.maxsize)
    size = path.stat().st_size
    with path.open("rb", buffering=_BUFFER_BYTES) as raw:
        lines = (_decode(line, path, number) for number, line in enumerate(_open(path, raw), start=1))
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            if column not in header:
                raise _missing(f"{path}:1", column, header)
            for fields in reader:
                if fields:
                    where = f"{path}:{reader.line_num}"
                    yield Row(where, _field(fields, header, column, where), raw.tell() / size)
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}", "mend or remove the line") from None


def _field(fields: list[str], header: list[str], column: str, where: str) -> str:
    if len(fields) != len(header):
        raise UserError(f"{where}: {len(fields)} fields where the header has {len(header)}", "quote commas in text")
    return fields[header.index(column)]


def _text(path: Path, column: str) -> Iterator[Row]:
    """One document a file."""
    with path.open("rb") as raw:
        yield Row(f"{path}:1", _decode(_open(path, raw).read(), path), 1.0)


def _parquet(path: Path, column: str) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        if column not in table.schema_arrow.names:
            raise _missing(str(path), column, table.schema_arrow.names)
        batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=[column])
        yield from _batches(path, (batch.column(0) for batch in batches), table.metadata.num_rows)


def _arrow(path: Path, column: str) -> Iterator[Row]:
    """Arrow's stream format, which `datasets` writes, or its file format."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(source).read_all()
        if column not in table.column_names:
            raise _missing(str(path), column, table.column_names)
        yield from _batches(path, iter(table.column(column).chunks), table.num_rows)


def _batches(path: Path, arrays: Iterator[Any], row_count: int) -> Iterator[Row]:
    number = 0
    for array in arrays:
        for scalar in array:
            number += 1
            where = f"{path} row {number}"
            yield Row(where, _as_python(scalar, where), number / row_count)


def _as_python(scalar: Any, where: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid UTF-8 ({error.reason})", "write the file anew with valid text") from None


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "parquet": _parquet,
    "csv": _csv,
    "text": _text,
    "arrow": _arrow,
}
