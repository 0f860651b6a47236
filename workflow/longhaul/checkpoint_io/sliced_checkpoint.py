"""Finds tensors in a checkpoint of tensor, pipeline or expert parallelism; format of slice_index.json.

A model is sliced if tensor, pipeline or expert parallelism spreads its tensors over ranks (ZeRO 1 to 3). DeepSpeed's files
contain only the names and shapes that the parameters have on each rank. The trainer adds slice_index.json; it
states which slice of which tensor each parameter is:

axes      {"tensor": t, "pipeline": p, "expert": e, "data": d}: d data-parallel ranks for each of the t x p model ranks
tied      name -> the name of the parameter that it shares
slices    one entry for each parameter of each model rank:
          model_rank   DeepSpeed's mp_rank
          expert_rank  for routed experts, else null
          local_name   the parameter's name on that rank
          name, shape  of the whole tensor, as transformers has it
          axis_ranges  [[axis, [[start, stop], …]], …]: the ranges that the rank holds; other axes are whole

mp_rank_<m>_model_states.pt (ZeRO 3: zero_pp_rank_0_mp_rank_<m>_model_states.pt) names the parameters of model rank m.
zero_pp_rank_<d>_mp_rank_<m>_optim_states.pt holds the partition of their master weights that data rank d owns. Experts are
partitioned only over the data ranks d with d mod e = their expert rank.
buffers-pipeline-rank-<p>.safetensors holds the persistent buffers of pipeline rank p.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from typing_extensions import TypedDict

from longhaul.artifacts.typed_json import read_typed_json
from longhaul.checkpoint_io.lazy_tensors import LazyTensor, element_range_of
from longhaul.checkpoint_io.optimizer_file import (
    MASTER,
    flat_partition,
    is_zero3,
    optimizer_steps,
    partition_count,
)
from longhaul.checkpoint_io.safetensors_reader import open_safetensors
from longhaul.checkpoint_io.tensor_slice import TensorSlice, copy_into_ranges, row_width
from longhaul.checkpoint_io.torch_archive import read_archive
from longhaul.checkpoint_io.zero_partitions import tensors_of_flat_group, tensors_of_partitioned_group
from longhaul.errors import UserError

SLICE_INDEX = "slice_index.json"
BUFFERS_FILE = "buffers-pipeline-rank-{:02d}.safetensors"
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_HINT = "a rank did not finish its save, or the files are of different saves: use another checkpoint"


Size = Annotated[int, Field(ge=1, le=2**20)]


@dataclass(frozen=True)
class AssembledTensor:
    """A whole tensor that is assembled from slices in several files; it has the interface of a LazyTensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: tuple[tuple[TensorSlice, LazyTensor], ...]
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self) -> torch.Tensor:
        """Read the whole tensor; it is contiguous and has the shape `shape`."""
        return self.read_range(0, self.numel).view(self.shape)

    def read_range(self, start: int, stop: int) -> torch.Tensor:
        """Read elements [start, stop) of the flattened tensor; the rows that contain them are read completely."""
        width = row_width(self.shape)
        first, last = start // width, -(-stop // width)
        rows = torch.empty(last - first, width, dtype=self.dtype)
        for tensor_slice, stored in self.slices:
            local_width = row_width(tensor_slice.local_shape)
            for begin, end, local in tensor_slice.rows_within(first, last):
                values = stored.read_range(local * local_width, (local + end - begin) * local_width)
                copy_into_ranges(
                    rows[begin - first : end - first], values.view(-1, local_width), {1: tensor_slice.columns}
                )
        return rows.flatten()[start - first * width : stop - first * width]


def open_sliced_tensors(folder: Path, key: str) -> dict[str, Any]:
    """Return AssembledTensors and the LazyTensors of buffers, by transformers' names.

    key: MASTER for the master weights of every parameter and every persistent buffer, or a moment of every parameter.

    Raises:
        UserError: a file or a slice is missing, slices overlap, or a slice has another shape than the index states.
    """
    index = _read_index(folder)
    # Ranks of the same expert rank or with replicated tensors hold equal slices; one of them is kept.
    slices: dict[str, dict[tuple[Any, ...], tuple[TensorSlice, LazyTensor]]] = {}
    for model_rank, paths in _optimizer_files(folder, index["axes"]).items():
        entries = [entry for entry in index["slices"] if entry["model_rank"] == model_rank]
        for tensor_slice, stored in _slices_of_model_rank(
            folder, model_rank, paths, entries, index["axes"]["expert"], key
        ):
            position = tuple(sorted(tensor_slice.axis_ranges.items()))
            slices.setdefault(tensor_slice.name, {})[position] = (tensor_slice, stored)
    aliases: dict[str, tuple[str, ...]] = {}
    for alias, name in index["tied"].items():
        aliases[name] = (*aliases.get(name, ()), alias)
    tensors = {name: _assemble(folder, name, list(own.values()), aliases.get(name, ())) for name, own in slices.items()}
    return tensors | _buffers(folder) if key == MASTER else tensors


def sliced_optimizer_steps(folder: Path) -> int:
    """Return the number of optimizer steps."""
    files = _optimizer_files(folder, _read_index(folder)["axes"])
    return optimizer_steps(read_archive(files[0][0])["optimizer_state_dict"])


class SliceAxes(TypedDict):
    """The sizes of the parallel axes."""

    tensor: Size
    pipeline: Size
    expert: Size
    data: Size


class SliceEntry(TypedDict):
    """One slice. axis_ranges: (axis, ranges of indices) of each axis that is sliced."""

    model_rank: int
    expert_rank: int | None
    local_name: str
    name: str
    shape: list[int]
    axis_ranges: list[tuple[int, list[tuple[int, int]]]]


class SliceIndex(TypedDict):
    """slice_index.json. tied: name of a tied weight -> name under which the model stores it."""

    axes: SliceAxes
    tied: dict[str, str]
    slices: list[SliceEntry]


def _read_index(folder: Path) -> SliceIndex:
    return read_typed_json(folder / SLICE_INDEX, SliceIndex, _HINT)


def _optimizer_files(folder: Path, axes: SliceAxes) -> dict[int, list[Path]]:
    """Return model rank -> the files of its data ranks, in order."""
    found = {(int(m[2]), int(m[1])): path for path in folder.iterdir() if (m := _OPTIMIZER_FILE.fullmatch(path.name))}
    model_ranks = axes["tensor"] * axes["pipeline"]
    expected = [(model_rank, data_rank) for model_rank in range(model_ranks) for data_rank in range(axes["data"])]
    if sorted(found) != expected:
        model_rank, data_rank = sorted(set(found) ^ set(expected))[0]
        problem = "missing" if (model_rank, data_rank) in expected else f"not listed in the axes of {SLICE_INDEX}"
        raise UserError(
            f"{folder}: the optimizer file of model rank {model_rank}, data rank {data_rank} is {problem}", _HINT
        )
    return {rank: [found[rank, data_rank] for data_rank in range(axes["data"])] for rank in range(model_ranks)}


def _slices_of_model_rank(
    folder: Path, model_rank: int, paths: list[Path], entries: list[SliceEntry], expert_ranks: int, key: str
) -> Iterator[tuple[TensorSlice, LazyTensor]]:
    optimizers = [read_archive(path)["optimizer_state_dict"] for path in paths]
    prefix = "zero_pp_rank_0_" if is_zero3(optimizers[0]) else ""
    groups = read_archive(folder / f"{prefix}mp_rank_{model_rank:02d}_model_states.pt")["param_shapes"]
    for expert_rank in (None, *range(expert_ranks)):
        own = {entry["local_name"]: entry for entry in entries if entry["expert_rank"] == expert_rank}
        owners = optimizers if expert_rank is None else optimizers[expert_rank::expert_ranks]
        tensors = _group_tensors(groups, own, owners, folder, key)
        if missing := sorted(set(own) - set(tensors)):
            raise UserError(f"{folder}: model rank {model_rank} has no master weights of {missing[0]}", _HINT)
        for local_name, tensor in tensors.items():
            if local_name not in own:
                raise UserError(
                    f"{folder}: {SLICE_INDEX} has no entry of {local_name} on model rank {model_rank}", _HINT
                )
            tensor_slice = _tensor_slice(own[local_name])
            if tensor_slice.local_shape != tensor.shape:
                raise UserError(
                    f"{folder}: {local_name} has shape {tensor.shape}; {SLICE_INDEX} states {tensor_slice.local_shape}",
                    _HINT,
                )
            yield tensor_slice, tensor


def _group_tensors(
    groups: list[dict[str, Any]], wanted: Iterable[str], optimizers: list[dict[str, Any]], folder: Path, key: str
) -> dict[str, LazyTensor]:
    """Return the tensors of each group that has a wanted parameter.

    optimizers: the optimizer states of the ranks over which these groups are partitioned
    """
    names, tensors = set(wanted), {}
    for group, shapes in enumerate(groups):
        if not names & set(shapes):
            continue
        for optimizer in optimizers:
            if (saved_by := partition_count(optimizer, group)) != len(optimizers):
                raise UserError(
                    f"{folder}: {next(iter(shapes))} was saved by {saved_by} ranks, but {len(optimizers)} have a file",
                    _HINT,
                )
        partitions = [element_range_of(flat_partition(optimizer, group, key)) for optimizer in optimizers]
        if is_zero3(optimizers[0]):
            tensors |= tensors_of_partitioned_group(shapes, partitions, folder)
            continue
        paddings = optimizers[0].get("param_alignment_paddings")
        tensors |= tensors_of_flat_group(shapes, paddings[group] if paddings else [0] * len(shapes), partitions, folder)
    return tensors


def _tensor_slice(entry: SliceEntry) -> TensorSlice:
    axis_ranges = {axis: tuple((start, stop) for start, stop in ranges) for axis, ranges in entry["axis_ranges"]}
    return TensorSlice(entry["name"], tuple(entry["shape"]), axis_ranges)


def _assemble(
    folder: Path, name: str, stored: list[tuple[TensorSlice, LazyTensor]], aliases: tuple[str, ...]
) -> AssembledTensor:
    slices = [tensor_slice for tensor_slice, _ in stored]
    held, total = sum(tensor_slice.numel for tensor_slice in slices), math.prod(slices[0].shape)
    overlap = any(a.overlaps(b) for index, a in enumerate(slices) for b in slices[:index])
    if overlap or held != total:
        problem = "overlap" if overlap else f"hold {held} of its {total} elements"
        raise UserError(f"{folder}: the slices of {name} {problem}", _HINT)
    return AssembledTensor(slices[0].shape, torch.float32, tuple(stored), aliases)


def _buffers(folder: Path) -> dict[str, LazyTensor]:
    return {
        name: tensor
        for path in sorted(folder.glob(BUFFERS_FILE.replace("{:02d}", "*")))
        for name, tensor in open_safetensors(path).items()
    }
