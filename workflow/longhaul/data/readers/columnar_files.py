"""Files that are read as columns, some rows at once: parquet and Arrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from longhaul.data.readers.rows import BUFFER_BYTES, BadData, Part, Row, require_columns, short_enough

_BATCH_ROWS, _BATCH_BYTES = 1024, 16_000_000


def parquet(part: Part, columns: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    """Of the part's row groups."""
    import pyarrow.parquet

    # Pages are read as they are needed, not a row group's whole columns.
    with pyarrow.parquet.ParquetFile(part.path, buffer_size=BUFFER_BYTES) as table:
        require_columns(part.path, columns, table.schema_arrow.names)
        groups = range(part.start, table.num_row_groups if part.stop is None else part.stop)
        first = sum(table.metadata.row_group(group).num_rows for group in range(part.start))
        batches = table.iter_batches(_rows_at_once(table.metadata), row_groups=list(groups), columns=list(columns))
        read = _batches(part.path, batches, columns, first, max(1, table.metadata.num_rows))
        yield from short_enough(read, max_bytes)


def _rows_at_once(metadata: Any) -> int:
    """So many that they hold some MB, going by the fullest row group."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(1, row_bytes))))


def arrow(part: Part, columns: tuple[str, ...], max_bytes: int) -> Iterator[Row]:
    """Arrow's stream format, which `datasets` writes, or its file format; one batch at a time."""
    import pyarrow

    with pyarrow.memory_map(str(part.path)) as source:
        try:
            opened = pyarrow.ipc.open_stream(source)
            require_columns(part.path, columns, opened.schema.names)
            batches = iter(opened)
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(source)
            require_columns(part.path, columns, opened.schema.names)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        yield from short_enough(_batches(part.path, batches, columns, 0, 0), max_bytes)


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
