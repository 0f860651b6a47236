"""Which part of a tensor of the Hugging Face model a rank's parameter is.

Rows are what lies together in a file: the last axis of a tensor of two axes or three (experts), an element of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

Ranges = tuple[tuple[int, int], ...]


class Source(Protocol):
    """A whole tensor in files: `read_range` gives elements [start, stop) of it, flattened."""

    @property
    def dtype(self) -> torch.dtype: ...

    def read_range(self, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Shard:
    """A part of the tensor `name` of shape `shape`: along each axis in `parts`, these ranges one after another."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[int, Ranges] = field(default_factory=dict)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(sum(stop - start for start, stop in self.ranges(axis)) for axis in range(len(self.shape)))

    @property
    def numel(self) -> int:
        return math.prod(self.local_shape)

    def ranges(self, axis: int) -> Ranges:
        """The ranges along an axis; one over all of it where the tensor is not split."""
        return self.parts.get(axis, ((0, self.shape[axis]),))

    @property
    def columns(self) -> Ranges:
        """What the shard has of each of its rows."""
        return self.ranges(len(self.shape) - 1) if len(self.shape) > 1 else ((0, 1),)

    def rows(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Rows of the whole in [first, last) of which the shard has something, in its order: (begin, end, its own row that
        `begin` is)."""
        if len(self.shape) < 3:
            yield from _overlaps(self.ranges(0), first, last)
            return
        height, own_height = self.shape[1], self.local_shape[1]
        for begin, end, place in _overlaps(self.ranges(0), first // height, -(-last // height)):
            for index in range(begin, end):
                base = index * height
                for start, stop, row in _overlaps(self.ranges(1), first - base, last - base):
                    yield base + start, base + stop, (place + index - begin) * own_height + row

    def read(self, source: Source) -> torch.Tensor:
        """This part of the whole tensor; only rows of which it has something are read."""
        return self.read_range(source, 0, self.numel).view(self.local_shape)

    def read_range(self, source: Source, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of this part, flattened; only rows that have some of them are read."""
        if not self.parts:
            return source.read_range(start, stop)
        width, own_width = row_width(self.shape), row_width(self.local_shape)
        first, last = start // own_width, -(-stop // own_width)
        rows = torch.empty(last - first, own_width, dtype=source.dtype)
        for begin, end, local in self.rows(0, math.prod(self.shape) // width):
            low, high = max(first, local), min(last, local + end - begin)
            if low < high:
                values = source.read_range((begin + low - local) * width, (begin + high - local) * width).view(
                    -1, width
                )
                pieces = [values.narrow(1, left, right - left) for left, right in self.columns]
                torch.cat(pieces, 1, out=rows[low - first : high - first])
        return rows.flatten()[start - first * own_width : stop - first * own_width]

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of the whole tensor."""
        for axis, ranges in self.parts.items():
            whole = torch.cat([whole.narrow(axis, start, stop - start) for start, stop in ranges], axis)
        return whole

    def place(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Writes this part to its place in the whole tensor."""
        place(whole, part, {axis: self.ranges(axis) for axis in self.parts})

    def overlaps(self, other: Shard) -> bool:
        """Whether an element is in both."""
        return all(_meet(self.ranges(axis), other.ranges(axis)) for axis in range(len(self.shape)))


def row_width(shape: tuple[int, ...]) -> int:
    """Elements of a row."""
    return shape[-1] if len(shape) > 1 else 1


def place(whole: torch.Tensor, part: torch.Tensor, parts: Mapping[int, Ranges]) -> None:
    """Writes `part` to the given ranges of `whole`; an axis that is not given is written along all of its length."""
    pairs = [(whole, part)]
    for axis, ranges in parts.items():
        pairs = [split for pair in pairs for split in _split(*pair, axis, ranges)]
    for target, source in pairs:
        target.copy_(source)


def _split(
    whole: torch.Tensor, part: torch.Tensor, axis: int, ranges: Ranges
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    first = 0
    for start, stop in ranges:
        yield whole.narrow(axis, start, stop - start), part.narrow(axis, first, stop - start)
        first += stop - start


def _overlaps(ranges: Ranges, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """What of [first, last) is in the ranges: (begin, end, how far `begin` is into the ranges one after another)."""
    passed = 0
    for start, stop in ranges:
        begin, end = max(start, first), min(stop, last)
        if begin < end:
            yield begin, end, passed + begin - start
        passed += stop - start


def _meet(one: Ranges, other: Ranges) -> bool:
    return any(max(a, c) < min(b, d) for a, b in one for c, d in other)
