"""Decides whether checkpoints are written while training continues (asynchronous), or training waits, by the node's memory."""

from __future__ import annotations

from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.planning.gpu_memory import MemoryEstimate, available_gib, needed_gib
from longhaul.planning.node_memory import job_bytes, training_bytes


def node_memory_needed(stage: Stage, memory: MemoryEstimate, site: Site) -> int:
    """Return the bytes of CPU memory that the ranks of one node need with asynchronous saves."""
    ranks = stage.gpus_per_node
    # Only the first data-parallel rank saves the model; there is one for each tensor and pipeline rank.
    first = min(ranks, stage.parallel.tensor * stage.parallel.pipeline)
    others = {0: 0, 3: memory.snapshot}.get(stage.zero.stage, memory.snapshot - memory.weights)
    return training_bytes(stage, memory, site) + first * memory.snapshot + (ranks - first) * others


def synchronous_save_reason(stage: Stage, memory: MemoryEstimate | None, site: Site) -> str | None:
    """Return why saves must stop the training until they are on the disk; None where they need not."""
    if stage.zero.offload_optimizer == "nvme":
        return (
            f"stages.{stage.name}: each save stops the training until it is written: the optimizer states are on a disk"
        )
    if memory is None:
        return None
    needed = node_memory_needed(stage, memory, site)
    available = job_bytes(stage, site)
    if needed <= available:
        return None
    return (
        f"stages.{stage.name}: each save stops the training until it is written: training and a copy of the save need "
        f"{needed_gib(needed)} GiB of CPU memory per node, the job gets {available_gib(available)} GiB of node.memory_mb"
    )
