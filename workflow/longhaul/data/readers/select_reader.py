"""Selects the reader for a file's format and compression (gzip, zstd); the place to register a new data format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from longhaul.config.data_formats import KNOWN_SUFFIXES, known_format
from longhaul.data.readers.columnar_files import read_arrow, read_parquet
from longhaul.data.readers.rows_and_file_ranges import BadData, FileRange, Row, WantedColumns, damaged_file
from longhaul.data.readers.text_files import read_csv, read_json_list, read_jsonl, read_whole_text
from longhaul.errors import InputError, UserError

_READERS: dict[str, Callable[[FileRange, WantedColumns, int], Iterator[Row]]] = {
    "jsonl": read_jsonl,
    "json": read_json_list,
    "parquet": read_parquet,
    "csv": read_csv,
    "text": read_whole_text,
    "arrow": read_arrow,
}


def read_rows(file_range: FileRange, columns: WantedColumns, max_document_bytes: int) -> Iterator[Row]:
    """Read columns of one file.

    Errors are yielded as rows: one for each bad row, and one when the rest of the file cannot be read.

    Raises:
        UserError: the file does not exist, or its format is unknown.
    """
    path = file_range.path
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "restore it, or correct the dataset's `files`") from None
    if not size:
        hint = "remove it from the dataset's `files`, or fill it"
        yield Row(path, BadData.with_reason("empty file", f"{path} is empty", hint), 0)
        return
    file_format = format_of(path) if file_range.file_format == "auto" else file_range.file_format
    try:
        with _name_file_in_errors(path):
            yield from _READERS[file_format](file_range, columns, max_document_bytes)
    except BadData as error:
        error.ends_file = True
        yield Row(path, error, size)


def format_of(path: Path) -> str:
    """Return the format for a file's suffix, without the compression suffix; UserError for an unknown suffix."""
    found = known_format(path)
    if found is None:
        raise InputError(f"{path}: unknown file suffix", f"set the dataset's `format`, or use one of {KNOWN_SUFFIXES}")
    return found


@contextmanager
def _name_file_in_errors(path: Path) -> Iterator[None]:
    """Convert exceptions of the file system and of Arrow to BadData that names the file."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise damaged_file(error, path) from None
