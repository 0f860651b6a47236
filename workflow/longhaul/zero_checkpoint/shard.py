"""Which part of a tensor of the Hugging Face model a rank's parameter is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

Ranges = tuple[tuple[int, int], ...]


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


def _meet(one: Ranges, other: Ranges) -> bool:
    return any(max(a, c) < min(b, d) for a, b in one for c, d in other)
