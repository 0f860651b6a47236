"""Finds the smallest number of nodes on which a stage fits, for each way to hold a model: ZeRO stage, offload, split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from longhaul.config.model_size import ModelSize, model_size
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Parallel, Stage
from longhaul.errors import UserError
from longhaul.planning.check_feasibility import accumulation_steps
from longhaul.planning.check_parallel_layout import check_model, data_parallel_size
from longhaul.planning.gpu_memory import GIB, MemoryEstimate, estimate_gpu_memory
from longhaul.planning.node_memory import PROCESS_BYTES

USED_SHARE = 0.9
"""Share of a GPU's memory that an estimate may use. The rest is for NCCL, the CUDA context and fragmentation."""
_MICRO_BATCHES = (16, 8, 4, 2, 1)
_SPLIT = "split"
_ZERO: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"stage": 1},
    "ZeRO 3": {"stage": 3},
    "ZeRO 3, CPU optimizer": {"stage": 3, "offload_optimizer": "cpu"},
    "ZeRO 3, CPU optimizer and weights": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
    "ZeRO 1, split model": {"stage": 1, _SPLIT: True},
}
WAYS = tuple(_ZERO)
"""Ways to hold a model, as tables name them. A split model has tensor, pipeline or expert ranks."""


@dataclass(frozen=True)
class Fit:
    """The smallest number of nodes for one way to hold a model; stage: with that layout."""

    way: str
    stage: Stage
    memory: MemoryEstimate

    @property
    def nodes(self) -> int:
        return self.stage.nodes

    @property
    def gpus(self) -> int:
        return self.stage.nodes * self.stage.gpus_per_node

    @property
    def host_gib(self) -> float:
        """CPU memory of the ranks of one node, in GiB."""
        return self.stage.gpus_per_node * (PROCESS_BYTES + self.memory.host) / GIB


def example_stage(sequence_length: int) -> Stage:
    """Return a pretraining stage in bf16 with a global batch that many numbers of ranks divide."""
    return Stage(
        name="example",
        kind="pretrain",
        dataset="example",
        steps=1,
        global_batch_size=3 * 2**20,
        sequence_length=sequence_length,
    )


def smallest_fits(stage: Stage, model: dict[str, Any], site: Site) -> dict[str, Fit | None]:
    """Return the smallest fit for each way; None where the stage does not fit on `max_nodes` nodes.

    Layers are recomputed in the backward pass (`activation_checkpointing: full`), and all GPUs of a node are used. Batch size,
    sequence length and precision are those of the stage.

    model: a Hugging Face config

    Raises:
        UserError: the site file does not state the memory of a GPU.
    """
    node = site.node
    if not node.gpus or node.gpu_memory_gib is None:
        raise UserError(
            f"site {site.name} states no gpu_memory_gib: the number of nodes cannot be computed",
            "add node.gpus and node.gpu_memory_gib to the site file",
        )
    sizes = model_size(model)
    changes = {"gpus_per_node": node.gpus, "activation_checkpointing": "full"}
    return {way: _smallest(way, stage.model_copy(update=changes), model, sizes, site) for way in WAYS}


def _smallest(way: str, stage: Stage, model: dict[str, Any], sizes: ModelSize, site: Site) -> Fit | None:
    zero = {key: value for key, value in _ZERO[way].items() if key != _SPLIT}
    base = stage.model_copy(
        update={"zero": stage.zero.model_copy(update={"offload_optimizer": "none", "offload_param": "none", **zero})}
    )
    for nodes in node_counts(site.partition_for("gpu").max_nodes):
        ranks = nodes * stage.gpus_per_node
        layouts = _split_layouts(ranks, site, model) if _SPLIT in _ZERO[way] else iter([Parallel()])
        for parallel in layouts:
            for micro in _MICRO_BATCHES:
                changes = {"nodes": nodes, "parallel": parallel, "micro_batch_size": micro}
                if fit := _fit(way, base.model_copy(update=changes), model, sizes, site):
                    return fit
    return None


def node_counts(most: int) -> list[int]:
    """Return the numbers of nodes to try: 1, 2, 3, 4, 6, 8, 12, … and `most`."""
    powers = [2**exponent for exponent in range(most.bit_length())]
    return sorted({count for power in powers for count in (power, 3 * power) if count <= most} | {most})


def _split_layouts(ranks: int, site: Site, model: dict[str, Any]) -> Iterator[Parallel]:
    """Yield the layouts of this number of ranks, smallest split first: tensor ranks in a node, then pipeline, then experts."""
    experts = model.get("n_routed_experts") or model.get("num_experts") or 1
    tensor_ranks = [size for size in (1, 2, 4, 8) if site.node.gpus % size == 0]
    pipeline_ranks = [size for size in (1, 2, 4, 8, 16, 32) if size <= model["num_hidden_layers"]]
    expert_ranks = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if experts % size == 0]
    sizes = [(t, p, e) for t in tensor_ranks for p in pipeline_ranks for e in expert_ranks if ranks % (t * p * e) == 0]
    for tensor, pipeline, expert in sorted(sizes, key=lambda size: (size[0] * size[1], size[2])):
        if tensor * pipeline * expert > 1:
            yield Parallel(tensor=tensor, pipeline=pipeline, expert=expert)


def _fit(way: str, stage: Stage, model: dict[str, Any], sizes: ModelSize, site: Site) -> Fit | None:
    """Return the fit of a stage with this layout; None if it does not fit, or the plan would refuse it."""
    ranks = stage.nodes * stage.gpus_per_node
    try:
        accumulation_steps(stage, data_parallel_size(stage, ranks))
        check_model(stage, model)
    except UserError:
        return None
    fit = Fit(way, stage, estimate_gpu_memory(stage, sizes, ranks))
    limit = USED_SHARE * (site.node.gpu_memory_gib or 0) * GIB
    fits_node = fit.host_gib * GIB <= site.node.memory_mb * 2**20
    return fit if fit.memory.total <= limit and fits_node else None
