"""The tensors of safetensors files, read where they lie and not mapped: pages of a mapping count as this process' memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longhaul.checkpoint_io.lazy_tensors import LazyTensor, Piece, lazy
from longhaul.config.pretrained_format import safetensors_header
from longhaul.errors import UserError

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
    header, start = safetensors_header(path)
    return {name: _tensor(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"}


def _tensor(path: Path, name: str, entry: dict[str, Any], start: int) -> LazyTensor:
    if entry["dtype"] not in DTYPE_NAMES:
        raise UserError(f"{path}: {name} has type {entry['dtype']}", f"use one of {', '.join(DTYPE_NAMES)}")
    dtype = DTYPE_NAMES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    tensor = lazy(entry["shape"], (Piece(path, start + begin, (end - begin) // dtype.itemsize, dtype),))
    if tensor.numel * dtype.itemsize != end - begin or start + end > path.stat().st_size:
        raise UserError(f"{path}: {name} does not have the {tensor.numel} elements of its shape", _HINT)
    return tensor
