"""Decides whether checkpoints are written while training continues (asynchronous), or training waits, by the node's memory."""

from __future__ import annotations

from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.planning.gpu_memory import GIB, MemoryEstimate

PROCESS_BYTES = GIB
"""Memory of a process that has loaded torch, DeepSpeed and transformers (0.8 to 1.2 GB were measured)."""


def node_memory_needed(stage: Stage, memory: MemoryEstimate, site: Site) -> int:
    """Return the bytes of CPU memory that the ranks of one node need with asynchronous saves."""
    ranks = stage.gpus_per_node
    training = PROCESS_BYTES + memory.host
    if not site.node.gpus:
        training += memory.model_states + memory.activations + memory.logits
    # Only the first data-parallel rank saves the model; there is one for each tensor and pipeline rank.
    first = min(ranks, stage.parallel.tensor * stage.parallel.pipeline)
    others = {0: 0, 3: memory.snapshot}.get(stage.zero.stage, memory.snapshot - memory.weights)
    return ranks * training + first * memory.snapshot + (ranks - first) * others


def synchronous_save_reason(stage: Stage, memory: MemoryEstimate | None, site: Site) -> str | None:
    """Return why saves must stop the training until they are on the disk; None where they need not."""
    if stage.zero.offload_optimizer == "nvme":
        return (
            f"stages.{stage.name}: each save stops the training until it is written: the optimizer states are on a disk"
        )
    if memory is None:
        return None
    needed = node_memory_needed(stage, memory, site)
    available = int(site.node.memory_mb * 2**20 * _share_of_node(stage, site))
    if needed <= available:
        return None
    return (
        f"stages.{stage.name}: each save stops the training until it is written: training and a copy of the save need "
        f"{needed / GIB:.1f} GiB of CPU memory per node, the job has {available / GIB:.1f} GiB (node.memory_mb)"
    )


def _share_of_node(stage: Stage, site: Site) -> float:
    """Return the share of a node's memory that Slurm gives to the job."""
    if site.scheduler != "slurm" or site.partition_for("gpu").memory != "per_node":
        return 1.0
    return min(1.0, stage.gpus_per_node / (site.node.gpus or site.node.cpus))
