"""Stores which documents of a split are filtered out, and converts positions for readers; filter_documents.py decides.

The table is a .npy file of int64 [3, X], for X filtered documents in order. Its rows, for each filtered document:
  0  documents before it that stay
  1  tokens before it that stay
  2  filtered tokens up to its end
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longhaul.artifacts.atomic_files import atomic_path
from longhaul.errors import UserError


def filter_table(lengths: np.ndarray, is_filtered: np.ndarray) -> np.ndarray:
    """Return the table [3, X] for documents of these lengths [D], where is_filtered [D] bool marks X documents."""
    numbers = np.flatnonzero(is_filtered)
    ends = np.cumsum(lengths, dtype=np.int64)[numbers]
    filtered_tokens = np.cumsum(lengths[numbers], dtype=np.int64)
    return np.stack([numbers - np.arange(len(numbers)), ends - filtered_tokens, filtered_tokens])


def write_filter_table(path: Path, table: np.ndarray) -> None:
    """Write a table atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, table)


class FilteredDocuments:
    """The table of a split, memory-mapped; without a path no document is filtered out."""

    def __init__(self, path: Path | None) -> None:
        try:
            table = np.load(path, mmap_mode="r") if path else np.empty((3, 0), np.int64)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}", "delete the dataset's manifest and run again") from None
        self._documents_before, self._tokens_before, self._filtered_tokens = table

    def __len__(self) -> int:
        return len(self._documents_before)

    @property
    def token_count(self) -> int:
        """Number of filtered tokens."""
        return int(self._filtered_tokens[-1]) if len(self) else 0

    def numbers(self) -> np.ndarray:
        """Return [X] int64: the numbers of the filtered documents among all documents."""
        return self._documents_before + np.arange(len(self))

    def number_in_shards(self, number: int) -> int:
        """Convert a document's number among those that stay to its number among all documents."""
        return number + int(np.searchsorted(self._documents_before, number, side="right"))

    def token_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Convert the range [start, stop) of tokens that stay to ranges of all tokens."""
        index = int(np.searchsorted(self._tokens_before, start, side="right"))
        while start < stop:
            end = min(stop, int(self._tokens_before[index])) if index < len(self) else stop
            filtered = int(self._filtered_tokens[index - 1]) if index else 0
            if start < end:
                yield start + filtered, end + filtered
            start, index = end, index + 1
