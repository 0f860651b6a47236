"""The ranks of a layout on their axes, and the process groups along them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from longhaul.config.run_config import Parallel


@dataclass(frozen=True)
class ParallelDims:
    """This rank's place. rank = (stage · data + replica) · tensor + tensor rank: tensor ranks are neighbours, in one node.

    `data` counts DeepSpeed's data-parallel ranks, each of which holds a gradient of its own. `sequence` neighbours
    among them share their samples and split the tokens; `expert` neighbours among them split the experts.
    Groups are None along an axis of size 1.
    """

    rank: int
    world_size: int
    parallel: Parallel
    groups: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> int:
        return self.world_size // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.parallel.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.parallel.tensor % self.data

    @property
    def stage(self) -> int:
        return self.rank // (self.parallel.tensor * self.data)

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.parallel.pipeline - 1

    @property
    def expert_rank(self) -> int:
        return self.data_rank % self.parallel.expert

    @property
    def sequence_rank(self) -> int:
        return self.data_rank % self.parallel.sequence

    @property
    def sample_rank(self) -> int:
        """Which share of a global batch's samples this rank reads."""
        return self.data_rank // self.parallel.sequence

    @property
    def counts_samples(self) -> bool:
        """True on one of the ranks that read the same samples."""
        return self.tensor_rank == self.stage == self.sequence_rank == 0

    @property
    def model_rank(self) -> int:
        """DeepSpeed's mp_rank: which part of the model, of all tensor ranks of all stages."""
        return self.stage * self.parallel.tensor + self.tensor_rank

    @property
    def is_split(self) -> bool:
        """Whether a rank holds less than the whole model, beside what ZeRO partitions."""
        return max(self.parallel.tensor, self.parallel.pipeline, self.parallel.expert) > 1

    def group(self, axis: str) -> Any:
        return self.groups.get(axis)

    # What DeepSpeed asks of a model-parallel unit (`mpu`).

    def get_model_parallel_rank(self) -> int:
        return self.model_rank

    def get_model_parallel_world_size(self) -> int:
        return self.parallel.tensor * self.parallel.pipeline

    def get_model_parallel_group(self) -> Any:
        return self.group("model")

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.parallel.tensor

    def get_tensor_model_parallel_group(self) -> Any:
        return self.group("tensor")

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data

    def get_data_parallel_group(self) -> Any:
        return self.group("data")

    def get_data_parallel_group_ranks(self) -> list[int]:
        return next(line for line in _lines(self.parallel, self.world_size, "data") if self.rank in line)


def make_parallel_dims(parallel: Parallel, rank: int, world_size: int) -> ParallelDims:
    """Opens the groups of every axis that has several ranks; all ranks of the job call it."""
    dims = ParallelDims(rank, world_size, parallel)
    if parallel == Parallel():
        return dims
    for axis in ("tensor", "sequence", "expert", "expert_data", "data", "model"):
        for line in _lines(parallel, world_size, axis):
            # A group of one is needed too: DeepSpeed reduces over it.
            group = dist.new_group(line)
            if rank in line:
                dims.groups[axis] = group
    return dims


def _lines(parallel: Parallel, world_size: int, axis: str) -> Iterable[list[int]]:
    """Every set of ranks that differ along one axis only, in the order of their first rank."""
    lines: dict[tuple[int, ...], list[int]] = {}
    for rank in range(world_size):
        lines.setdefault(_coordinates(ParallelDims(rank, world_size, parallel), axis), []).append(rank)
    return lines.values()


def _coordinates(dims: ParallelDims, axis: str) -> tuple[int, ...]:
    """What ranks of one group along `axis` have in common."""
    expert, sequence = dims.parallel.expert, dims.parallel.sequence
    return {
        "tensor": (dims.stage, dims.data_rank),
        "sequence": (dims.stage, dims.tensor_rank, dims.data_rank // sequence),
        "expert": (dims.stage, dims.tensor_rank, dims.data_rank // expert),
        "expert_data": (dims.stage, dims.tensor_rank, dims.expert_rank),
        "data": (dims.stage, dims.tensor_rank),
        "model": (dims.data_rank,),
    }[axis]
