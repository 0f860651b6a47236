"""Opens the tensors of safetensors files without mmap, because mapped pages count as memory of the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longhaul.checkpoint_io.lazy_tensors import ElementRange, LazyTensor, lazy_tensor
from longhaul.config.safetensors_header import safetensors_header
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
_HINT = "the file is truncated or altered: copy it again"


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a file by name; only the header is read.

    Raises:
        UserError: the file is damaged, or it holds a dtype that is missing in DTYPE_NAMES.
    """
    header, start = safetensors_header(path)
    return {name: _tensor(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"}


def _tensor(path: Path, name: str, entry: dict[str, Any], start: int) -> LazyTensor:
    if entry["dtype"] not in DTYPE_NAMES:
        raise UserError(
            f"{path}: {name} has type {entry['dtype']}, which is not supported", f"use one of {', '.join(DTYPE_NAMES)}"
        )
    dtype = DTYPE_NAMES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    tensor = lazy_tensor(entry["shape"], (ElementRange(path, start + begin, (end - begin) // dtype.itemsize, dtype),))
    if tensor.numel * dtype.itemsize != end - begin or start + end > path.stat().st_size:
        raise UserError(f"{path}: {name} does not have the {tensor.numel} elements of its shape", _HINT)
    return tensor
