"""Whole conversations packed into sequences, first fit over a seeded order, kept in a memory-mapped file.

The file holds little-endian uint32 and nothing else: the D document numbers in pack order, then for each of the P <= D
packs the place where it ends in that order: at most 8 bytes a document.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from longhaul.artifacts import atomic_path
from longhaul.data.permutation import permutation
from longhaul.errors import UserError

_ORDER = -1  # the permutation's "epoch" for packing; training epochs start at 0


class Packs:
    """Which documents share a sequence."""

    def __init__(self, path: Path, document_count: int) -> None:
        """Maps a file that `make_packs` wrote; UserError when it is not of this many documents."""
        numbers = np.memmap(path, dtype="<u4", mode="r")
        if len(numbers) <= document_count or int(numbers[-1]) != document_count:
            raise UserError(f"{path} is not a pack file of {document_count} documents", "delete it and run again")
        self._documents, self._ends = numbers[:document_count], numbers[document_count:]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> np.ndarray:
        """[K] uint32: the documents of pack `index`, in order."""
        start = int(self._ends[index - 1]) if index else 0
        return self._documents[start : int(self._ends[index])]


def make_packs(lengths: np.ndarray, capacity: int, seed: int, path: Path) -> None:
    """Packs documents of these lengths [D] (longer ones count as `capacity`) and writes the file whole or not at all."""
    order = permutation(seed, _ORDER, np.arange(len(lengths)), len(lengths))
    bins = np.array(first_fit(np.minimum(lengths[order], capacity).tolist(), capacity), dtype=np.int64)
    documents = order[np.argsort(bins, kind="stable")]
    ends = np.cumsum(np.bincount(bins))
    with atomic_path(path) as temporary:
        np.concatenate([documents, ends]).astype("<u4").tofile(temporary)


def first_fit(lengths: list[int], capacity: int) -> list[int]:
    """The bin of each item: the first one that still has room. O(n log n), by a tree of the largest room below each node."""
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)
    bins = []
    for length in lengths:
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        bins.append(node - leaves)
        room[node] -= length
        while node > 1:
            node //= 2
            largest = max(room[2 * node], room[2 * node + 1])
            if room[node] == largest:
                break
            room[node] = largest
    return bins
