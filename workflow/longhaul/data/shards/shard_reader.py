"""Reads token shards, memory-mapped, as one stream of tokens and one list of documents, without filtered ones."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from longhaul.artifacts.artifact_schemas import Split
from longhaul.data.shards.filtered_out_table import FilteredDocuments
from longhaul.data.shards.indexed_dataset import damaged_shard, parse_index

_MAX_MAPPED_SHARDS = 4096  # a Linux process may map some 65,000 files (vm.max_map_count)


class ShardReader:
    """A memory-mapped shard of D documents with N tokens.

    Attributes: `tokens` [N], `lengths` [D] int32, `offsets` [D] int64 in bytes, `mask` [N] uint8 or None.

    Raises:
        UserError: a file is missing, has another format, or its size does not match the index.
    """

    def __init__(self, prefix: Path, with_mask: bool) -> None:
        path = prefix.with_suffix(".idx")
        dtype, self.lengths, self.offsets = parse_index(path, _memory_map(path, np.uint8))
        self.tokens = _memory_map(prefix.with_suffix(".bin"), dtype)
        self.mask = _memory_map(prefix.with_suffix(".mask"), np.uint8) if with_mask else None
        expected = int(self.lengths.sum(dtype=np.int64))
        for suffix, array in (("bin", self.tokens), ("mask", self.mask)):
            if array is not None and len(array) != expected:
                message = f"{len(array)} tokens, but its index has {expected}"
                raise damaged_shard(prefix.with_suffix(f".{suffix}"), message)


class SplitReader:
    """The shards of one split, without filtered documents.

    Attributes: `loss_token_count`, the loss tokens of the split.

    Only the counts of the manifest are kept in memory. A shard is mapped when it is first read; the least recently used
    shard is unmapped when too many are mapped. Raises UserError like ShardReader.
    """

    def __init__(self, folder: Path, entry: Split, with_mask: bool) -> None:
        self._folder, self._with_mask = folder, with_mask
        self._prefixes = [shard["prefix"] for shard in entry["shards"]]
        self._token_ends = np.cumsum([shard["tokens"] for shard in entry["shards"]], dtype=np.int64)
        self._document_ends = np.cumsum([shard["documents"] for shard in entry["shards"]], dtype=np.int64)
        self._shard = functools.lru_cache(_MAX_MAPPED_SHARDS)(self._open_shard)
        self.loss_token_count = entry["loss_tokens"]
        filtered_out = entry.get("filtered_out")
        self._filtered = FilteredDocuments(folder / filtered_out if filtered_out else None)

    def _open_shard(self, index: int) -> ShardReader:
        """Map a shard; UserError if it has other counts than the manifest, by which documents and tokens are found."""
        prefix = self._folder / self._prefixes[index]
        shard = ShardReader(prefix, self._with_mask)
        for name, ends, found in (
            ("documents", self._document_ends, len(shard.lengths)),
            ("tokens", self._token_ends, len(shard.tokens)),
        ):
            stated = int(ends[index]) - (int(ends[index - 1]) if index else 0)
            if found != stated:
                raise damaged_shard(prefix.with_suffix(".idx"), f"{found} {name}, but the manifest states {stated}")
        return shard

    @property
    def token_count(self) -> int:
        """Tokens of all shards, without filtered documents."""
        return int(self._token_ends[-1]) - self._filtered.token_count if self._prefixes else 0

    @property
    def document_count(self) -> int:
        """Documents of all shards, without filtered ones."""
        return int(self._document_ends[-1]) - len(self._filtered) if self._prefixes else 0

    def lengths(self) -> np.ndarray:
        """Return [D] int32: tokens of each document."""
        shards = map(self._shard, range(len(self._prefixes)))
        lengths = np.concatenate([np.empty(0, np.int32), *(shard.lengths for shard in shards)])
        return np.delete(lengths, self._filtered.numbers())

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return [stop - start] int64: tokens of the stream, across shards, without filtered documents."""
        tokens = np.empty(stop - start, dtype=np.int64)
        self.read_into(tokens, start)
        return tokens

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Write the tokens of the stream from `start` to `out` [any length]."""
        filled = 0
        for shard, positions in self._locate(start, start + len(out)):
            tokens = shard.tokens[positions]
            out[filled : filled + len(tokens)] = tokens
            filled += len(tokens)

    def loss_tokens(self, start: int, stop: int) -> np.ndarray:
        """Return [at most stop - start]: the tokens of the range [start, stop) that count in the loss.

        Reads the files instead of the maps: a mapped page that is read once, and pages near it, stay in the process's
        resident memory.
        """
        tokens = [np.empty(0, np.uint16)]
        for shard, positions in self._locate(start, stop):
            of_shard = _read_file(shard.tokens, positions)
            tokens.append(of_shard if shard.mask is None else of_shard[_read_file(shard.mask, positions) == 1])
        return np.concatenate(tokens)

    def _locate(self, start: int, stop: int) -> Iterator[tuple[ShardReader, slice]]:
        """Yield the shards that hold tokens [start, stop) of the stream, and the tokens' positions in each."""
        for first, last in self._filtered.token_ranges(start, stop):
            position = first
            index = int(np.searchsorted(self._token_ends, position, side="right"))
            while position < last:
                end, shard = int(self._token_ends[index]), self._shard(index)
                first_token = len(shard.tokens) - (end - position)
                yield shard, slice(first_token, first_token + min(last, end) - position)
                position, index = min(last, end), index + 1

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens [T] and the loss mask [T] of one document; the mask is all ones where shards have none."""
        number = self._filtered.number_in_shards(number)
        index = int(np.searchsorted(self._document_ends, number, side="right"))
        shard = self._shard(index)
        local = number - int(self._document_ends[index]) + len(shard.lengths)
        start = int(shard.offsets[local]) // shard.tokens.itemsize
        positions = slice(start, start + int(shard.lengths[local]))
        tokens = shard.tokens[positions]
        return tokens, np.ones(len(tokens), np.uint8) if shard.mask is None else shard.mask[positions]


def _read_file(mapped: np.memmap, positions: slice) -> np.ndarray:
    count, offset = positions.stop - positions.start, positions.start * mapped.itemsize
    return np.fromfile(str(mapped.filename), mapped.dtype, count, offset=offset)


def _memory_map(path: Path, dtype: DTypeLike) -> np.memmap:
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise damaged_shard(path, str(error)) from None
