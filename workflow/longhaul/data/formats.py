"""Data files -> raw values of some columns, each with its place, in every format and compression longhaul reads."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from longhaul.errors import UserError

_BATCH_ROWS, _BATCH_BYTES = 1024, 16_000_000
_BUFFER_BYTES = 1 << 20
_MAX_LIST_BYTES = 160_000_000
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


class BadData(UserError):
    """A row, or the rest of a file, that cannot be read; `reason` is what a count of such rows is kept under."""

    reason = "damaged file"
    ends_file = False

    @classmethod
    def because(cls, reason: str, message: str, hint: str) -> BadData:
        error = cls(message, hint)
        error.reason = reason
        return error


@dataclass(frozen=True)
class Line:
    """A line's place: the number is counted from where reading began, and turned into the file's when it is printed."""

    path: Path
    number: int
    first_byte: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.number + _newlines(self.path, self.first_byte)}"


class Row(NamedTuple):
    """A row's columns, or what is wrong with it; its place ("file:line" or "file row n"); bytes of the file read so far."""

    where: object
    values: tuple[Any, ...] | BadData
    position: int


class Part(NamedTuple):
    """Some of a file: lines that start in bytes [start, stop), or row groups [start, stop); stop None: the whole file."""

    path: Path
    file_format: str
    start: int = 0
    stop: int | None = None


def rows(part: Part, columns: tuple[str, ...], max_document_bytes: int) -> Iterator[Row]:
    """Reads columns of one file. What is wrong with a row, or with the rest of the file, comes as a row of its own."""
    try:
        size = part.path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{part.path} does not exist", "check the dataset's `files`") from None
    if not size:
        hint = "remove it from the dataset's `files`, or fill it"
        yield Row(part.path, BadData.because("empty file", f"{part.path} is empty", hint), 0)
        return
    chosen = format_of(part.path) if part.file_format == "auto" else part.file_format
    try:
        with _readable(part.path):
            yield from _READERS[chosen](part, columns, max_document_bytes)
    except BadData as error:
        error.ends_file = True
        yield Row(part.path, error, size)


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
        raise _damaged(error, path) from None


def _damaged(error: Exception, where: object) -> BadData:
    reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
    hint = "the file is damaged or cut short: fetch it again"
    return BadData.because("damaged file", f"cannot read {where}: {reason}", hint)


def _open(path: Path, raw: BinaryIO) -> BinaryIO:
    """The uncompressed bytes of an open file; truncated streams raise OSError."""
    import pyarrow

    kind = _COMPRESSION.get(path.suffix)
    if kind is None:
        return raw
    stream: Any = pyarrow.CompressedInputStream(raw, kind)
    return io.BufferedReader(stream, _BUFFER_BYTES)  # pyright: ignore[reportReturnType]


def _newlines(path: Path, stop: int) -> int:
    """Line breaks before byte `stop`."""
    count = 0
    with path.open("rb") as raw:
        while stop > 0 and (data := raw.read(min(stop, _BUFFER_BYTES))):
            count += data.count(b"\n")
            stop -= len(data)
    return count


def _lines(part: Part, max_bytes: int) -> Iterator[tuple[Line, bytes | None, int]]:
    """(place, line, bytes read) of each line that is not blank and starts in the part; None for one that is too long."""
    with part.path.open("rb", buffering=_BUFFER_BYTES) as raw:
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
                raise _damaged(error, f"{part.path} after line {number}") from None
            if not line:
                return
            number += 1
            position += len(line)
            is_long = len(line) > max_bytes and not line.endswith(b"\n")
            if is_long:
                position += _rest_of_line(stream)
            if is_long or line.strip():
                yield Line(part.path, number, first), None if is_long else line, position if is_plain else raw.tell()


def _rest_of_line(stream: BinaryIO, stop: int | None = None) -> int:
    """Bytes up to the next line break, which is read too, or to place `stop`; no more than a buffer of them is held."""
    count = 0
    while (stop is None or stream.tell() < stop) and (data := stream.readline(_BUFFER_BYTES)):
        count += len(data)
        if data.endswith(b"\n"):
            break
    return count


def too_long(where: object, max_bytes: int) -> BadData:
    """A document beyond the dataset's max_document_mb."""
    return BadData.because(
        "too long",
        f"{where}: longer than {max_bytes / 1e6:g} MB, the dataset's max_document_mb",
        "cut the document, or raise max_document_mb",
    )


def _decode(data: bytes, path: Path | None = None, place: object = None) -> str:
    """Of a whole file, or of what stands in a place of it."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = place or f"{path}:{1 + data.count(bytes([10]), 0, error.start)}"
        raise BadData.because(
            "invalid UTF-8",
            f"{where}: byte 0x{data[error.start]:02x} is not valid UTF-8 ({error.reason})",
            "convert the file: iconv -f <its encoding> -t utf-8",
        ) from None


def _jsonl(part: Part, columns: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    for where, line, position in _lines(part, max_bytes):
        try:
            if line is None:
                raise too_long(where, max_bytes)
            yield Row(where, _columns(_parse(line, where), columns, where), position)
        except BadData as error:
            yield Row(where, error, position)


def _parse(line: bytes, where: Line) -> Any:
    """orjson is strict and fast; the standard parser decides what is wrong, and reads what only it reads (a BOM, NaN)."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        text = _decode(line, place=where)
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
            raise _missing(where, column, list(row))
    return tuple(row[column] for column in columns)


def _missing(where: object, column: str, found: list[str]) -> BadData:
    named = ", ".join(map(repr, found[:12])) or "none"
    message = f"{where}: no column {column!r}; found {named}"
    return BadData.because("missing column", message, "name the column under the dataset's `columns`")


def _json(part: Part, columns: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    """A JSON list of objects; a file that does not start with [ is read as JSON lines, as the hub's often are."""
    path = part.path
    with path.open("rb") as raw:
        stream = _open(path, raw)
        start = stream.read(_BUFFER_BYTES)
        if not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _jsonl(part, columns, max_bytes)
            return
        data = start + stream.read(_MAX_LIST_BYTES)
    if len(data) > _MAX_LIST_BYTES:
        limit = f"{path}: a JSON list is read as a whole, and this one is larger than {_MAX_LIST_BYTES // 10**6} MB"
        raise BadData.because("too long", limit, "give one object a line as .jsonl: jq -c '.[]'")
    values, size = _parse_whole(data, path), path.stat().st_size
    yield from _short_enough(_list_rows(values, columns, path, size), max_bytes)


def _list_rows(values: list[Any], columns: tuple[str, ...], path: Path, size: int) -> Iterator[Row]:
    for number, value in enumerate(values, start=1):
        where = f"{path} row {number}"
        try:
            yield Row(where, _columns(value, columns, where), size * number // len(values))
        except BadData as error:
            yield Row(where, error, size * number // len(values))


def _short_enough(found: Iterable[Row], max_bytes: int) -> Iterator[Row]:
    """Rows that were not measured as lines; one that is too long is refused as a line is."""
    for row in found:
        is_long = not isinstance(row.values, BadData) and _text_bytes(row.values) > max_bytes
        yield row._replace(values=too_long(row.where, max_bytes)) if is_long else row


def _text_bytes(value: Any) -> int:
    """Bytes of all texts in a value, as UTF-8."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(_text_bytes, value.values()))
    return sum(map(_text_bytes, value)) if isinstance(value, list | tuple) else 0


def _parse_whole(data: bytes, path: Path) -> list[Any]:
    """As _parse; the text of the whole list would take up to four times its bytes."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        text = _decode(data, path)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        message = f"{path}: not valid JSON: nested too deep"
        if isinstance(error, json.JSONDecodeError):
            message = f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
        hint = "mend the file, or give one object a line as .jsonl"
        raise BadData.because("not valid JSON", message, hint) from None


def _csv(part: Part, columns: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    """Comma-separated, with a header line; quoted fields may hold line breaks. After a broken quote nothing can be read."""
    csv.field_size_limit(max_bytes)
    path = part.path
    with path.open("rb", buffering=_BUFFER_BYTES) as raw:
        reader = csv.reader(_csv_lines(_open(path, raw), path, max_bytes), strict=True)
        try:
            header = next(reader, [])
            _require(f"{path}:1", columns, header)
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
            _decode(value.encode("utf-8", "surrogateescape"), place=where)
    return values


def _text(part: Part, columns: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    """One document a file."""
    with part.path.open("rb") as raw:
        data = _open(part.path, raw).read(max_bytes + 1)
    if len(data) > max_bytes:
        raise too_long(part.path, max_bytes)
    yield Row(f"{part.path}:1", (_decode(data, part.path),), part.path.stat().st_size)


def _parquet(part: Part, columns: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    import pyarrow.parquet

    # Pages are read as they are needed, not a row group's whole columns.
    with pyarrow.parquet.ParquetFile(part.path, buffer_size=_BUFFER_BYTES) as table:
        _require(part.path, columns, table.schema_arrow.names)
        groups = range(part.start, table.num_row_groups if part.stop is None else part.stop)
        first = sum(table.metadata.row_group(group).num_rows for group in range(part.start))
        batches = table.iter_batches(_rows_at_once(table.metadata), row_groups=list(groups), columns=list(columns))
        read = _batches(part.path, batches, columns, first, max(1, table.metadata.num_rows))
        yield from _short_enough(read, max_bytes)


def _rows_at_once(metadata: Any) -> int:
    """So many that they hold some MB, going by the fullest row group."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(1, row_bytes))))


def _require(path: object, columns: tuple[str, ...], found: list[str]) -> None:
    for column in columns:
        if column not in found:
            raise _missing(path, column, found)
        if found.count(column) > 1:
            message = f"{path}: {found.count(column)} columns are named {column!r}"
            raise BadData.because("doubled column", message, "write the file anew with one of them")


def _arrow(part: Part, columns: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    """Arrow's stream format, which `datasets` writes, or its file format; one batch at a time."""
    import pyarrow

    with pyarrow.memory_map(str(part.path)) as source:
        try:
            opened = pyarrow.ipc.open_stream(source)
            _require(part.path, columns, opened.schema.names)
            batches = iter(opened)
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(source)
            _require(part.path, columns, opened.schema.names)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        yield from _short_enough(_batches(part.path, batches, columns, 0, 0), max_bytes)


def _batches(path: Path, batches: Iterable[Any], columns: tuple[str, ...], first: int, row_count: int) -> Iterator[Row]:
    """Rows of Arrow batches; row_count 0: not known, so progress stands until the file is done."""
    number, size = first, path.stat().st_size
    for batch in batches:
        arrays = [batch.column(column) for column in columns]
        for values in zip(*map(_as_python, arrays), strict=True):
            number += 1
            where = f"{path} row {number}"
            position = size * number // row_count if row_count else 0
            yield Row(where, _checked_cells(values, where), position)


def _as_python(array: Any) -> list[Any]:
    """Python values; a cell that is not valid UTF-8 becomes the error it raised."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_cell(scalar) for scalar in array]


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _checked_cells(values: tuple[Any, ...], where: str) -> tuple[Any, ...] | BadData:
    for value in values:
        if isinstance(value, UnicodeDecodeError):
            message = f"{where}: not valid UTF-8 ({value.reason})"
            return BadData.because("invalid UTF-8", message, "write the file anew with valid text")
    return values


_READERS: dict[str, Callable[[Part, tuple[str, ...], int], Iterator[Row]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "parquet": _parquet,
    "csv": _csv,
    "text": _text,
    "arrow": _arrow,
}
