"""Reads the first row of up to 50 data files before submission: is it valid, and which columns or keys are unread?"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from longhaul.config.data_formats import known_format
from longhaul.config.dataset_config import Dataset
from longhaul.data.readers.conversations import KNOWN_KEYS
from longhaul.data.readers.read_documents import Document, read_range
from longhaul.data.readers.rows_and_file_ranges import FileRange
from longhaul.planning import Plan

_MAX_FILES = 50
_MAX_LIST_BYTES = 16_000_000


class FirstRows(NamedTuple):
    """Content of the first rows.

    unread_columns: names of columns that nothing reads.
    template_keys:  "role.key" of message keys that only the chat template may read.
    """

    unread_columns: list[str]
    template_keys: list[str]


def first_rows(plan: Plan, name: str) -> FirstRows:
    """Read the first row of each of a dataset's own files; of 50 files, the first and the last included, if there are more.

    Raises:
        UserError: a first row is a bad row, and the dataset's bad_rows is stop.
    """
    dataset = plan.config.datasets[name]
    files = [Path(file) for file in plan.source_files(name)] if dataset.files else []
    if len(files) > _MAX_FILES:
        files = [files[number * (len(files) - 1) // (_MAX_FILES - 1)] for number in range(_MAX_FILES)]
    columns, keys = set[str](), set[str]()
    for path in files:
        if not _is_quick(path, dataset):
            continue
        row = next(read_range(FileRange(path, dataset.format), dataset), None)
        if isinstance(row, Document):
            columns.update(row.unread)
            if isinstance(row.content, list):
                keys.update(
                    f"{message['role']}.{key}" for message in row.content for key in message.keys() - KNOWN_KEYS
                )
        elif row is not None and dataset.bad_rows == "stop":
            raise row.stopping()
    return FirstRows(sorted(columns), sorted(keys))


def _is_quick(path: Path, dataset: Dataset) -> bool:
    """Return whether the first row can be read without the rest. A text is one row, and a JSON list is parsed as a whole."""
    file_format = known_format(path) if dataset.format == "auto" else dataset.format
    return file_format != "text" and (file_format != "json" or path.stat().st_size <= _MAX_LIST_BYTES)
