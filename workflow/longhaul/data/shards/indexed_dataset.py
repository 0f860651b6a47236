"""Format of token shards: bytes of Megatron's .bin and .idx files and of longhaul's .mask; token dtype by vocabulary size.

<prefix>.bin   the tokens of all documents, one document after another, uint16 or int32
<prefix>.idx   "MMIDIDX\\0\\0", version <Q, dtype code <B, sequence count <Q, document count + 1 <Q,
               int32 lengths, int64 byte offsets into .bin, int64 document boundaries (in sequences)
<prefix>.mask  longhaul's addition, for chats only: one uint8 per token, 1 = counts in the loss

One sequence is one document.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from longhaul.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES = {"int32": 4, "uint16": 8}


def token_dtype(vocab_size: int) -> str:
    """Return the type that Megatron-LM uses for a vocabulary of this size; UserError where int32 is too small."""
    if vocab_size > 2**31:
        raise UserError(
            f"the tokenizer's ids reach {vocab_size - 1}; shards hold ids up to {2**31 - 1} (int32, Megatron's largest type)",
            "give the tokenizer's added tokens smaller ids",
        )
    return "uint16" if vocab_size < 65500 else "int32"


def build_index(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """Return the content of the .idx file for documents of these lengths [D] int32."""
    offsets = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    boundaries = np.arange(len(lengths) + 1, dtype=np.int64)
    header = _HEADER.pack(_MAGIC, _VERSION, _DTYPE_CODES[dtype.name], len(lengths), len(boundaries))
    return header + lengths.tobytes() + (offsets * dtype.itemsize).tobytes() + boundaries.tobytes()


def parse_index(path: Path, index: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the token type, the lengths [D] int32 and the byte offsets [D] int64 of an .idx file's bytes [any] uint8.

    Raises:
        UserError: the file is damaged or has another format; the message names `path`.
    """
    if len(index) < _HEADER.size:
        raise damaged_shard(path, "too short")
    magic, version, code, count, boundaries = _HEADER.unpack(index[: _HEADER.size].tobytes())
    names = {number: name for name, number in _DTYPE_CODES.items()}
    if magic != _MAGIC or version != _VERSION or code not in names:
        raise damaged_shard(path, "not a Megatron-LM index, version 1, of uint16 or int32 tokens")
    if len(index) != _HEADER.size + 12 * count + 8 * boundaries:
        raise damaged_shard(path, f"{len(index)} bytes do not fit {count} documents")
    lengths = np.frombuffer(index, np.int32, count, _HEADER.size)
    offsets = np.frombuffer(index, np.int64, count, _HEADER.size + lengths.nbytes)
    _refuse_wrong_positions(path, lengths, offsets, np.dtype(names[code]).itemsize)
    return names[code], lengths, offsets


def _refuse_wrong_positions(path: Path, lengths: np.ndarray, offsets: np.ndarray, itemsize: int) -> None:
    """Raise UserError unless each document starts where the one before it ends, as build_index writes them."""
    if (wrong := np.flatnonzero(lengths < 0)).size:
        raise damaged_shard(path, f"document {wrong[0]} has {lengths[wrong[0]]} tokens")
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * itemsize
    if (wrong := np.flatnonzero(offsets != starts)).size:
        first = wrong[0]
        message = (
            f"document {first} starts at byte {offsets[first]}, but the documents before it end at {starts[first]}"
        )
        raise damaged_shard(path, message)


def damaged_shard(path: Path, reason: str) -> UserError:
    """Return the error for a damaged file of a shard."""
    return UserError(
        f"token shard {path}: {reason}",
        f"delete the folder {path.parent} and the dataset's manifest, data/{path.parent.parent.name}.json; then run again",
    )
