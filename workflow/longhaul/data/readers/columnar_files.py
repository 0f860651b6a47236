"""Reads Parquet and Arrow files in small batches of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from longhaul.data.readers.rows_and_file_ranges import (
    BUFFER_BYTES,
    BadData,
    FileRange,
    Row,
    WantedColumns,
    refuse_long_rows,
    require_columns,
)

_BATCH_ROWS, _BATCH_BYTES = 1024, 16_000_000


def read_parquet(file_range: FileRange, columns: WantedColumns, max_bytes: int) -> Iterator[Row]:
    """Read the row groups of a range."""
    import pyarrow.parquet

    path, start, stop = file_range.path, file_range.start, file_range.stop
    # With a buffer size, pyarrow reads pages on demand instead of all columns of a row group.
    with pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES) as table:
        require_columns(path, columns, table.schema_arrow.names)
        groups = range(start, table.num_row_groups if stop is None else stop)
        first_row = sum(table.metadata.row_group(group).num_rows for group in range(start))
        found = tuple(table.schema_arrow.names)
        wanted = [name for name in columns.names if name in found]
        batches = table.iter_batches(_batch_rows(table.metadata), row_groups=list(groups), columns=wanted)
        rows = _batch_to_rows(path, batches, columns.names, found, first_row, max(1, table.metadata.num_rows))
        yield from refuse_long_rows(rows, max_bytes)


def _batch_rows(metadata: Any) -> int:
    """Return the number of rows that hold about _BATCH_BYTES, from the row group with the longest rows."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(1, row_bytes))))


def read_arrow(file_range: FileRange, columns: WantedColumns, max_bytes: int) -> Iterator[Row]:
    """Read Arrow's stream format, which `datasets` writes, or its file format; one batch at a time."""
    import pyarrow

    path = file_range.path
    with pyarrow.memory_map(str(path)) as source:
        try:
            opened = pyarrow.ipc.open_stream(source)
            require_columns(path, columns, opened.schema.names)
            batches = iter(opened)
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(source)
            require_columns(path, columns, opened.schema.names)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        yield from refuse_long_rows(
            _batch_to_rows(path, batches, columns.names, tuple(opened.schema.names), 0, 0), max_bytes
        )


def _batch_to_rows(
    path: Path,
    batches: Iterable[Any],
    columns: tuple[str, ...],
    found: tuple[str, ...],
    first_row: int,
    row_count: int,
) -> Iterator[Row]:
    """Yield the rows of Arrow batches. A column that the file does not have gives None.

    row_count is the number of rows in the file. It is 0 where it is unknown: then positions stay at 0.
    """
    number, size = first_row, path.stat().st_size
    for batch in batches:
        arrays = [_to_python(batch.column(name)) if name in found else [None] * batch.num_rows for name in columns]
        for values in zip(*arrays, strict=True):
            number += 1
            where = f"{path} row {number}"
            position = size * number // row_count if row_count else 0
            yield Row(where, _require_valid_utf8(values, where), position, found)


def _to_python(array: Any) -> list[object]:
    """Return an Arrow array as Python values; a value that is not valid UTF-8 becomes its UnicodeDecodeError."""
    try:
        values = array.to_pylist()
    except UnicodeDecodeError:
        return [_value_or_error(scalar) for scalar in array]
    return list(map(without_null_fields, values)) if array.type.num_fields else values


def without_null_fields(value: object) -> object:
    """Return a value without the null fields of its structs.

    All structs of a column have the same fields. A null field is therefore one that the row did not have.
    """
    if isinstance(value, dict):
        return {key: without_null_fields(item) for key, item in value.items() if item is not None}
    return list(map(without_null_fields, value)) if isinstance(value, list) else value


def _value_or_error(scalar: Any) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _require_valid_utf8(values: tuple[object, ...], where: str) -> tuple[object, ...] | BadData:
    for value in values:
        if isinstance(value, UnicodeDecodeError):
            message = f"{where}: not valid UTF-8 ({value.reason})"
            return BadData.with_reason("invalid UTF-8", message, "write the file again with valid text")
    return values
