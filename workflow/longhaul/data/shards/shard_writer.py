"""Writes token shards with their SHA-256; a new shard begins after 256 MB."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from longhaul.artifacts.artifact_schemas import Shard, Split
from longhaul.data.shards.indexed_dataset import build_index

MAX_SHARD_BYTES = 256_000_000
_FLUSH_BYTES = 4_000_000


class _ShardFile:
    """A new file that is hashed while it is written. Closing syncs it to disk and returns its SHA-256."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self._bytes = self._flushed_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._stream.write(rest) :]
        self._hash.update(data)
        self._bytes += len(data)
        if self._bytes - self._flushed_bytes >= _FLUSH_BYTES:
            # This makes Linux start to write these pages to disk, so that fsync in close() waits less.
            length = self._bytes - self._flushed_bytes
            os.posix_fadvise(self._stream.fileno(), self._flushed_bytes, length, os.POSIX_FADV_DONTNEED)
            self._flushed_bytes = self._bytes

    def close(self) -> str:
        os.fsync(self._stream.fileno())
        self._stream.close()
        return self._hash.hexdigest()


class ShardWriter:
    """Writes one shard."""

    def __init__(self, prefix: Path, dtype: str, with_mask: bool) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._files = {"bin": _ShardFile(prefix.with_suffix(".bin"))}
        if with_mask:
            self._files["mask"] = _ShardFile(prefix.with_suffix(".mask"))
        self._lengths: list[np.ndarray] = []
        self.tokens = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None) -> None:
        """Append documents: tokens [sum(lengths)], lengths [D], mask [sum(lengths)] uint8 for chats."""
        self._files["bin"].write(np.ascontiguousarray(tokens, dtype=self._dtype).data.cast("B"))
        if mask is not None:
            self._files["mask"].write(np.ascontiguousarray(mask, dtype=np.uint8).data)
        self._lengths.append(lengths.astype(np.int32))
        self.tokens += len(tokens)

    def close(self) -> Shard:
        """Write the index; return the shard's entry of the data manifest."""
        lengths = np.concatenate(self._lengths)
        self._files["idx"] = _ShardFile(self._prefix.with_suffix(".idx"))
        self._files["idx"].write(build_index(lengths, self._dtype))
        return {
            "prefix": self._prefix.name,
            "tokens": self.tokens,
            "documents": len(lengths),
            "sha256": {suffix: file.close() for suffix, file in self._files.items()},
        }


class SplitWriter:
    """Writes one split as shards <split>-00000, <split>-00001, …; no document is in two shards.

    A shard is closed before its tokens would exceed `max_bytes`. A longer document gets a shard of its own.
    """

    def __init__(self, folder: Path, split: str, dtype: str, with_mask: bool, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder, self._split, self._dtype, self._with_mask = folder, split, dtype, with_mask
        self._max_tokens = max_bytes // np.dtype(dtype).itemsize
        self._shards: list[Shard] = []
        self._open: ShardWriter | None = None
        self._loss_tokens = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None) -> None:
        """Append documents (shapes as in ShardWriter.add), and start new shards where needed."""
        self._loss_tokens += len(tokens) if mask is None else int(mask.sum())
        ends = np.cumsum(lengths, dtype=np.int64)
        document = token = 0
        while document < len(lengths):
            shard = self._open or self._start_shard()
            free_tokens = self._max_tokens - shard.tokens
            fits = int(np.searchsorted(ends, token + free_tokens, side="right"))
            if fits <= document and shard.tokens:
                self._finish_shard()
                continue
            last = max(fits, document + 1)
            end = int(ends[last - 1])
            shard.add(tokens[token:end], lengths[document:last], None if mask is None else mask[token:end])
            document, token = last, end

    def close(self) -> Split:
        """Finish the last shard; return the split's entry of the data manifest."""
        if self._open:
            self._finish_shard()
        return {
            "shards": self._shards,
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "documents": sum(shard["documents"] for shard in self._shards),
            "loss_tokens": self._loss_tokens,
        }

    def _start_shard(self) -> ShardWriter:
        prefix = self._folder / f"{self._split}-{len(self._shards):05d}"
        self._open = ShardWriter(prefix, self._dtype, self._with_mask)
        return self._open

    def _finish_shard(self) -> None:
        assert self._open is not None
        self._shards.append(self._open.close())
        self._open = None
