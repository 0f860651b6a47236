"""Packs whole conversations into sequences (best fit decreasing, blocks of 65,536), and writes the memory-mapped pack file.

Documents are shuffled with a seed and divided into blocks of 65,536. Each block is packed alone, from the lengths of its
documents, with best fit decreasing. Memory therefore depends on the block size only, and blocks can be packed in any
order.
The file contains only little-endian uint32: the numbers of the D packed documents in pack order, then for each of the
P <= D packs the position in this order where it ends. It takes at most 8 bytes per document.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from longhaul.artifacts.atomic_files import atomic_path
from longhaul.data.sampling.permutation import permutation
from longhaul.errors import UserError

BLOCK_DOCUMENTS = 65_536
_PACKING_EPOCH = -1  # the permutation's "epoch" for packing; training epochs start at 0


class PackFile:
    """The packs of a split: lists of documents that share a sequence."""

    def __init__(self, path: Path, document_count: int) -> None:
        """Map a file that `write_pack_file` wrote; UserError when it has another number of documents."""
        numbers = np.memmap(path, dtype="<u4", mode="r")
        if len(numbers) <= document_count or int(numbers[-1]) != document_count:
            raise UserError(f"{path} is not a pack file of {document_count} documents", "delete it and run again")
        self._documents, self._ends = numbers[:document_count], numbers[document_count:]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return [K] uint32: the documents of pack `index`, in order."""
        start = int(self._ends[index - 1]) if index else 0
        return self._documents[start : int(self._ends[index])]


def write_pack_file(
    lengths: np.ndarray, capacity: int, seed: int, path: Path, numbers: np.ndarray | None = None
) -> None:
    """Pack documents of these lengths [D] into packs of `capacity` tokens, and write the file atomically.

    Longer documents count as `capacity` tokens. numbers [D]: the documents' numbers in their split; None for 0 to D - 1.
    """
    blocks = [pack_block(lengths, capacity, seed, first) for first in range(0, len(lengths), BLOCK_DOCUMENTS)]
    documents = [documents if numbers is None else numbers[documents] for documents, _ in blocks]
    ends = np.cumsum(np.concatenate([np.empty(0, np.int64), *(sizes for _, sizes in blocks)]))
    with atomic_path(path) as temporary:
        np.concatenate([*documents, ends]).astype("<u4").tofile(temporary)


def pack_block(lengths: np.ndarray, capacity: int, seed: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack the block that starts at position `first` of the shuffled documents.

    Return its documents in pack order, and the number of documents of each pack [P].
    """
    positions = np.arange(first, min(first + BLOCK_DOCUMENTS, len(lengths)))
    order = permutation(seed, _PACKING_EPOCH, positions, len(lengths))
    sizes = np.minimum(lengths[order], capacity)
    longest_first = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(order), dtype=np.int64)
    bins[longest_first] = best_fit(sizes[longest_first].tolist(), capacity)
    return order[np.argsort(bins, kind="stable")], np.bincount(bins)


def best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Return the bin of each item: the bin with the least free space that is enough, the latest one among equals.

    Bins are kept in stacks by their free space. A binary tree over the stacks finds the smallest sufficient free space in
    O(log capacity).
    """
    leaves = 1 << capacity.bit_length()
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    is_filled = [False] * (2 * leaves)
    bins, count = [], 0
    for length in lengths:
        free = _smallest_filled_leaf(is_filled, leaves, length) if length else capacity
        if free > capacity or not stacks[free]:
            chosen, free, count = count, capacity, count + 1
        else:
            chosen = stacks[free].pop()
            _set_leaf(is_filled, leaves + free, bool(stacks[free]))
        bins.append(chosen)
        stacks[free - length].append(chosen)
        _set_leaf(is_filled, leaves + free - length, True)
    return bins


def _smallest_filled_leaf(is_filled: list[bool], leaves: int, minimum: int) -> int:
    """Return the smallest filled leaf >= minimum, or `leaves` if there is none."""
    node = leaves + minimum
    while not is_filled[node]:
        while node & 1:  # a right child: go up until there is a node to the right
            node >>= 1
            if node <= 1:
                return leaves
        node += 1
        if node & (node - 1) == 0:
            return leaves
    while node < leaves:
        node = 2 * node if is_filled[2 * node] else 2 * node + 1
    return node - leaves


def _set_leaf(is_filled: list[bool], node: int, value: bool) -> None:
    """Set a leaf, and update its ancestors: an ancestor is set where a leaf below it is set."""
    is_filled[node] = value
    while node > 1:
        node >>= 1
        value = is_filled[2 * node] or is_filled[2 * node + 1]
        if is_filled[node] == value:
            return
        is_filled[node] = value
