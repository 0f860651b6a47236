"""The tensors of safetensors files, read where they lie and not mapped: pages of a mapping count as this process' memory.

Format: 8 bytes little-endian header length, JSON header, data. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch

from longhaul.errors import UserError
from longhaul.zero_checkpoint.tensors import LazyTensor, Piece, lazy

DTYPE_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HINT = "the file was cut short or altered: copy it again"


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file, unread.

    Raises:
        UserError: the file is damaged, or holds a type that is not known here.
    """
    header, start = _header(path)
    return {name: _tensor(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the byte at which the data begin."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
        if length > size - 8:
            raise UserError(f"{path} has {size} bytes and no whole safetensors header", _HINT)
        try:
            return json.loads(stream.read(length), object_pairs_hook=_without_doubles), 8 + length
        except ValueError as error:
            raise UserError(f"{path} has no readable safetensors header: {error}", _HINT) from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands in it twice")
    return found


def _tensor(path: Path, name: str, entry: dict[str, Any], start: int) -> LazyTensor:
    if entry["dtype"] not in DTYPE_NAMES:
        raise UserError(f"{path}: {name} has type {entry['dtype']}", f"use one of {', '.join(DTYPE_NAMES)}")
    dtype = DTYPE_NAMES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    tensor = lazy(entry["shape"], (Piece(path, start + begin, (end - begin) // dtype.itemsize, dtype),))
    if tensor.numel * dtype.itemsize != end - begin or start + end > path.stat().st_size:
        raise UserError(f"{path}: {name} does not have the {tensor.numel} elements of its shape", _HINT)
    return tensor
