"""A tensor that is scattered over checkpoint files and read on demand."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longhaul.checkpoint_io.torch_archive import StoredTensor
from longhaul.errors import UserError


@dataclass(frozen=True)
class Piece:
    """`numel` consecutive elements of `dtype` from byte `offset_bytes` of `path`."""

    path: Path
    offset_bytes: int
    numel: int
    dtype: torch.dtype

    def part(self, start: int, stop: int) -> Piece:
        return Piece(self.path, self.offset_bytes + start * self.dtype.itemsize, stop - start, self.dtype)

    def read(self) -> torch.Tensor:
        """The elements as they are stored, 1-D."""
        return _read_into(self, torch.empty(self.numel, dtype=self.dtype))


@dataclass(frozen=True)
class LazyTensor:
    """One parameter or buffer of the model; nothing is read before `read`.

    shape:   of the whole tensor
    dtype:   of what `read` returns: float32, or the buffer's own type where it is not a floating-point one
    pieces:  where its elements lie, in order
    aliases: further names of the same parameter (tied weights)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self) -> torch.Tensor:
        """The whole tensor, contiguous, of `shape`."""
        return self.read_range(0, self.numel).view(self.shape)

    def read_range(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, as a new 1-D tensor."""
        values = torch.empty(stop - start, dtype=self.dtype)
        filled = 0
        for piece in cut(self.pieces, start, stop):
            target = values[filled : filled + piece.numel]
            if piece.dtype == self.dtype:
                _read_into(piece, target)
            else:
                target.copy_(piece.read())
            filled += piece.numel
        return values


def cut(pieces: Iterable[Piece], start: int, stop: int) -> tuple[Piece, ...]:
    """The pieces of elements [start, stop) of the concatenation of `pieces`."""
    found, first = [], 0
    for piece in pieces:
        begin, end = max(start - first, 0), min(stop - first, piece.numel)
        if begin < end:
            found.append(piece.part(begin, end))
        first += piece.numel
    return tuple(found)


def whole(stored: StoredTensor) -> Piece:
    """All elements of a stored tensor."""
    return Piece(stored.path, stored.offset_bytes, stored.numel, stored.dtype)


def lazy(shape: Sequence[int], pieces: tuple[Piece, ...]) -> LazyTensor:
    """A LazyTensor of `shape`, read as float32 unless it holds integers or booleans."""
    floating = all(piece.dtype.is_floating_point for piece in pieces)
    return LazyTensor(tuple(shape), torch.float32 if floating else pieces[0].dtype, pieces)


def flat_group(shapes: dict[str, Any], gaps: list[int], flat: list[Piece], folder: Path) -> dict[str, LazyTensor]:
    """The parameters of a ZeRO 1 or 2 group: one flat vector in the ranks' shares, each followed by its alignment padding."""
    found, offset = {}, 0
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        numel = math.prod(shape)
        found[name] = lazy(shape, cut(flat, offset, offset + numel))
        offset += numel + gap
    held = sum(piece.numel for piece in flat)
    # The group's end is padded to twice the world size or not at all, whichever DeepSpeed chose.
    if not 0 <= held - offset < 2 * len(flat):
        raise wrong_size(folder, next(iter(shapes)), held, offset)
    return found


def partitioned_group(shapes: dict[str, Any], flat: list[Piece], folder: Path) -> dict[str, LazyTensor]:
    """The parameters of a ZeRO 3 group: each rank's vector has its share of one parameter after the other."""
    found, offset = {}, 0
    for name, shape in shapes.items():
        found[name] = partitioned(shape, flat, offset)
        offset += math.ceil(math.prod(shape) / len(flat))
    if any(piece.numel != offset for piece in flat):
        raise wrong_size(folder, next(iter(shapes)), flat[0].numel, offset)
    return found


def partitioned(shape: tuple[int, ...], flat: list[Piece], offset: int) -> LazyTensor:
    """One ZeRO-3 parameter: rank r's share starts at `offset` of its flat vector; the last shares end in padding."""
    numel = math.prod(shape)
    share = math.ceil(numel / len(flat))
    pieces = []
    for rank, piece in enumerate(flat):
        count = min(share, numel - rank * share)
        if count > 0:
            pieces.append(piece.part(offset, offset + count))
    return lazy(shape, tuple(pieces))


def wrong_size(folder: Path, first: str, held: int, wanted: int) -> UserError:
    return UserError(
        f"{folder}: the parameter group of {first} holds {held} elements a rank or group, its parameters need {wanted}",
        "the checkpoint was written by a DeepSpeed release with another layout, or it is damaged",
    )


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's elements: the tensor's own memory where it is contiguous."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]


def _read_into(piece: Piece, target: torch.Tensor) -> torch.Tensor:
    view = memoryview(target.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    done = 0
    descriptor = os.open(piece.path, os.O_RDONLY)
    try:
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], piece.offset_bytes + done)
            if count == 0:
                raise UserError(
                    f"{piece.path} ends before its tensor does", "the file was cut short: use another checkpoint"
                )
            done += count
    finally:
        os.close(descriptor)
    return target
