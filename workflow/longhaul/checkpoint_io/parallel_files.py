"""Master weights of a model whose tensors are spread over ranks: tensor, pipeline and expert parallelism, ZeRO 1 to 3.

DeepSpeed's files know the parts only by the names and shapes that each rank had. What they are parts of is in layout.json,
which the trainer writes beside them:

axes      {"tensor": t, "pipeline": p, "expert": e, "data": d}: d data-parallel ranks for each of t · p model ranks
tied      name -> the name of the parameter it shares
entries   [{"model_rank", "expert_rank" or null, "local": name on that rank, "name", "shape", "parts": [[axis, [[start, stop]]]]}]

mp_rank_<m>_model_states.pt (of ZeRO 3, zero_pp_rank_0_mp_rank_<m>_model_states.pt) names the parameters of model rank m;
zero_pp_rank_<d>_mp_rank_<m>_optim_states.pt holds data rank d's share of their masters. Experts are shared among the data
ranks d with d mod e = their expert rank only.
buffers-stage-<p>.safetensors holds the saved buffers of stage p.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longhaul.artifacts.files import read_json
from longhaul.checkpoint_io.lazy_tensors import LazyTensor, flat_group, partitioned_group, whole
from longhaul.checkpoint_io.optimizer_state import MASTER, flat_share, is_zero3, sharing_ranks, step_of
from longhaul.checkpoint_io.safetensors_reader import open_safetensors
from longhaul.checkpoint_io.tensor_parts import Shard, place, row_width
from longhaul.checkpoint_io.torch_archive import read_archive
from longhaul.errors import UserError

LAYOUT = "layout.json"
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_HINT = "a rank did not finish its save, or the files are of different saves: use another checkpoint"


@dataclass(frozen=True)
class AssembledTensor:
    """A tensor put together from parts in several files; reads like a LazyTensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[Shard, LazyTensor], ...]
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self) -> torch.Tensor:
        """The whole tensor, contiguous, of `shape`."""
        return self.read_range(0, self.numel).view(self.shape)

    def read_range(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor; of their rows all is read."""
        width = row_width(self.shape)
        first, last = start // width, -(-stop // width)
        rows = torch.empty(last - first, width, dtype=self.dtype)
        for shard, part in self.parts:
            own_width = row_width(shard.local_shape)
            for begin, end, local in shard.rows(first, last):
                values = part.read_range(local * own_width, (local + end - begin) * own_width).view(-1, own_width)
                place(rows[begin - first : end - first], values, {1: shard.columns})
        return rows.flatten()[start - first * width : stop - first * width]


def open_assembled(folder: Path, key: str = MASTER) -> dict[str, Any]:
    """Every parameter and saved buffer of the model, by its transformers name; or one of Adam's moments, of parameters.

    Raises:
        UserError: a file or a part is missing, parts overlap, or they do not have the stated shapes.
    """
    layout = read_json(folder / LAYOUT)
    parts: dict[str, dict[tuple[Any, ...], tuple[Shard, LazyTensor]]] = {}
    files = _optimizer_files(folder, layout["axes"])
    for model_rank, paths in files.items():
        entries = [entry for entry in layout["entries"] if entry["model_rank"] == model_rank]
        for shard, tensor in _parts_of_rank(folder, model_rank, paths, entries, layout["axes"]["expert"], key):
            parts.setdefault(shard.name, {})[tuple(sorted(shard.parts.items()))] = (shard, tensor)
    aliases: dict[str, tuple[str, ...]] = {}
    for alias, name in layout["tied"].items():
        aliases[name] = (*aliases.get(name, ()), alias)
    found = {name: _assemble(folder, name, list(own.values()), aliases.get(name, ())) for name, own in parts.items()}
    return found | _buffers(folder) if key == MASTER else found


def assembled_step(folder: Path) -> int:
    """Optimizer steps done."""
    files = _optimizer_files(folder, read_json(folder / LAYOUT)["axes"])
    return step_of(read_archive(files[0][0])["optimizer_state_dict"])


def _optimizer_files(folder: Path, axes: dict[str, int]) -> dict[int, list[Path]]:
    """Model rank -> the files of its data ranks, in order."""
    found = {(int(m[2]), int(m[1])): path for path in folder.iterdir() if (m := _OPTIMIZER.fullmatch(path.name))}
    ranks = axes["tensor"] * axes["pipeline"]
    wanted = [(model_rank, data) for model_rank in range(ranks) for data in range(axes["data"])]
    if sorted(found) != wanted:
        odd = sorted(set(found) ^ set(wanted))[0]
        raise UserError(
            f"{folder}: the optimizer file of model rank {odd[0]}, data rank {odd[1]} is missing or extra", _HINT
        )
    return {rank: [found[rank, data] for data in range(axes["data"])] for rank in range(ranks)}


def _parts_of_rank(
    folder: Path, model_rank: int, paths: list[Path], entries: list[dict[str, Any]], expert_ranks: int, key: str
) -> Iterator[tuple[Shard, LazyTensor]]:
    states = [read_archive(path)["optimizer_state_dict"] for path in paths]
    prefix = "zero_pp_rank_0_" if is_zero3(states[0]) else ""
    groups = read_archive(folder / f"{prefix}mp_rank_{model_rank:02d}_model_states.pt")["param_shapes"]
    for expert_rank in (None, *range(expert_ranks)):
        own = {entry["local"]: entry for entry in entries if entry["expert_rank"] == expert_rank}
        sharing = states if expert_rank is None else states[expert_rank::expert_ranks]
        found = _masters(groups, own, sharing, folder, key)
        if missing := sorted(set(own) - set(found)):
            raise UserError(f"{folder}: model rank {model_rank} holds no master copy of {missing[0]}", _HINT)
        for local, tensor in found.items():
            if local not in own:
                raise UserError(f"{folder}: {LAYOUT} has no entry of {local} on model rank {model_rank}", _HINT)
            shard = _shard(own[local])
            if shard.local_shape != tensor.shape:
                raise UserError(f"{folder}: {local} has shape {tensor.shape}, {LAYOUT} says {shard.local_shape}", _HINT)
            yield shard, tensor


def _masters(
    groups: list[dict[str, Any]], wanted: Iterable[str], states: list[dict[str, Any]], folder: Path, key: str
) -> dict[str, LazyTensor]:
    """The groups that hold the wanted parameters, in the shares of the ranks that `states` are of."""
    names, found = set(wanted), {}
    for index, shapes in enumerate(groups):
        if not names & set(shapes):
            continue
        if any(sharing_ranks(state, index) != len(states) for state in states):
            raise UserError(f"{folder}: {next(iter(shapes))} was saved by another number of ranks", _HINT)
        flat = [whole(flat_share(state, index, key)) for state in states]
        if is_zero3(states[0]):
            found |= partitioned_group(shapes, flat, folder)
            continue
        paddings = states[0].get("param_alignment_paddings")
        found |= flat_group(shapes, paddings[index] if paddings else [0] * len(shapes), flat, folder)
    return found


def _shard(entry: dict[str, Any]) -> Shard:
    parts = {axis: tuple((start, stop) for start, stop in ranges) for axis, ranges in entry["parts"]}
    return Shard(entry["name"], tuple(entry["shape"]), parts)


def _assemble(
    folder: Path, name: str, parts: list[tuple[Shard, LazyTensor]], aliases: tuple[str, ...]
) -> AssembledTensor:
    shards = [shard for shard, _ in parts]
    held, wanted = sum(shard.numel for shard in shards), math.prod(shards[0].shape)
    doubled = any(a.overlaps(b) for index, a in enumerate(shards) for b in shards[:index])
    if doubled or held != wanted:
        what = "overlap" if doubled else f"hold {held} of its {wanted} elements"
        raise UserError(f"{folder}: the parts of {name} {what}", _HINT)
    return AssembledTensor(shards[0].shape, torch.float32, tuple(parts), aliases)


def _buffers(folder: Path) -> dict[str, LazyTensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("buffers-stage-*.safetensors"))
        for name, tensor in open_safetensors(path).items()
    }
