"""What every reader of data files gives and asks for: parts of files, rows with their places, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from longhaul.errors import UserError

BUFFER_BYTES = 1 << 20


class BadData(UserError):
    """A row, or the rest of a file, that cannot be read; `reason` is what a count of such rows is kept under."""

    reason = "damaged file"
    ends_file = False

    @classmethod
    def because(cls, reason: str, message: str, hint: str) -> BadData:
        error = cls(message, hint)
        error.reason = reason
        return error


class Line(NamedTuple):
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


def _newlines(path: Path, stop: int) -> int:
    """Line breaks before byte `stop`."""
    count = 0
    with path.open("rb") as raw:
        while stop > 0 and (data := raw.read(min(stop, BUFFER_BYTES))):
            count += data.count(b"\n")
            stop -= len(data)
    return count


def damaged(error: Exception, where: object) -> BadData:
    """Of what a file system or a decompressor raised."""
    reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
    hint = "the file is damaged or cut short: fetch it again"
    return BadData.because("damaged file", f"cannot read {where}: {reason}", hint)


def too_long(where: object, max_bytes: int) -> BadData:
    """A document beyond the dataset's max_document_mb."""
    return BadData.because(
        "too long",
        f"{where}: longer than {max_bytes / 1e6:g} MB, the dataset's max_document_mb",
        "cut the document, or raise max_document_mb",
    )


def decode(data: bytes, path: Path | None = None, place: object = None) -> str:
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


def missing(where: object, column: str, found: list[str]) -> BadData:
    """Of a row or file that has other columns."""
    named = ", ".join(map(repr, found[:12])) or "none"
    message = f"{where}: no column {column!r}; found {named}"
    return BadData.because("missing column", message, "name the column under the dataset's `columns`")


def require_columns(path: object, columns: tuple[str, ...], found: list[str]) -> None:
    """BadData unless a header has each of these columns once."""
    for column in columns:
        if column not in found:
            raise missing(path, column, found)
        if found.count(column) > 1:
            message = f"{path}: {found.count(column)} columns are named {column!r}"
            raise BadData.because("doubled column", message, "write the file anew with one of them")


def short_enough(found: Iterable[Row], max_bytes: int) -> Iterator[Row]:
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
