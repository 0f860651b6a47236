"""Slice of a whole tensor that one rank holds: its ranges along each axis, its shape, and how it is cut out and put back.

A row is the part of a tensor that is contiguous in a file: the last axis of a tensor of two or three axes (experts have
three), or one element of a vector. Rows of a tensor of three axes are numbered over the first two axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

Ranges = tuple[tuple[int, int], ...]
"""Index ranges [start, stop) along one axis, in the order in which the slice holds them."""


class ReadableTensor(Protocol):
    """A whole tensor in files; `read_range` returns elements [start, stop) of the flattened tensor."""

    @property
    def dtype(self) -> torch.dtype: ...

    def read_range(self, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class TensorSlice:
    """A slice of a model tensor.

    name:        transformers' name of the whole tensor
    shape:       of the whole tensor
    axis_ranges: axis -> the index ranges that the slice holds, one after another; an axis that is missing here is whole
    """

    name: str
    shape: tuple[int, ...]
    axis_ranges: Mapping[int, Ranges] = field(default_factory=dict)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the slice itself."""
        return tuple(sum(stop - start for start, stop in self.ranges(axis)) for axis in range(len(self.shape)))

    @property
    def numel(self) -> int:
        """Number of elements in the slice."""
        return math.prod(self.local_shape)

    def ranges(self, axis: int) -> Ranges:
        """Return the ranges along an axis; one range over the whole axis if the tensor is not sliced there."""
        return self.axis_ranges.get(axis, ((0, self.shape[axis]),))

    @property
    def columns(self) -> Ranges:
        """Ranges of the columns that the slice holds of each row."""
        return self.ranges(len(self.shape) - 1) if len(self.shape) > 1 else ((0, 1),)

    def rows_within(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield the rows of the slice among rows [first, last) of the whole tensor, in the order of the slice.

        Each item is (begin, end, local): rows [begin, end) of the whole tensor are the rows of the slice from `local` on.
        """
        if len(self.shape) < 3:
            yield from _intersections(self.ranges(0), first, last)
            return
        height, local_height = self.shape[1], self.local_shape[1]
        for begin, end, local in _intersections(self.ranges(0), first // height, -(-last // height)):
            for index in range(begin, end):
                base = index * height
                for start, stop, row in _intersections(self.ranges(1), first - base, last - base):
                    yield base + start, base + stop, (local + index - begin) * local_height + row

    def read(self, whole: ReadableTensor) -> torch.Tensor:
        """Read this slice of the whole tensor, of shape `local_shape`; rows without a part in the slice are not read."""
        return self.read_range(whole, 0, self.numel).view(self.local_shape)

    def read_range(self, whole: ReadableTensor, start: int, stop: int) -> torch.Tensor:
        """Read elements [start, stop) of the flattened slice; rows without any of these elements are not read."""
        if not self.axis_ranges:
            return whole.read_range(start, stop)
        width, local_width = row_width(self.shape), row_width(self.local_shape)
        first, last = start // local_width, -(-stop // local_width)
        rows = torch.empty(last - first, local_width, dtype=whole.dtype)
        for begin, end, local in self.rows_within(0, math.prod(self.shape) // width):
            low, high = max(first, local), min(last, local + end - begin)
            if low < high:
                values = whole.read_range((begin + low - local) * width, (begin + high - local) * width).view(-1, width)
                columns = [values.narrow(1, left, right - left) for left, right in self.columns]
                torch.cat(columns, 1, out=rows[low - first : high - first])
        return rows.flatten()[start - first * local_width : stop - first * local_width]

    def extract(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this slice of the whole tensor."""
        for axis, ranges in self.axis_ranges.items():
            whole = torch.cat([whole.narrow(axis, start, stop - start) for start, stop in ranges], axis)
        return whole

    def insert(self, whole: torch.Tensor, local: torch.Tensor) -> None:
        """Write `local`, the values of this slice, into the whole tensor."""
        copy_into_ranges(whole, local, {axis: self.ranges(axis) for axis in self.axis_ranges})

    def overlaps(self, other: TensorSlice) -> bool:
        """Return True if both slices of a tensor have an element in common."""
        return all(_ranges_overlap(self.ranges(axis), other.ranges(axis)) for axis in range(len(self.shape)))


def row_width(shape: tuple[int, ...]) -> int:
    """Return the number of elements in a row."""
    return shape[-1] if len(shape) > 1 else 1


def copy_into_ranges(whole: torch.Tensor, local: torch.Tensor, axis_ranges: Mapping[int, Ranges]) -> None:
    """Write `local` to the given ranges of `whole`; an axis without ranges is written over its full length."""
    pairs = [(whole, local)]
    for axis, ranges in axis_ranges.items():
        pairs = [narrowed for pair in pairs for narrowed in _narrow_both(*pair, axis, ranges)]
    for target, source in pairs:
        target.copy_(source)


def _narrow_both(
    whole: torch.Tensor, local: torch.Tensor, axis: int, ranges: Ranges
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    first = 0
    for start, stop in ranges:
        yield whole.narrow(axis, start, stop - start), local.narrow(axis, first, stop - start)
        first += stop - start


def _intersections(ranges: Ranges, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, local) for each range that meets [first, last).

    [begin, end) is the intersection; `local` is the position of `begin` in the ranges, counted one after another.
    """
    passed = 0
    for start, stop in ranges:
        begin, end = max(start, first), min(stop, last)
        if begin < end:
            yield begin, end, passed + begin - start
        passed += stop - start


def _ranges_overlap(one: Ranges, other: Ranges) -> bool:
    return any(max(a, c) < min(b, d) for a, b in one for c, d in other)
