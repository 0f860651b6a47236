"""Which allocation each kind of job asks for, at a site."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from longhaul.config.site_config import Partition, Site
from longhaul.planning.slurm_request import SlurmRequest

if TYPE_CHECKING:
    from longhaul.planning.plan import Plan

_CONTROLLER_MB = 2000  # ample for Snakemake, of which the run's few dozen jobs ask little


def partition_for(site: Site, kind: str) -> Partition | None:
    """The partition that serves cpu, gpu or debug jobs; the gpu partition where the site names no other."""
    if site.partitions is None:
        return None
    return getattr(site.partitions, kind) or site.partitions.gpu


def request(plan: Plan, job: str) -> SlurmRequest:
    config, site = plan.config, plan.site
    verb, _, name = job.partition("-")
    if verb == "train":
        stage = plan.stage(name).stage
        return _gpu_request(site, "gpu", stage.nodes, stage.gpus_per_node, stage.gpus_per_node, stage.minutes)
    if verb in ("environment", "fabric"):
        tasks = plan.check_gpus_per_node if verb == "fabric" else 1
        return _gpu_request(site, "debug", plan.check_nodes, tasks, plan.check_gpus_per_node, config.checks.minutes)
    return _cpu_request(site, config.data_minutes)


def _gpu_request(site: Site, kind: str, nodes: int, tasks: int, gpus: int, minutes: int) -> SlurmRequest:
    partition = partition_for(site, kind)
    # A share of the node's cores for a share of its GPUs, so that two jobs fit where half is asked for.
    share = gpus / (site.node.gpus or site.node.cpus)
    cpus = max(1, int(site.node.cpus * share) // tasks)
    return SlurmRequest(
        nodes=nodes,
        tasks_per_node=tasks,
        cpus_per_task=cpus,
        minutes=min(minutes, partition.max_minutes) if partition else minutes,
        partition=partition.name if partition else "",
        gpus_per_node=gpus if site.node.gpus else 0,
        gpu_request=site.gpu_request,
        gpu_type=site.gpu_type,
        memory_mb=_memory_mb(site, share),
        **_common(site),
    )


def _cpu_request(site: Site, minutes: int) -> SlurmRequest:
    partition = partition_for(site, "cpu")
    return SlurmRequest(
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=site.node.cpus,
        minutes=min(minutes, partition.max_minutes) if partition else minutes,
        partition=partition.name if partition else "",
        memory_mb=_memory_mb(site, 1.0),
        **_common(site),
    )


def controller_request(site: Site) -> SlurmRequest:
    """One core for as long as its partition allows."""
    partition = partition_for(site, "cpu")
    memory_mb = None if site.memory == "omit" else min(_CONTROLLER_MB, site.node.memory_mb)
    request = _cpu_request(site, partition.max_minutes if partition else 1)
    return replace(request, cpus_per_task=1, memory_mb=memory_mb, exclusive=False)


def _memory_mb(site: Site, share: float) -> int | None:
    return {"per_node": max(1, int(site.node.memory_mb * min(1.0, share))), "all": 0, "omit": None}[site.memory]


def _common(site: Site) -> dict[str, Any]:
    return {
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "reservation": site.reservation,
        "exclusive": site.exclusive,
    }
