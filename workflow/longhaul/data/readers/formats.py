"""Data files -> raw values of some columns, each with its place, in every format and compression longhaul reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from longhaul.data.readers.columnar_files import arrow, parquet
from longhaul.data.readers.rows import BadData, Part, Row, damaged
from longhaul.data.readers.text_files import COMPRESSION, csv_rows, json_list, jsonl, whole_text
from longhaul.errors import UserError

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
_READERS: dict[str, Callable[[Part, tuple[str, ...], int], Iterator[Row]]] = {
    "jsonl": jsonl,
    "json": json_list,
    "parquet": parquet,
    "csv": csv_rows,
    "text": whole_text,
    "arrow": arrow,
}


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
    endings = [ending for ending in path.suffixes[-2:] if ending not in COMPRESSION]
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
        raise damaged(error, path) from None
