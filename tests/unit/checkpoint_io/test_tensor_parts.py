"""Parts of tensors are read without the rest: cut from a whole tensor in files, and a whole one put together from parts."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longhaul.checkpoint_io import LazyTensor, open_safetensors
from longhaul.checkpoint_io.parallel_files import AssembledTensor
from longhaul.checkpoint_io.tensor_parts import Shard
from longhaul.train.checkpoint.resharding import Slot

FLOAT_BYTES = 4
# What each of several ranks has of a tensor: of a vector, of matrices by rows or columns, of experts by each axis and by two.
SPLITS: dict[str, tuple[tuple[int, ...], list[dict[int, Any]]]] = {
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


@pytest.fixture(params=SPLITS)
def split(request: pytest.FixtureRequest) -> tuple[torch.Tensor, list[Shard]]:
    """A tensor whose values all differ, and its parts."""
    shape, parts = SPLITS[request.param]
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    return whole, [Shard("x", shape, part) for part in parts]


def stored(tensor: torch.Tensor, path: Path) -> LazyTensor:
    save_file({"x": tensor.contiguous()}, path)
    return open_safetensors(path)["x"]


def assembled(whole: torch.Tensor, shards: list[Shard], folder: Path) -> AssembledTensor:
    parts = [(shard, stored(shard.cut(whole), folder / f"{index}.safetensors")) for index, shard in enumerate(shards)]
    return AssembledTensor(tuple(whole.shape), torch.float32, tuple(parts))


def ranges(numel: int) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop in product(range(numel + 1), repeat=2) if start <= stop]


def test_any_range_of_a_part_is_that_of_the_part_cut_from_the_whole(split, tmp_path: Path) -> None:
    whole, shards = split
    source = stored(whole, tmp_path / "whole.safetensors")
    for shard in shards:
        part = shard.cut(whole)
        assert torch.equal(shard.read(source), part)
        for start, stop in ranges(part.numel())[::7]:
            assert torch.equal(shard.read_range(source, start, stop), part.flatten()[start:stop]), (start, stop)


def test_any_range_of_an_assembled_tensor_is_that_of_the_whole(split, tmp_path: Path) -> None:
    whole, shards = split
    tensor = assembled(whole, shards, tmp_path)
    assert torch.equal(tensor.read(), whole)
    for start, stop in ranges(whole.numel())[::7]:
        assert torch.equal(tensor.read_range(start, stop), whole.flatten()[start:stop]), (start, stop)


def test_a_part_may_be_read_of_an_assembled_tensor(split, tmp_path: Path) -> None:
    """Another layout reads what this one saved."""
    whole, shards = split
    tensor = assembled(whole, shards, tmp_path)
    for shard in (*shards, Shard("x", tuple(whole.shape), {0: ((1, 3),)})):
        assert torch.equal(shard.read(tensor), shard.cut(whole))


@pytest.mark.parametrize(
    ("parts", "share"),
    [
        ({0: ((2, 4),)}, 1 / 4),
        ({1: ((0, 2), (8, 10))}, 1 / 4),
        ({0: ((0, 4),), 1: ((0, 8),)}, 1 / 4),
        ({2: ((0, 3),)}, 1),
    ],
    ids=["experts", "rows", "experts and rows", "columns"],
)
def test_only_rows_of_a_part_are_read(parts: Any, share: float, tmp_path: Path, bytes_read: list[int]) -> None:
    whole = torch.rand(8, 16, 6)
    source = stored(whole, tmp_path / "whole.safetensors")
    bytes_read.clear()
    Shard("x", (8, 16, 6), parts).read(source)
    assert sum(bytes_read) == share * whole.numel() * FLOAT_BYTES
    assert max(bytes_read) <= whole[0].numel() * FLOAT_BYTES, "one expert at a time"


def test_an_optimizer_reads_what_it_owns_of_a_part(tmp_path: Path, bytes_read: list[int]) -> None:
    """Elements 10 to 40 of two experts of 16 x 6: rows 1 to 6."""
    whole = torch.rand(8, 16, 6)
    source, shard = stored(whole, tmp_path / "whole.safetensors"), Shard("x", (8, 16, 6), {0: ((2, 4),)})
    flat = torch.zeros(100)
    bytes_read.clear()
    Slot(shard, 10, 30, flat, 50).write(flat, source)
    assert torch.equal(flat[50:80], shard.cut(whole).flatten()[10:40]) and not flat[:50].any() and not flat[80:].any()
    assert sum(bytes_read) == 6 * 6 * FLOAT_BYTES


def test_a_chunk_of_split_experts_reads_its_own_rows(tmp_path: Path, bytes_read: list[int]) -> None:
    """A conversion takes a chunk at a time, far less than an expert of a large model."""
    whole = torch.rand(8, 16, 6)
    halves = [Shard("x", (8, 16, 6), {1: part}) for part in (((0, 4), (8, 12)), ((4, 8), (12, 16)))]
    tensor = assembled(whole, halves, tmp_path)
    bytes_read.clear()
    start = 3 * 16 * 6 + 20
    assert torch.equal(tensor.read_range(start, start + 20), whole.flatten()[start : start + 20])
    assert sum(bytes_read) == 4 * 6 * FLOAT_BYTES, "rows 3 to 6 of the fourth expert"
