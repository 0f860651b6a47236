"""CPU memory of a node: what the ranks of a training need of it, what Slurm gives to the job, and a warning if that is less."""

from __future__ import annotations

from longhaul.config.model_size import ModelSize
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.planning.gpu_memory import GIB, MemoryEstimate, estimate_gpu_memory

PROCESS_BYTES = GIB
"""Memory of a process that has loaded torch, DeepSpeed and transformers (0.8 to 1.2 GB were measured)."""


def training_bytes(stage: Stage, memory: MemoryEstimate, site: Site) -> int:
    """Return the bytes of CPU memory that the ranks of one node need, without copies of saves."""
    rank = PROCESS_BYTES + memory.host
    if not site.node.gpus:
        rank += memory.model_states + memory.activations + memory.logits
    return stage.gpus_per_node * rank


def job_bytes(stage: Stage, site: Site) -> int:
    """Return the bytes of a node's memory that Slurm gives to the job."""
    return int(site.node.memory_mb * 2**20 * _share_of_node(stage, site))


def _share_of_node(stage: Stage, site: Site) -> float:
    if site.scheduler != "slurm" or site.partition_for("gpu").memory != "per_node":
        return 1.0
    return min(1.0, stage.gpus_per_node / (site.node.gpus or site.node.cpus))


def node_memory_warning(stage: Stage, memory: MemoryEstimate | None, sizes: ModelSize | None, site: Site) -> str | None:
    """Return a warning if the ranks of a node need more CPU memory than their job gets, with the nodes that are enough."""
    if memory is None or sizes is None:
        return None
    needed, available = training_bytes(stage, memory, site), job_bytes(stage, site)
    if needed <= available:
        return None
    nodes = _fitting_nodes(stage, sizes, site)
    return (
        f"stages.{stage.name} needs about {needed / GIB:.1f} GiB of CPU memory per node; its job has {available / GIB:.1f} GiB "
        f"(node.memory_mb): the kernel will probably end it. {f'Use {nodes} nodes, or offload' if nodes else 'Offload'} less "
        "or to a disk"
    )


def _fitting_nodes(stage: Stage, sizes: ModelSize, site: Site) -> int | None:
    """Return the first number of nodes, doubled each time, on which the ranks of a node fit."""
    nodes = 2 * stage.nodes
    while nodes <= site.partition_for("gpu").max_nodes:
        more = stage.model_copy(update={"nodes": nodes})
        memory = estimate_gpu_memory(more, sizes, nodes * stage.gpus_per_node, bool(site.node.gpus))
        if training_bytes(more, memory, site) <= job_bytes(more, site):
            return nodes
        nodes *= 2
    return None
