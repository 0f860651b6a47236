"""Lazy tensors: byte ranges of checkpoint files that are joined to one tensor, and read only on demand."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longhaul.checkpoint_io.torch_archive import StoredTensor
from longhaul.errors import UserError


@dataclass(frozen=True)
class ElementRange:
    """`numel` consecutive elements of `dtype`, which start at byte `offset_bytes` of the file `path`."""

    path: Path
    offset_bytes: int
    numel: int
    dtype: torch.dtype

    def part(self, start: int, stop: int) -> ElementRange:
        """Return the range of elements [start, stop) of this one."""
        return ElementRange(self.path, self.offset_bytes + start * self.dtype.itemsize, stop - start, self.dtype)

    def read(self) -> torch.Tensor:
        """Read the elements in their stored dtype, as a 1-D tensor."""
        return _read_into(self, torch.empty(self.numel, dtype=self.dtype))


@dataclass(frozen=True)
class LazyTensor:
    """One parameter or buffer of the model; its elements are read by `read` and `read_range` only.

    shape:   of the whole tensor
    dtype:   of the tensors that `read` returns: float32, or the stored dtype of a buffer of integers or booleans
    pieces:  the element ranges that hold the elements, in order
    aliases: further names of the same parameter (tied weights)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[ElementRange, ...]
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self) -> torch.Tensor:
        """Read the whole tensor; it is contiguous and has the shape `shape`."""
        return self.read_range(0, self.numel).view(self.shape)

    def read_range(self, start: int, stop: int) -> torch.Tensor:
        """Read elements [start, stop) of the flattened tensor into a new 1-D tensor."""
        values = torch.empty(stop - start, dtype=self.dtype)
        filled = 0
        for piece in select_elements(self.pieces, start, stop):
            target = values[filled : filled + piece.numel]
            if piece.dtype == self.dtype:
                _read_into(piece, target)
            else:
                target.copy_(piece.read())
            filled += piece.numel
        return values


def select_elements(pieces: Iterable[ElementRange], start: int, stop: int) -> tuple[ElementRange, ...]:
    """Return the ranges of elements [start, stop) of the concatenation of `pieces`."""
    selected, first = [], 0
    for piece in pieces:
        begin, end = max(start - first, 0), min(stop - first, piece.numel)
        if begin < end:
            selected.append(piece.part(begin, end))
        first += piece.numel
    return tuple(selected)


def element_range_of(stored: StoredTensor) -> ElementRange:
    """Return the range of all elements of a stored tensor."""
    return ElementRange(stored.path, stored.offset_bytes, stored.numel, stored.dtype)


def lazy_tensor(shape: Sequence[int], pieces: tuple[ElementRange, ...]) -> LazyTensor:
    """Return a LazyTensor of `shape`; it is read as float32 unless it holds integers or booleans."""
    is_floating = all(piece.dtype.is_floating_point for piece in pieces)
    return LazyTensor(tuple(shape), torch.float32 if is_floating else pieces[0].dtype, pieces)


def lazy_stored_tensor(stored: StoredTensor) -> LazyTensor:
    """Return a LazyTensor of a tensor that lies in one file."""
    return lazy_tensor(stored.shape, (element_range_of(stored),))


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor's elements; for a contiguous tensor, a view of its own memory."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]


def _read_into(piece: ElementRange, target: torch.Tensor) -> torch.Tensor:
    view = memoryview(target.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    filled_bytes = 0
    descriptor = os.open(piece.path, os.O_RDONLY)
    try:
        while filled_bytes < len(view):
            count = os.preadv(descriptor, [view[filled_bytes:]], piece.offset_bytes + filled_bytes)
            if count == 0:
                raise UserError(
                    f"{piece.path} ends at byte {piece.offset_bytes + filled_bytes}, inside a tensor that needs "
                    f"{len(view) - filled_bytes} bytes more",
                    "the file is truncated: use another checkpoint",
                )
            filled_bytes += count
    finally:
        os.close(descriptor)
    return target
