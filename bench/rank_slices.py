"""Slices DeepSeek-V3 (671 B parameters) for 512 ranks and compares the bytes of each rank with the plan.

The trainer's own code slices the model on the meta device, over torch's fake process group. The script builds every (pipeline
rank, tensor rank) of a layout; other ranks hold tensors of the same shapes. The bytes of weights, gradients and optimizer
states follow from these tensors, whereas the plan uses only the config.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from bench.machine import describe_machine, write_result
from longhaul.config.load_config import load_config
from longhaul.config.model_size import model_size
from longhaul.config.shipped_files import data_root
from longhaul.config.stage_config import Parallel, Stage
from longhaul.planning import build_plan
from longhaul.planning.constants_shared_with_trainer import COMPUTE_BYTES
from longhaul.planning.gpu_memory import GIB, estimate_gpu_memory
from longhaul.train.parallel.parallel_dims import ParallelDims, build_parallel_dims
from longhaul.train.parallel.slice_model import parameter_slices, slice_model

LAYOUTS = {
    "pipeline 16, expert 32": Parallel(pipeline=16, expert=32),
    "pipeline 8, tensor 4, expert 16": Parallel(pipeline=8, tensor=4, expert=16),
}
HEADER = "  pipe tensor tensors  dense, M experts, M weights gradients optimizer     GiB"
CHECKED_AXES = ("tensor", "expert", "expert_data", "data", "model")


@dataclass
class RankMemory:
    """Elements of one rank outside routed experts (dense) and inside (experts), and bytes of its model states."""

    tensors: int
    dense: int
    experts: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def states(self) -> int:
        """Bytes of weights, gradients and optimizer states."""
        return self.weights + self.gradients + self.optimizer


def main() -> None:
    """Print a table for each layout; AssertionError if a group, a shape or the sum of all slices is wrong."""
    logging.disable(logging.WARNING)
    plan = build_plan(load_config(data_root() / "config" / "examples" / "deepseek-v3-671b-3d.yaml"))
    model, planned = plan.config.model.config_dict(), plan.stages[0]
    lines = describe_machine(("torch", "transformers", "deepspeed"))
    for name, parallel in LAYOUTS.items():
        stage = planned.stage.model_copy(update={"parallel": parallel})
        lines += ["", f"{name}: {planned.world_size} ranks, ZeRO {stage.zero.stage}, {stage.precision}; GiB", HEADER]
        lines += table(stage, model, planned.world_size)
    write_result("rank_slices", lines)


def table(stage: Stage, model: dict[str, Any], world_size: int) -> Iterator[str]:
    """Yield a line for every (pipeline rank, tensor rank), and a comparison of the fullest rank with the plan."""
    elements: dict[str, dict[Any, int]] = {}
    fullest = 0
    ranks_per_pipeline_rank = world_size // stage.parallel.pipeline
    for rank in (
        first + tensor
        for first in range(0, world_size, ranks_per_pipeline_rank)
        for tensor in range(stage.parallel.tensor)
    ):
        dims = open_groups(stage.parallel, rank, world_size)
        held = measure_rank(stage, model, dims, elements)
        dist.destroy_process_group()
        fullest = max(fullest, held.states)
        sizes = " ".join(
            f"{size / GIB:{width}.2f}" for size, width in ((held.weights, 7), (held.gradients, 9), (held.optimizer, 9))
        )
        yield (
            f"{dims.pipeline_rank:5} {dims.tensor_rank:6} {held.tensors:7} {held.dense / 1e6:9.1f} {held.experts / 1e6:10.1f} "
            f"{sizes} {held.states / GIB:7.2f}"
        )
    whole = sum(sum(parts.values()) for parts in elements.values())
    wanted = model_size(model).total
    assert whole == wanted, f"all ranks together hold {whole} elements of {wanted}"
    planned = estimate_gpu_memory(stage, model_size(model), world_size)
    yield f"all ranks together hold each of {whole / 1e9:.3f} B elements once"
    off = planned.model_states / fullest - 1
    yield f"states of the fullest rank: {fullest / GIB:.2f} GiB; planned {planned.model_states / GIB:.2f} ({off:+.1%})"
    yield f"planned with activations, logits and buckets: {planned.total / GIB:.2f} GiB"


def open_groups(parallel: Parallel, rank: int, world_size: int) -> ParallelDims:
    """Create the groups that a run creates, check their sizes, and return the rank's position."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    dims = build_parallel_dims(parallel, rank, world_size)
    data = world_size // (parallel.tensor * parallel.pipeline)
    sizes = (parallel.tensor, parallel.expert, data // parallel.expert, data, parallel.tensor * parallel.pipeline)
    for axis, size in zip(CHECKED_AXES, sizes, strict=True):
        found = dist.get_world_size(dims.groups[axis])
        assert found == size, f"rank {rank}: {found} ranks along {axis}, not {size}"
    return dims


def measure_rank(
    stage: Stage, model: dict[str, Any], dims: ParallelDims, elements: dict[str, dict[Any, int]]
) -> RankMemory:
    """Return the memory of a rank; add the sizes of its slices to `elements`.

    elements: tensor name -> slice -> number of elements, for experts those of all expert ranks
    """
    parallel, width = stage.parallel, COMPUTE_BYTES[stage.precision]
    count = {"dense": 0, "experts": 0}
    slices = [tensor_slice for tensor_slice, _ in parameter_slices(slice_model(AutoConfig.for_model(**model), dims))]
    for tensor_slice in slices:
        is_expert = ".mlp.experts." in tensor_slice.name
        count["experts" if is_expert else "dense"] += tensor_slice.numel
        assert prod(tensor_slice.local_shape) == tensor_slice.numel, tensor_slice.name
        elements.setdefault(tensor_slice.name, {})[tuple(tensor_slice.axis_ranges.items())] = tensor_slice.numel * (
            parallel.expert if is_expert else 1
        )
    held = sum(count.values())
    partition = ceil(count["dense"] / dims.data) + ceil(count["experts"] / (dims.data // parallel.expert))
    return RankMemory(len(slices), count["dense"], count["experts"], width * held, width * held, 12 * partition)


if __name__ == "__main__":
    main()
