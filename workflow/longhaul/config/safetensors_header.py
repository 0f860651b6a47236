"""Parses the header of a safetensors file without torch, so that the plan can check pretrained weights.

The file is an 8-byte little-endian header length, a JSON header, and the tensor data
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from longhaul.errors import UserError

_REMEDY = "the file is incomplete or changed: copy or download it again"


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header and the byte offset of the data.

    Raises:
        UserError: the header is incomplete or invalid, or the file size differs from the size in the header.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
        if length > size - 8:
            raise UserError(f"{path} has {size} bytes and no complete safetensors header", _REMEDY)
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_refuse_duplicates)
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            end = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} has no valid safetensors header: {error}", _REMEDY) from None
    if end != size:
        raise UserError(f"{path} has {size} bytes, but its header describes {end} bytes", _REMEDY)
    return header, 8 + length


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)} occurs twice")
    return found
