"""Sizes of the parallel axes, a rank's position on each, and their process groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch.distributed as dist

from longhaul.config.stage_config import Parallel

GROUP_AXES = ("tensor", "sequence", "expert", "expert_data", "data", "model")
"""The axes that have process groups.

expert_data: ranks that hold the same experts and other samples; they average the gradients of these experts
model:       the tensor and pipeline ranks that together hold one copy of the model
"""


@dataclass(frozen=True)
class ParallelDims:
    """The position of one rank.

    rank = (pipeline rank x data + data rank) x tensor + tensor rank: the ranks of a tensor group are neighbours on one node.
    `data` is the number of DeepSpeed's data-parallel ranks; each of them has its own gradient. Among them, `sequence`
    neighbours share their samples and divide the tokens; `expert` neighbours divide the experts.

    groups: axis of GROUP_AXES -> process group; empty if the layout has data parallelism only
    """

    rank: int
    world_size: int
    parallel: Parallel
    groups: dict[str, dist.ProcessGroup] = field(default_factory=dict)

    @property
    def data(self) -> int:
        """Number of data-parallel ranks."""
        return self.world_size // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def tensor_rank(self) -> int:
        """Position among the ranks that divide each tensor."""
        return self.rank % self.parallel.tensor

    @property
    def data_rank(self) -> int:
        """Position among the data-parallel ranks."""
        return self.rank // self.parallel.tensor % self.data

    @property
    def pipeline_rank(self) -> int:
        """Position in the pipeline; 0 holds the embedding."""
        return self.rank // (self.parallel.tensor * self.data)

    @property
    def is_last_pipeline_rank(self) -> bool:
        """True on the ranks that hold the final norm and the head."""
        return self.pipeline_rank == self.parallel.pipeline - 1

    @property
    def expert_rank(self) -> int:
        """Position among the data-parallel ranks that divide the experts."""
        return self.data_rank % self.parallel.expert

    @property
    def sequence_rank(self) -> int:
        """Position among the data-parallel ranks that divide the tokens of a sample."""
        return self.data_rank % self.parallel.sequence

    @property
    def sample_rank(self) -> int:
        """Index of the part of a global batch's samples that this rank reads."""
        return self.data_rank // self.parallel.sequence

    @property
    def counts_samples(self) -> bool:
        """True on exactly one of the ranks that read the same samples."""
        return self.tensor_rank == self.pipeline_rank == self.sequence_rank == 0

    @property
    def model_rank(self) -> int:
        """DeepSpeed's mp_rank: the position among all tensor and pipeline ranks of one copy of the model."""
        return self.pipeline_rank * self.parallel.tensor + self.tensor_rank

    @property
    def is_sliced(self) -> bool:
        """True if tensor, pipeline or expert parallelism leaves a rank less than the whole model. ZeRO does not count."""
        return max(self.parallel.tensor, self.parallel.pipeline, self.parallel.expert) > 1

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Return this rank's process group along an axis of GROUP_AXES, or None if there are no groups."""
        return self.groups.get(axis)

    # The methods that DeepSpeed calls on `mpu`, the model parallelism unit of deepspeed.initialize.

    def get_model_parallel_rank(self) -> int:
        return self.model_rank

    def get_model_parallel_world_size(self) -> int:
        return self.parallel.tensor * self.parallel.pipeline

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.group("model")

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.parallel.tensor

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.group("tensor")

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.group("data")

    def get_data_parallel_group_ranks(self) -> list[int]:
        return next(ranks for ranks in _rank_groups(self.parallel, self.world_size, "data") if self.rank in ranks)


def build_parallel_dims(parallel: Parallel, rank: int, world_size: int) -> ParallelDims:
    """Create the process groups of every axis and return this rank's position. All ranks of the job must call it."""
    dims = ParallelDims(rank, world_size, parallel)
    if parallel == Parallel():
        return dims
    for axis in GROUP_AXES:
        for ranks in _rank_groups(parallel, world_size, axis):
            # DeepSpeed reduces over groups of one rank too, so these are created as well.
            group = dist.new_group(ranks)
            if rank in ranks:
                assert isinstance(group, dist.ProcessGroup)
                dims.groups[axis] = group
    return dims


def _rank_groups(parallel: Parallel, world_size: int, axis: str) -> Iterable[list[int]]:
    """Return each set of ranks that differ only along `axis`, ordered by their first rank."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(world_size):
        groups.setdefault(_position_off_axis(ParallelDims(rank, world_size, parallel), axis), []).append(rank)
    return groups.values()


def _position_off_axis(dims: ParallelDims, axis: str) -> tuple[int, ...]:
    """Return the coordinates that the ranks of one group along `axis` have in common."""
    expert, sequence = dims.parallel.expert, dims.parallel.sequence
    return {
        "tensor": (dims.pipeline_rank, dims.data_rank),
        "sequence": (dims.pipeline_rank, dims.tensor_rank, dims.data_rank // sequence),
        "expert": (dims.pipeline_rank, dims.tensor_rank, dims.data_rank // expert),
        "expert_data": (dims.pipeline_rank, dims.tensor_rank, dims.expert_rank),
        "data": (dims.pipeline_rank, dims.tensor_rank),
        "model": (dims.data_rank,),
    }[axis]
