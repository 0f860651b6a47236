"""Token shards in Megatron-LM's IndexedDataset format, version 1 (megatron/core/datasets/indexed_dataset.py).

<prefix>.bin   the tokens of all documents, one after another, uint16 or int32
<prefix>.idx   "MMIDIDX\\0\\0", version <Q, dtype code <B, sequence count <Q, document count + 1 <Q,
               int32 lengths, int64 byte offsets into .bin, int64 document boundaries (in sequences)
<prefix>.mask  longhaul's own, chats only: one uint8 a token, 1 = in the loss

One sequence is one document. Checksums are taken while writing.
"""

from __future__ import annotations

import functools
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longhaul.errors import UserError

MAX_SHARD_BYTES = 256_000_000
_WRITTEN_OUT_BYTES = 4_000_000
_MOST_OPEN_SHARDS = 4096
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES = {"int32": 4, "uint16": 8}


def token_dtype(vocab_size: int) -> str:
    """The smallest type Megatron uses for a vocabulary of this size; UserError for one that none of them holds."""
    if vocab_size > 2**31:
        raise UserError(
            f"the tokenizer's ids reach {vocab_size - 1}; shards hold ids up to {2**31 - 1} (int32, Megatron's largest type)",
            "give the tokenizer's added tokens smaller ids",
        )
    return "uint16" if vocab_size < 65500 else "int32"


class _HashedFile:
    """A new file whose SHA-256 is known when it is closed; closing also brings it to the disk."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self._bytes = self._told = 0

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._stream.write(rest) :]
        self._hash.update(data)
        self._bytes += len(data)
        if self._bytes - self._told >= _WRITTEN_OUT_BYTES:
            # Linux begins to write such pages out: closing has less to wait for.
            os.posix_fadvise(self._stream.fileno(), self._told, self._bytes - self._told, os.POSIX_FADV_DONTNEED)
            self._told = self._bytes

    def close(self) -> str:
        os.fsync(self._stream.fileno())
        self._stream.close()
        return self._hash.hexdigest()


class ShardWriter:
    """Writes one shard document by document."""

    def __init__(self, prefix: Path, dtype: str, with_mask: bool) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._files = {"bin": _HashedFile(prefix.with_suffix(".bin"))}
        if with_mask:
            self._files["mask"] = _HashedFile(prefix.with_suffix(".mask"))
        self._lengths: list[np.ndarray] = []
        self.tokens = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None) -> None:
        """Appends documents: tokens [sum(lengths)], lengths [D], mask [sum(lengths)] uint8 for chats."""
        self._files["bin"].write(np.ascontiguousarray(tokens, dtype=self._dtype).data.cast("B"))
        if mask is not None:
            self._files["mask"].write(np.ascontiguousarray(mask, dtype=np.uint8).data)
        self._lengths.append(lengths.astype(np.int32))
        self.tokens += len(tokens)

    def close(self) -> dict[str, Any]:
        """Writes the index; returns the shard's entry of the data manifest."""
        lengths = np.concatenate(self._lengths)
        self._files["idx"] = _HashedFile(self._prefix.with_suffix(".idx"))
        self._files["idx"].write(_index_bytes(lengths, self._dtype))
        return {
            "prefix": self._prefix.name,
            "tokens": self.tokens,
            "documents": len(lengths),
            "sha256": {ending: file.close() for ending, file in self._files.items()},
        }


def _index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    offsets = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    boundaries = np.arange(len(lengths) + 1, dtype=np.int64)
    header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[dtype.name], len(lengths), len(boundaries))
    return header + lengths.tobytes() + (offsets * dtype.itemsize).tobytes() + boundaries.tobytes()


class SplitWriter:
    """Writes one split as shards <split>-00000, <split>-00001, … cut between documents.

    A shard is closed before it would pass `max_bytes` of tokens; a document longer than that gets its own.
    """

    def __init__(self, folder: Path, split: str, dtype: str, with_mask: bool, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder, self._split, self._dtype, self._with_mask = folder, split, dtype, with_mask
        self._max_tokens = max_bytes // np.dtype(dtype).itemsize
        self._shards: list[dict[str, Any]] = []
        self._open: ShardWriter | None = None
        self._loss_tokens = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None) -> None:
        """Appends documents (shapes as in ShardWriter.add), starting new shards where needed."""
        self._loss_tokens += len(tokens) if mask is None else int(mask.sum())
        ends = np.cumsum(lengths, dtype=np.int64)
        document = token = 0
        while document < len(lengths):
            shard = self._open or self._start()
            room = self._max_tokens - shard.tokens
            fits = int(np.searchsorted(ends, token + room, side="right"))
            if fits <= document and shard.tokens:
                self._finish()
                continue
            last = max(fits, document + 1)
            end = int(ends[last - 1])
            shard.add(tokens[token:end], lengths[document:last], None if mask is None else mask[token:end])
            document, token = last, end

    def close(self) -> dict[str, Any]:
        """Finishes the last shard; returns the split's entry of the data manifest."""
        if self._open:
            self._finish()
        return {
            "shards": self._shards,
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "documents": sum(shard["documents"] for shard in self._shards),
            "loss_tokens": self._loss_tokens,
        }

    def _start(self) -> ShardWriter:
        prefix = self._folder / f"{self._split}-{len(self._shards):05d}"
        self._open = ShardWriter(prefix, self._dtype, self._with_mask)
        return self._open

    def _finish(self) -> None:
        assert self._open is not None
        self._shards.append(self._open.close())
        self._open = None


class ShardReader:
    """A shard, memory-mapped: `tokens` [N], `lengths` [D] int32, `offsets` [D] int64 in bytes, `mask` [N] or None.

    Raises UserError when a file is missing, has another format, or is shorter or longer than its index says.
    """

    def __init__(self, prefix: Path, with_mask: bool) -> None:
        index = _map(prefix.with_suffix(".idx"), np.uint8)
        dtype, count = _read_header(prefix.with_suffix(".idx"), index)
        self.lengths = np.frombuffer(index, np.int32, count, _HEADER.size)
        self.offsets = np.frombuffer(index, np.int64, count, _HEADER.size + self.lengths.nbytes)
        self.tokens = _map(prefix.with_suffix(".bin"), dtype)
        self.mask = _map(prefix.with_suffix(".mask"), np.uint8) if with_mask else None
        expected = int(self.lengths.sum(dtype=np.int64))
        for ending, array in (("bin", self.tokens), ("mask", self.mask)):
            if array is not None and len(array) != expected:
                raise _damaged(prefix.with_suffix(f".{ending}"), f"{len(array)} tokens, its index says {expected}")


class SplitReader:
    """The shards of one split as one stream of tokens and one list of documents.

    Nothing but the manifest's own counts is held: a shard is mapped when it is first read, and the one that was read
    longest ago is let go (a process may map some 65,000 files). Raises UserError as ShardReader does.
    """

    def __init__(self, folder: Path, entry: dict[str, Any], with_mask: bool) -> None:
        self._folder, self._with_mask = folder, with_mask
        self._prefixes = [shard["prefix"] for shard in entry["shards"]]
        self._token_ends = np.cumsum([shard["tokens"] for shard in entry["shards"]], dtype=np.int64)
        self._document_ends = np.cumsum([shard["documents"] for shard in entry["shards"]], dtype=np.int64)
        self._shard = functools.lru_cache(_MOST_OPEN_SHARDS)(self._open)
        self._dropped = Dropped(folder / entry["dropped"] if entry.get("dropped") else None)

    def _open(self, index: int) -> ShardReader:
        return ShardReader(self._folder / self._prefixes[index], self._with_mask)

    @property
    def token_count(self) -> int:
        """Tokens of all shards, without what is passed over."""
        return int(self._token_ends[-1]) - self._dropped.token_count if self._prefixes else 0

    @property
    def document_count(self) -> int:
        """Documents of all shards, without those passed over."""
        return int(self._document_ends[-1]) - len(self._dropped) if self._prefixes else 0

    def lengths(self) -> np.ndarray:
        """[D] int32: tokens of each document."""
        shards = map(self._shard, range(len(self._prefixes)))
        return np.delete(
            np.concatenate([np.empty(0, np.int32), *(shard.lengths for shard in shards)]), self._dropped.numbers()
        )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] int64: tokens of the stream, across shards and what is passed over."""
        found = np.empty(stop - start, dtype=np.int64)
        self.read(start, found)
        return found

    def read(self, start: int, into: np.ndarray) -> None:
        """As `tokens`, written over `into` [any length]."""
        filled = 0
        for shard, place in self._pieces(start, start + len(into)):
            piece = shard.tokens[place]
            into[filled : filled + len(piece)] = piece
            filled += len(piece)

    def loss_tokens(self, start: int, stop: int) -> np.ndarray:
        """[at most stop - start]: as `tokens`, those that are in the loss. Read from the files: a mapped page that is
        touched once stays in the memory of the process, and its neighbours with it.
        """
        pieces = [np.empty(0, np.uint16)]
        for shard, place in self._pieces(start, stop):
            tokens = _read(shard.tokens, place)
            pieces.append(tokens if shard.mask is None else tokens[_read(shard.mask, place) == 1])
        return np.concatenate(pieces)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[ShardReader, slice]]:
        """Shards, and the places of their tokens."""
        for first, last in self._dropped.stretches(start, stop):
            place = first
            index = int(np.searchsorted(self._token_ends, place, side="right"))
            while place < last:
                end, shard = int(self._token_ends[index]), self._shard(index)
                first_token = len(shard.tokens) - (end - place)
                yield shard, slice(first_token, first_token + min(last, end) - place)
                place, index = min(last, end), index + 1

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [T] and loss mask [T] of one document; all ones where the shards have no mask."""
        number = self._dropped.place(number)
        index = int(np.searchsorted(self._document_ends, number, side="right"))
        shard = self._shard(index)
        local = number - int(self._document_ends[index]) + len(shard.lengths)
        start = int(shard.offsets[local]) // shard.tokens.itemsize
        place = slice(start, start + int(shard.lengths[local]))
        tokens = shard.tokens[place]
        return tokens, np.ones(len(tokens), np.uint8) if shard.mask is None else shard.mask[place]


class Dropped:
    """The documents of a split that are passed over, from a file that longhaul.data.filters.drop_documents wrote, memory-mapped.

    Its columns [X] int64: documents that stay before each one, tokens that stay before it, tokens dropped up to its end.
    """

    def __init__(self, path: Path | None) -> None:
        try:
            table = np.load(path, mmap_mode="r") if path else np.empty((3, 0), np.int64)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}", "delete the dataset's manifest and run again") from None
        self._documents, self._tokens, self._gone = table

    def __len__(self) -> int:
        return len(self._documents)

    @property
    def token_count(self) -> int:
        """Tokens passed over."""
        return int(self._gone[-1]) if len(self) else 0

    def numbers(self) -> np.ndarray:
        """[X] int64: the documents' numbers among all."""
        return self._documents + np.arange(len(self))

    def place(self, number: int) -> int:
        """The number among all documents of one that stays."""
        return number + int(np.searchsorted(self._documents, number, side="right"))

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Tokens [start, stop) of those that stay -> stretches among all tokens."""
        index = int(np.searchsorted(self._tokens, start, side="right"))
        while start < stop:
            end = min(stop, int(self._tokens[index])) if index < len(self) else stop
            gone = int(self._gone[index - 1]) if index else 0
            if start < end:
                yield start + gone, end + gone
            start, index = end, index + 1


def _read_header(path: Path, index: np.ndarray) -> tuple[str, int]:
    if len(index) < _HEADER.size:
        raise _damaged(path, "too short")
    magic, version, code, count, boundaries = _HEADER.unpack(index[: _HEADER.size].tobytes())
    names = {number: name for name, number in _DTYPE_CODES.items()}
    if magic != _MAGIC or version != 1 or code not in names:
        raise _damaged(path, "not a Megatron index, version 1, of uint16 or int32 tokens")
    if len(index) != _HEADER.size + 12 * count + 8 * boundaries:
        raise _damaged(path, f"{len(index)} bytes do not fit {count} documents")
    return names[code], count


def _read(mapped: np.memmap, place: slice) -> np.ndarray:
    count, offset = place.stop - place.start, place.start * mapped.itemsize
    return np.fromfile(str(mapped.filename), mapped.dtype, count, offset=offset)


def _map(path: Path, dtype: Any) -> np.memmap:
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"token shard {path}: {reason}", "delete its folder and run again: the shards are made anew")
