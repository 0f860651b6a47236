"""DeepSeek-V3/R1's 671 B parameters cut for 512 ranks by the trainer's own code, without memory and over a fake network.

Every (stage, tensor rank) of a layout is asked, with its experts; ranks that differ elsewhere hold tensors of the same shapes.
Bytes of weights, gradients and optimizer follow from the tensors; the plan knows only the config.
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

from bench.machine import header, publish
from longhaul.config.load import load_config
from longhaul.config.model_size import geometry
from longhaul.config.run_config import Parallel, Stage
from longhaul.jobs.launch_files import REPOSITORY
from longhaul.planning import make_plan
from longhaul.planning.gpu_memory import COMPUTE_BYTES, GIB, estimate
from longhaul.train.parallel.parallel_dims import ParallelDims, make_parallel_dims
from longhaul.train.parallel.slice_model import cut_model, parameters

LAYOUTS = {
    "pipeline 16, expert 32": Parallel(pipeline=16, expert=32),
    "pipeline 8, tensor 4, expert 16": Parallel(pipeline=8, tensor=4, expert=16),
}
HEAD = " stage tensor tensors  dense, M experts, M weights gradients optimizer     GiB"
GROUPS = ("tensor", "expert", "expert_data", "data", "model")


@dataclass
class Held:
    """What a rank holds: elements outside the routed experts and in them, and bytes of model states."""

    tensors: int
    dense: int
    experts: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.optimizer


def main() -> None:
    """Prints a table for each layout; AssertionError where a group, a shape or the sum is not the layout's."""
    logging.disable(logging.WARNING)
    plan = make_plan(load_config(REPOSITORY / "config" / "examples" / "deepseek-v3-671b-3d.yaml"))
    model, staged = plan.config.model.config_dict(), plan.stages[0]
    lines = header(("torch", "transformers", "deepspeed"))
    for name, parallel in LAYOUTS.items():
        stage = staged.stage.model_copy(update={"parallel": parallel})
        lines += ["", f"{name}: {staged.world_size} ranks, ZeRO {stage.zero.stage}, {stage.precision}; GiB", HEAD]
        lines += table(stage, model, staged.world_size)
    publish("shapes", lines)


def table(stage: Stage, model: dict[str, Any], world_size: int) -> Iterator[str]:
    """A line for every (stage, tensor rank), and the fullest one beside the plan's."""
    elements: dict[str, dict[Any, int]] = {}
    fullest = 0
    per_stage = world_size // stage.parallel.pipeline
    for rank in (
        first + tensor for first in range(0, world_size, per_stage) for tensor in range(stage.parallel.tensor)
    ):
        dims = opened(stage.parallel, rank, world_size)
        held = ask(stage, model, dims, elements)
        dist.destroy_process_group()
        fullest = max(fullest, held.states)
        sizes = " ".join(
            f"{size / GIB:{width}.2f}" for size, width in ((held.weights, 7), (held.gradients, 9), (held.optimizer, 9))
        )
        yield (
            f"{dims.stage:5} {dims.tensor_rank:6} {held.tensors:7} {held.dense / 1e6:9.1f} {held.experts / 1e6:10.1f} "
            f"{sizes} {held.states / GIB:7.2f}"
        )
    whole = sum(sum(parts.values()) for parts in elements.values())
    wanted = geometry(model).total
    assert whole == wanted, f"all ranks together hold {whole} elements of {wanted}"
    planned = estimate(stage, geometry(model), world_size)
    yield f"all ranks together hold each of {whole / 1e9:.3f} B elements once"
    off = planned.states / fullest - 1
    yield f"states of the fullest rank: {fullest / GIB:.2f} GiB; planned {planned.states / GIB:.2f} ({off:+.1%})"
    yield f"planned with activations, logits and buckets: {planned.total / GIB:.2f} GiB"


def opened(parallel: Parallel, rank: int, world_size: int) -> ParallelDims:
    """The rank's place, with every group that the run would open."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    dims = make_parallel_dims(parallel, rank, world_size)
    data = world_size // (parallel.tensor * parallel.pipeline)
    sizes = (parallel.tensor, parallel.expert, data // parallel.expert, data, parallel.tensor * parallel.pipeline)
    for axis, size in zip(GROUPS, sizes, strict=True):
        found = dist.get_world_size(dims.groups[axis])
        assert found == size, f"rank {rank}: {found} ranks along {axis}, not {size}"
    return dims


def ask(stage: Stage, model: dict[str, Any], dims: ParallelDims, elements: dict[str, dict[Any, int]]) -> Held:
    """What the rank holds; `elements` notes each part of each tensor, those of the ranks along `expert` included."""
    parallel, width = stage.parallel, COMPUTE_BYTES[stage.precision]
    count = {"dense": 0, "experts": 0}
    shards = [shard for shard, _ in parameters(cut_model(AutoConfig.for_model(**model), dims))]
    for shard in shards:
        is_expert = ".mlp.experts." in shard.name
        count["experts" if is_expert else "dense"] += shard.numel
        assert prod(shard.local_shape) == shard.numel, shard.name
        elements.setdefault(shard.name, {})[tuple(shard.parts.items())] = shard.numel * (
            parallel.expert if is_expert else 1
        )
    held = sum(count.values())
    partition = ceil(count["dense"] / dims.data) + ceil(count["experts"] / (dims.data // parallel.expert))
    return Held(len(shards), count["dense"], count["experts"], width * held, width * held, 12 * partition)


if __name__ == "__main__":
    main()
