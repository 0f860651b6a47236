"""Reads the first rows of up to 50 data files before submission: are they valid, and which columns or keys are unread?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from longhaul.config.data_formats import known_format
from longhaul.config.dataset_config import Dataset
from longhaul.data.readers.conversations import keys_for_template
from longhaul.data.readers.read_documents import Document, no_documents, read_range
from longhaul.data.readers.rows_and_file_ranges import FileRange, text_bytes
from longhaul.planning import Plan

_MAX_FILES = 50
_MAX_ROWS, _MAX_BYTES = 100, 1_000_000
"""Limits for each file: number of rows, and bytes of the file or of content after which no further row is read."""
_MAX_LIST_BYTES = 16_000_000


class FirstRows(NamedTuple):
    """Content of the first rows.

    unread_columns: names of columns that nothing reads.
    template_keys:  "role.key" of message keys that only the chat template may read.
    """

    unread_columns: list[str]
    template_keys: list[str]
    rows_read: int
    files_read: int


def first_rows(plan: Plan, name: str) -> FirstRows:
    """Read the first rows of a dataset's own files; of 50 files, the first and the last included, if there are more.

    Raises:
        UserError: the dataset's bad_rows is stop, and a file holds no documents or one of these rows is a bad row.
    """
    dataset = plan.config.datasets[name]
    files = [Path(file) for file in plan.source_files(name)] if dataset.files else []
    if len(files) > _MAX_FILES:
        files = [files[number * (len(files) - 1) // (_MAX_FILES - 1)] for number in range(_MAX_FILES)]
    quick = [path for path in files if _is_quick(path, dataset)]
    columns, keys, rows_read = set[str](), set[str](), 0
    for path in quick:
        for document in _documents(path, dataset):
            rows_read += 1
            columns.update(document.unread)
            keys.update(_template_keys(document))
    return FirstRows(sorted(columns), sorted(keys), rows_read, len(quick))


def _template_keys(document: Document) -> Iterator[str]:
    for message in document.content if isinstance(document.content, list) else ():
        yield from (".".join((message["role"], *path)) for path in keys_for_template(message))


def _documents(path: Path, dataset: Dataset) -> Iterator[Document]:
    """Yield the first documents of a file, without bad rows.

    The bytes of content count, too: the position in an Arrow file is not known, and one in a compressed file is small.
    """
    content_bytes, row = 0, None
    for row in islice(read_range(FileRange(path, dataset.format), dataset), _MAX_ROWS):
        if isinstance(row, Document):
            yield row
            content_bytes += text_bytes(row.content)
        elif dataset.bad_rows == "stop":
            raise row.stopping()
        if max(row.position, content_bytes) > _MAX_BYTES:
            return
    if row is None and dataset.bad_rows == "stop":
        raise no_documents(str(path)).stopping()


def _is_quick(path: Path, dataset: Dataset) -> bool:
    """Return whether the first rows can be read without the rest. A text is one row, and a JSON list is parsed as a whole."""
    file_format = known_format(path) if dataset.format == "auto" else dataset.format
    return file_format != "text" and (file_format != "json" or path.stat().st_size <= _MAX_LIST_BYTES)
