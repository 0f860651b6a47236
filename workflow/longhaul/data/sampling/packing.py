"""Whole conversations packed into sequences, kept in a memory-mapped file.

Documents are put in a seeded order and cut into blocks of 65,536; each block is packed on its own, from its own lengths
alone: best fit, the longest first. So memory is a block's, and blocks can be packed by anyone, in any order.
The file holds little-endian uint32 and nothing else: the D document numbers in pack order, then for each of the P <= D
packs the place where it ends in that order: at most 8 bytes a document.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from longhaul.artifacts.files import atomic_path
from longhaul.data.sampling.permutation import permutation
from longhaul.errors import UserError

BLOCK_DOCUMENTS = 65_536
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
    blocks = [pack_block(lengths, capacity, seed, first) for first in range(0, len(lengths), BLOCK_DOCUMENTS)]
    documents = [documents for documents, _ in blocks]
    ends = np.cumsum(np.concatenate([sizes for _, sizes in blocks]))
    with atomic_path(path) as temporary:
        np.concatenate([*documents, ends]).astype("<u4").tofile(temporary)


def pack_block(lengths: np.ndarray, capacity: int, seed: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """The block that begins at place `first` of the order: its documents in pack order, and documents a pack [P]."""
    places = np.arange(first, min(first + BLOCK_DOCUMENTS, len(lengths)))
    order = permutation(seed, _ORDER, places, len(lengths))
    sizes = np.minimum(lengths[order], capacity)
    longest_first = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(order), dtype=np.int64)
    bins[longest_first] = best_fit(sizes[longest_first].tolist(), capacity)
    return order[np.argsort(bins, kind="stable")], np.bincount(bins)


def best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The bin of each item: of those with room, the one that it fills best, the latest among equals.

    Bins lie in stacks by the room they have; a tree over rooms finds the smallest that is enough in O(log capacity).
    """
    leaves = 1 << capacity.bit_length()
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    is_filled = [False] * (2 * leaves)
    bins, count = [], 0
    for length in lengths:
        room = _smallest_from(is_filled, leaves, length) if length else capacity
        if room > capacity or not stacks[room]:
            chosen, room, count = count, capacity, count + 1
        else:
            chosen = stacks[room].pop()
            _mark(is_filled, leaves + room, bool(stacks[room]))
        bins.append(chosen)
        stacks[room - length].append(chosen)
        _mark(is_filled, leaves + room - length, True)
    return bins


def _smallest_from(is_filled: list[bool], leaves: int, room: int) -> int:
    """The smallest leaf >= room that is filled; `leaves` when there is none."""
    node = leaves + room
    while not is_filled[node]:
        while node & 1:  # the right child: go up until there is something to the right
            node >>= 1
            if node <= 1:
                return leaves
        node += 1
        if node & (node - 1) == 0:
            return leaves
    while node < leaves:
        node = 2 * node if is_filled[2 * node] else 2 * node + 1
    return node - leaves


def _mark(is_filled: list[bool], node: int, value: bool) -> None:
    """Sets a leaf, and above it whether anything below is set."""
    is_filled[node] = value
    while node > 1:
        node >>= 1
        value = is_filled[2 * node] or is_filled[2 * node + 1]
        if is_filled[node] == value:
            return
        is_filled[node] = value
