"""CPU memory of a node: what the ranks of a training need of it, what Slurm gives to the job, and a warning if that is less."""

from __future__ import annotations

from collections.abc import Iterator

from longhaul.config.model_size import ModelSize
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.planning.gpu_memory import GIB, MemoryEstimate, available_gib, estimate_gpu_memory, needed_gib
from longhaul.planning.memory_remedies import is_allowed, micro_batch_settings, settings_text
from longhaul.planning.slurm_request import gpu_request

PROCESS_BYTES = GIB
"""Memory of a process that has loaded torch, DeepSpeed and transformers (0.8 to 1.2 GB were measured)."""


def training_bytes(stage: Stage, memory: MemoryEstimate, site: Site) -> int:
    """Return the bytes of CPU memory that the ranks of one node need, without copies of saves."""
    rank = PROCESS_BYTES + memory.host
    if not site.node.gpus:
        rank += memory.model_states + memory.activations + memory.logits
    return stage.gpus_per_node * rank


def job_bytes(stage: Stage, site: Site) -> int:
    """Return the bytes of a node's memory that the job gets: what its request asks Slurm for, else the whole node."""
    ranks = stage.gpus_per_node
    request = gpu_request(site, place="gpu", nodes=stage.nodes, tasks=ranks, gpus=ranks, minutes=stage.minutes)
    asked_mb = request.memory_mb if site.scheduler == "slurm" else None
    return (asked_mb or site.node.memory_mb) * 2**20


def node_memory_warning(stage: Stage, memory: MemoryEstimate | None, sizes: ModelSize | None, site: Site) -> str | None:
    """Return a warning if the ranks of a node need more CPU memory than their job gets, with changes that are enough."""
    if memory is None or sizes is None:
        return None
    needed, available = training_bytes(stage, memory, site), job_bytes(stage, site)
    if needed <= available:
        return None
    remedies = ", or ".join(_remedies(stage, needed, sizes, site)) or "use nodes with more memory, or a smaller model"
    return (
        f"stages.{stage.name} needs about {needed_gib(needed)} GiB of CPU memory per node; its job gets "
        f"{available_gib(available)} GiB ({_source(stage, available, site)}): the kernel will probably end it. "
        f"{remedies[0].upper()}{remedies[1:]}"
    )


def _source(stage: Stage, available: int, site: Site) -> str:
    """Return where the memory of the job follows from."""
    node = site.node
    if available == node.memory_mb * 2**20:
        return "node.memory_mb"
    whole = f"{node.gpus} GPUs" if node.gpus else f"{node.cpus} cores"
    return f"the part of node.memory_mb for {stage.gpus_per_node} of {whole}"


def _remedies(stage: Stage, needed: int, sizes: ModelSize, site: Site) -> Iterator[str]:
    """Yield changes that are enough, each alone. Less offload comes without a number: it needs memory of the GPUs instead."""

    def fits(other: Stage) -> bool:
        memory = estimate_gpu_memory(other, sizes, other.nodes * other.gpus_per_node, bool(site.node.gpus))
        return training_bytes(other, memory, site) <= job_bytes(other, site)

    if keys := next((keys for keys, other in micro_batch_settings(stage) if fits(other)), None):
        yield settings_text(keys)
    if nodes := next((other.nodes for other in _on_more_nodes(stage, site) if fits(other)), None):
        yield f"use {nodes} nodes"
    if job_bytes(stage, site) < needed <= site.node.memory_mb * 2**20:
        yield "set memory of the partition to all in the site file"
    if "cpu" in (stage.zero.offload_optimizer, stage.zero.offload_param):
        yield "offload less or to a disk"
    if stage.activation_checkpointing == "offload":
        yield "set activation_checkpointing to full"


def _on_more_nodes(stage: Stage, site: Site) -> Iterator[Stage]:
    """Yield the stage on twice as many nodes each time, where its layout and its batch allow that."""
    nodes = 2 * stage.nodes
    while nodes <= site.partition_for("gpu").max_nodes:
        more = stage.model_copy(update={"nodes": nodes})
        if is_allowed(more, nodes * stage.gpus_per_node):
            yield more
        nodes *= 2
