"""A slice is read from a whole tensor in files, and a whole tensor is assembled from slices, without reading other rows."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longhaul.checkpoint_io import LazyTensor, open_safetensors
from longhaul.checkpoint_io.sliced_checkpoint import AssembledTensor
from longhaul.checkpoint_io.tensor_slice import TensorSlice
from longhaul.compat.deepspeed_optimizer_states import OwnedRange
from longhaul.train.checkpoint.resharding import OwnedElements

FLOAT_BYTES = 4
# Shape of a tensor, and the ranges that each rank holds: vectors, matrices by rows or columns, experts by one or two axes.
SLICINGS: dict[str, tuple[tuple[int, ...], list[dict[int, Any]]]] = {
    "vector": ((9,), [{0: ((0, 2), (7, 9))}, {0: ((2, 7),)}]),
    "rows": ((8, 5), [{0: ((0, 3), (6, 8))}, {0: ((3, 6),)}]),
    "columns": ((4, 6), [{1: ((0, 3),)}, {1: ((3, 6),)}]),
    "experts": ((8, 5, 3), [{0: ((0, 3), (6, 8))}, {0: ((3, 6),)}]),
    "gate and up": ((4, 8, 3), [{1: ((0, 2), (4, 6))}, {1: ((2, 4), (6, 8))}]),
    "down": ((4, 3, 8), [{2: ((0, 4),)}, {2: ((4, 8),)}]),
    "experts and rows": (
        (8, 5, 3),
        [{0: ((0, 4),)}, {0: ((4, 8),), 1: ((0, 2),)}, {0: ((4, 8),), 1: ((2, 5),)}],
    ),
    "experts and columns": ((4, 2, 6), [{0: e, 2: c} for e in (((0, 2),), ((2, 4),)) for c in (((0, 3),), ((3, 6),))]),
    "whole": ((4, 6), [{}]),
}


@pytest.fixture(params=SLICINGS)
def sliced(request: pytest.FixtureRequest) -> tuple[torch.Tensor, list[TensorSlice]]:
    """Return a tensor whose elements all differ, and its slices."""
    shape, ranges_of_ranks = SLICINGS[request.param]
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    return whole, [TensorSlice("x", shape, axis_ranges) for axis_ranges in ranges_of_ranks]


def save_lazy(tensor: torch.Tensor, path: Path) -> LazyTensor:
    save_file({"x": tensor.contiguous()}, path)
    return open_safetensors(path)["x"]


def save_slices(whole: torch.Tensor, slices: list[TensorSlice], folder: Path) -> AssembledTensor:
    stored = [
        (tensor_slice, save_lazy(tensor_slice.extract(whole), folder / f"{index}.safetensors"))
        for index, tensor_slice in enumerate(slices)
    ]
    return AssembledTensor(tuple(whole.shape), torch.float32, tuple(stored))


def all_ranges(numel: int) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop in product(range(numel + 1), repeat=2) if start <= stop]


def test_a_range_read_from_a_slice_equals_the_range_of_the_extracted_slice(sliced, tmp_path: Path) -> None:
    whole, slices = sliced
    source = save_lazy(whole, tmp_path / "whole.safetensors")
    for tensor_slice in slices:
        local = tensor_slice.extract(whole)
        assert torch.equal(tensor_slice.read(source), local)
        for start, stop in all_ranges(local.numel())[::7]:
            assert torch.equal(tensor_slice.read_range(source, start, stop), local.flatten()[start:stop]), (start, stop)


def test_a_range_read_from_an_assembled_tensor_equals_the_range_of_the_whole(sliced, tmp_path: Path) -> None:
    whole, slices = sliced
    tensor = save_slices(whole, slices, tmp_path)
    assert torch.equal(tensor.read(), whole)
    for start, stop in all_ranges(whole.numel())[::7]:
        assert torch.equal(tensor.read_range(start, stop), whole.flatten()[start:stop]), (start, stop)


def test_a_slice_can_be_read_from_an_assembled_tensor(sliced, tmp_path: Path) -> None:
    """Resharding reads the slices of one layout from the files of another."""
    whole, slices = sliced
    tensor = save_slices(whole, slices, tmp_path)
    for tensor_slice in (*slices, TensorSlice("x", tuple(whole.shape), {0: ((1, 3),)})):
        assert torch.equal(tensor_slice.read(tensor), tensor_slice.extract(whole))


@pytest.mark.parametrize(
    ("axis_ranges", "fraction"),
    [
        ({0: ((2, 4),)}, 1 / 4),
        ({1: ((0, 2), (8, 10))}, 1 / 4),
        ({0: ((0, 4),), 1: ((0, 8),)}, 1 / 4),
        ({2: ((0, 3),)}, 1),
    ],
    ids=["experts", "rows", "experts and rows", "columns"],
)
def test_only_rows_of_the_slice_are_read(
    axis_ranges: Any, fraction: float, tmp_path: Path, bytes_read: list[int]
) -> None:
    whole = torch.rand(8, 16, 6)
    source = save_lazy(whole, tmp_path / "whole.safetensors")
    bytes_read.clear()
    TensorSlice("x", (8, 16, 6), axis_ranges).read(source)
    assert sum(bytes_read) == fraction * whole.numel() * FLOAT_BYTES
    assert max(bytes_read) <= whole[0].numel() * FLOAT_BYTES, "one expert at a time"


def test_an_optimizer_reads_only_the_elements_of_a_slice_that_it_owns(tmp_path: Path, bytes_read: list[int]) -> None:
    """Elements 10 to 40 of two experts of 16 x 6: rows 1 to 6."""
    whole = torch.rand(8, 16, 6)
    source, tensor_slice = (
        save_lazy(whole, tmp_path / "whole.safetensors"),
        TensorSlice("x", (8, 16, 6), {0: ((2, 4),)}),
    )
    flat = torch.zeros(100)
    bytes_read.clear()
    OwnedElements(tensor_slice, OwnedRange(flat, 50, 10, 30)).write_from(source, flat)
    assert (
        torch.equal(flat[50:80], tensor_slice.extract(whole).flatten()[10:40])
        and not flat[:50].any()
        and not flat[80:].any()
    )
    assert sum(bytes_read) == 6 * 6 * FLOAT_BYTES


def test_a_range_of_sliced_experts_reads_only_its_own_rows(tmp_path: Path, bytes_read: list[int]) -> None:
    """An export reads ranges that are much smaller than an expert of a large model."""
    whole = torch.rand(8, 16, 6)
    halves = [TensorSlice("x", (8, 16, 6), {1: part}) for part in (((0, 4), (8, 12)), ((4, 8), (12, 16)))]
    tensor = save_slices(whole, halves, tmp_path)
    bytes_read.clear()
    start = 3 * 16 * 6 + 20
    assert torch.equal(tensor.read_range(start, start + 20), whole.flatten()[start : start + 20])
    assert sum(bytes_read) == 4 * 6 * FLOAT_BYTES, "rows 3 to 6 of the fourth expert"
