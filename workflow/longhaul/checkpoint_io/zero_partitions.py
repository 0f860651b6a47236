"""Computes which elements of ZeRO's partitions belong to each parameter: offsets, alignment and padding (as zero_to_fp32.py
does).

The arithmetic is that of deepspeed/utils/zero_to_fp32.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from longhaul.checkpoint_io.lazy_tensors import ElementRange, LazyTensor, lazy_tensor, select_elements
from longhaul.errors import UserError


def tensors_of_flat_group(
    shapes: Mapping[str, tuple[int, ...]], paddings: list[int], partitions: list[ElementRange], folder: Path
) -> dict[str, LazyTensor]:
    """Return the parameters of a ZeRO 1 or 2 group: one flat vector, partitioned over the ranks.

    shapes:     name -> shape of each parameter, in the order of the vector
    paddings:   number of padding elements after each parameter
    partitions: the vector, one part for each rank
    """
    tensors, offset = {}, 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        numel = math.prod(shape)
        tensors[name] = lazy_tensor(shape, select_elements(partitions, offset, offset + numel))
        offset += numel + padding
    held = sum(piece.numel for piece in partitions)
    # DeepSpeed pads the end of a group either to a multiple of twice the world size or not at all.
    if not 0 <= held - offset < 2 * len(partitions):
        raise _wrong_size(folder, next(iter(shapes)), "on all ranks", held, offset)
    return tensors


def tensors_of_partitioned_group(
    shapes: Mapping[str, tuple[int, ...]], partitions: list[ElementRange], folder: Path
) -> dict[str, LazyTensor]:
    """Return the parameters of a ZeRO 3 group: the vector of each rank holds its partition of each parameter in turn."""
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        tensors[name] = partitioned_tensor(shape, partitions, offset)
        offset += math.ceil(math.prod(shape) / len(partitions))
    if any(piece.numel != offset for piece in partitions):
        raise _wrong_size(folder, next(iter(shapes)), "on each rank", partitions[0].numel, offset)
    return tensors


def partitioned_tensor(shape: tuple[int, ...], partitions: list[ElementRange], offset: int) -> LazyTensor:
    """Return one ZeRO 3 parameter, whose partition starts at `offset` of each rank's vector.

    Each rank has ceil(numel / ranks) elements; those of the last ranks end in padding.
    """
    numel = math.prod(shape)
    per_rank = math.ceil(numel / len(partitions))
    pieces = []
    for rank, piece in enumerate(partitions):
        count = min(per_rank, numel - rank * per_rank)
        if count > 0:
            pieces.append(piece.part(offset, offset + count))
    return lazy_tensor(shape, tuple(pieces))


def _wrong_size(folder: Path, first: str, where: str, held: int, wanted: int) -> UserError:
    return UserError(
        f"{folder}: the parameter group that starts with {first} has {held} elements {where}; its parameters need {wanted}",
        "another DeepSpeed release wrote the checkpoint in another layout, or it is damaged: use another checkpoint",
    )
