"""Reads the first rows of a local data file of an evaluation task, with the types that `datasets` gives them.

Without `datasets`, which the plan does not import. What is read first decides the columns, as there: 10 MB of JSON, or 10,000
rows of CSV.
"""

from __future__ import annotations

import gzip
import json
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

_FIRST_BYTES, _FIRST_CSV_ROWS = 10 << 20, 10_000
_MAX_LIST_BYTES = 16_000_000

TaskRow = dict[str, Any]


def first_task_rows(path: Path, file_format: str, rows: int) -> list[TaskRow]:
    """Return the first rows of a file; [] if it has none, or is not readable in this way. file_format: one of LOCAL_FORMATS"""
    import pyarrow

    try:
        return _first_table(path, file_format).slice(0, rows).to_pylist()
    except (OSError, EOFError, ValueError, TypeError, pyarrow.ArrowException):
        return []  # of another compression, say, or a damaged one: the job opens it with `datasets`, and names the reason


def _first_table(path: Path, file_format: str) -> Any:
    """Return the first rows as a table of pyarrow."""
    if file_format == "parquet":
        return _first_parquet_rows(path)
    if file_format == "arrow":
        return _first_arrow_batch(path)
    with _opened(path) as stream:
        return {"csv": _first_csv_rows, "text": _first_lines, "json": _first_json_rows}[file_format](stream)


def _opened(path: Path) -> IO[bytes]:
    with path.open("rb") as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if is_gzip else path.open("rb")


def _first_json_rows(stream: IO[bytes]) -> Any:
    """Return the rows of a file with one object per line, or of a JSON list."""
    import pyarrow
    from pyarrow.json import ReadOptions, read_json

    first = stream.read(_FIRST_BYTES)
    if first.lstrip().startswith(b"["):
        values = json.loads(first + stream.read(_MAX_LIST_BYTES))
        rows = (value if isinstance(value, dict) else {"text": value} for value in values)
        first = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    else:
        first += stream.readline()
    try:
        return read_json(BytesIO(first), ReadOptions(block_size=len(first) + 1))
    except pyarrow.ArrowInvalid:  # a column has values of several types
        values = [json.loads(line) for line in first.splitlines() if line.strip()]
        columns = dict.fromkeys(column for value in values for column in value)
        return _Rows([dict.fromkeys(columns) | value for value in values])


class _Rows:
    """Rows that no table holds."""

    def __init__(self, rows: list[TaskRow]) -> None:
        self._rows = rows

    def slice(self, start: int, count: int) -> _Rows:
        return _Rows(self._rows[start : start + count])

    def to_pylist(self) -> list[TaskRow]:
        return self._rows


def _first_csv_rows(stream: IO[bytes]) -> Any:
    import pandas
    import pyarrow

    return pyarrow.Table.from_pandas(pandas.read_csv(stream, nrows=_FIRST_CSV_ROWS))


def _first_lines(stream: IO[bytes]) -> Any:
    lines = islice(stream, _FIRST_CSV_ROWS)
    return _Rows([{"text": line.decode().rstrip("\r\n")} for line in lines])


def _first_parquet_rows(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as opened:
        return next(opened.iter_batches(batch_size=100))


def _first_arrow_batch(path: Path) -> Any:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            return pyarrow.ipc.open_stream(source).read_next_batch()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(source).get_batch(0)
