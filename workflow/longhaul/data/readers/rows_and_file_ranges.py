"""Types that all readers share: file ranges, rows with file and line, BadData errors, the limit max_document_mb."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from longhaul.errors import InputError

BUFFER_BYTES = 1 << 20


class BadData(InputError):
    """A row, or the rest of a file, that cannot be read.

    reason:    category of the error. The data manifest counts bad rows by reason.
    ends_file: True when nothing after this row can be read from the file.
    position:  bytes of the file that have been read, including this row; 0 where it is unknown.
    """

    reason = "damaged file"
    ends_file = False
    position = 0

    @classmethod
    def with_reason(cls, reason: str, message: str, hint: str) -> BadData:
        """Return an error of the category `reason`."""
        error = cls(message, hint)
        error.reason = reason
        return error

    def stopping(self) -> BadData:
        """Return the error of a job that stops at a bad row: its remedy names the other policy, too."""
        if "bad_rows" not in self.hint:
            self.hint += ", or leave out such rows with bad_rows: skip"
        return self


class LineLocation(NamedTuple):
    """Location of a line. str() gives "file:line".

    number counts lines from byte `first_byte`. Printing converts it to the line number of the file, which reads the
    bytes before `first_byte`.
    """

    path: Path
    number: int
    first_byte: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.number + _count_newlines(self.path, self.first_byte)}"


class WantedColumns(NamedTuple):
    """Names of the columns to read. The value of an optional column is None in a row that does not have it."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of a row's values."""
        return self.required + self.optional


class Row(NamedTuple):
    """One row of a file.

    where:    the row's location; str() gives "file:line" or "file row n".
    values:   the values of the wanted columns, or the error that describes the row.
    position: bytes of the file that have been read, including this row.
    found:    names of all columns of the row.
    """

    where: object
    values: tuple[object, ...] | BadData
    position: int
    found: tuple[str, ...] = ()


class FileRange(NamedTuple):
    """A part of a file: lines that start in bytes [start, stop), or row groups [start, stop).

    stop is None for the whole file.
    """

    path: Path
    file_format: str
    start: int = 0
    stop: int | None = None


def _count_newlines(path: Path, stop: int) -> int:
    """Return the number of line breaks before byte `stop`."""
    count = 0
    with path.open("rb") as raw:
        while stop > 0 and (data := raw.read(min(stop, BUFFER_BYTES))):
            count += data.count(b"\n")
            stop -= len(data)
    return count


def damaged_file(error: Exception, where: object) -> BadData:
    """Return the error for an exception of the file system or of a decompressor."""
    reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
    hint = "the file is damaged or truncated: fetch it again"
    return BadData.with_reason("damaged file", f"cannot read {where}: {reason}", hint)


def too_long(where: object, max_bytes: int) -> BadData:
    """Return the error for a document that exceeds the dataset's max_document_mb."""
    return BadData.with_reason(
        "too long",
        f"{where}: longer than {max_bytes / 1e6:g} MB, the dataset's max_document_mb",
        "shorten the document, or raise max_document_mb",
    )


def decode_utf8(data: bytes, path: Path | None = None, where: object = None) -> str:
    """Decode UTF-8 bytes; BadData names the location of the first invalid byte.

    Pass `path` for the bytes of a whole file, or `where` for the bytes at one location.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        location = where or f"{path}:{1 + data.count(bytes([10]), 0, error.start)}"
        raise BadData.with_reason(
            "invalid UTF-8",
            f"{location}: byte 0x{data[error.start]:02x} is not valid UTF-8 ({error.reason})",
            "convert the file: iconv -f <its encoding> -t utf-8",
        ) from None


def missing_column(where: object, column: str, found: list[str]) -> BadData:
    """Return the error for a row or a file that has no such column."""
    names = ", ".join(map(repr, found[:12])) or "none"
    message = f"{where}: no column {column!r}; found {names}"
    return BadData.with_reason(
        "missing column", message, "set the column name in the dataset's `columns`, or add the column"
    )


def require_columns(path: object, columns: WantedColumns, found: list[str]) -> None:
    """Raise BadData unless a header contains each required column exactly once, and each optional one at most once."""
    for column in columns.required:
        if column not in found:
            raise missing_column(path, column, found)
    for column in columns.names:
        if found.count(column) > 1:
            message = f"{path}: {found.count(column)} columns are named {column!r}"
            raise BadData.with_reason("duplicate column", message, "write the file again with one such column")


def refuse_long_rows(rows: Iterable[Row], max_bytes: int) -> Iterator[Row]:
    """Replace rows with more than `max_bytes` of text by errors.

    Readers of line-based formats do not need this, because they limit the length of lines.
    """
    for row in rows:
        is_long = not isinstance(row.values, BadData) and text_bytes(row.values) > max_bytes
        yield row._replace(values=too_long(row.where, max_bytes)) if is_long else row


def text_bytes(value: object) -> int:
    """Return the UTF-8 bytes of all texts in a value."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(text_bytes, value.values()))
    return sum(map(text_bytes, value)) if isinstance(value, list | tuple) else 0
