"""Writes the text of a site file from partitions, accounts and probed nodes; comments say what is not known."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence

from longhaul.config.gpu_datasheets import peak_tflops
from longhaul.scheduling.fast_interfaces import fast_interfaces
from longhaul.scheduling.find_partitions import FoundCluster, FoundPartition, minutes_of, places
from longhaul.scheduling.probe_nodes import FoundNode
from longhaul.scheduling.slurm_client import Association
from longhaul.scheduling.slurm_limits import node_limits

_TEST_QOS = re.compile(r"debug|dbg|test|devel|interactive", re.IGNORECASE)


def site_text(name: str, cluster: FoundCluster) -> str:
    """Return the site file."""
    chosen = places(cluster.accepting)
    lines = [
        "# Written by `longhaul site detect`. Check each line that ends in a comment against your centre's guide.",
        f"name: {json.dumps(name)}",
        "scheduler: slurm",
        "partitions:",
    ]
    for partition in dict.fromkeys(chosen.values()):
        jobs = [place for place, found in chosen.items() if found is partition]
        lines += _partition_lines(jobs, partition, cluster)
    lines += _comments_on_others(cluster, [partition.name for partition in chosen.values()])
    lines += ["requeue: false  # JobRequeue is 0"] if cluster.forbids_requeue else []
    node = cluster.node("gpu")
    lines += _network_lines(node, fast_interfaces(node.interfaces) if node else cluster.interfaces)
    lines += ["software: {kind: current}  # or venv, conda, container, srun, modules"]
    return "\n".join([*lines, _accelerator_line(chosen["gpu"], node)]) + "\n"


def _comments_on_others(cluster: FoundCluster, chosen: Sequence[str]) -> Iterator[str]:
    """Yield which partitions are not used, and why where it is known."""
    accepting = [partition.name for partition in cluster.accepting]
    if others := [name for name in accepting if name not in chosen]:
        yield f"# Not used: {', '.join(others)}"
    if cluster.not_up:
        yield f"# Not up now: {', '.join(cluster.not_up)}"
    if closed := [partition.name for partition in cluster.partitions if partition.name not in accepting]:
        yield f"# Not for your groups, or your accounts and their QOS: {', '.join(closed)}"
    if cluster.associations and not any(p.accepts(one) for p in cluster.partitions for one in cluster.associations):
        accounts = ", ".join(sorted({one.account for one in cluster.associations}))
        yield f"# No partition accepts your accounts ({accounts}) and their QOS. Ask your centre which one is for you."


def _accelerator_line(partition: FoundPartition, node: FoundNode | None) -> str:
    if not partition.gpus:
        return "accelerator: cpu"
    if node and node.toolkit:
        newest = "the newest CUDA of the driver" if node.toolkit == "cuda" else "the ROCm of the node"
        if node.version:
            return f'accelerator: {{{node.toolkit}: "{node.version}"}}  # {newest}; write the version of your torch'
    amd = (partition.gpu_type or "").lower().startswith(("mi", "amd"))
    build = '{rocm: "6.4"}' if amd or (node and node.toolkit == "rocm") else '{cuda: "13.0"}'
    return f"accelerator: {build}  # not known to Slurm: the version of your torch"


def _partition_lines(jobs: Sequence[str], partition: FoundPartition, cluster: FoundCluster) -> Iterator[str]:
    yield f"  - jobs: [{', '.join(jobs)}]"
    yield f"    name: {json.dumps(partition.name)}"
    yield from _account_lines(partition, cluster)
    if partition.features:
        yield f"    # constraint: nodes have the features {', '.join(partition.features)}"
    no_limit = "" if partition.max_minutes else "  # the partition has no limit"
    yield f"    max_minutes: {partition.longest_minutes}{_limit_of(partition.limits_time) or no_limit}"
    yield f"    max_nodes: {partition.max_nodes}{_limit_of(partition.limits_nodes)}"
    if not partition.takes_one_node:
        yield f"    # MinNodes: jobs on fewer than {partition.min_nodes} nodes do not start here"
    if partition.is_preemptible:
        others = ", ".join(partition.preempted_by)
        yield f"    # PreemptMode {partition.preempt_mode}: jobs of partition {others} take nodes from jobs here"
    if partition.is_exclusive:
        yield "    exclusive: true"
    gpus, comment = _gpu_keys(partition, cluster.node(jobs[0]))
    yield f"    node: {{cpus: {partition.cpus}, memory_mb: {partition.memory_mb}{gpus}}}{comment}"
    if jobs[0] in cluster.probes and (problem := cluster.probes[jobs[0]].problem):
        yield f"    # the probe found nothing: {' '.join(problem.split())}"  # Slurm's text may have several lines
    yield from _comments_on_nodes(partition)
    if partition.gpu_type:
        yield f"    gpu_type: {json.dumps(partition.gpu_type)}"
    yield from _memory_lines(partition, cluster)


def _comments_on_nodes(partition: FoundPartition) -> Iterator[str]:
    if partition.threads_per_core > 1:
        threads, cores = partition.threads_per_core, max(partition.cpus // partition.threads_per_core, 1)
        yield f"    # threads_per_core: cpus counts {threads} hardware threads of each core; with 1, write cpus: {cores}, too"
    if partition.other_gpus:
        yield f"    # the partition also has {', '.join(partition.other_gpus)}"
    if partition.has_slices:
        yield "    # MIG slices, not whole GPUs: NCCL may not connect them"


def _memory_lines(partition: FoundPartition, cluster: FoundCluster) -> Iterator[str]:
    if cluster.ignores_memory:
        yield "    memory: omit  # Slurm does not count memory here"
    elif partition.memory_mb == 1:
        yield "    memory: omit  # Slurm does not know the memory"
    if partition.memory_mb == 1:
        yield "    # memory_mb: RealMemory is 1; write the memory of the node"


def _limit_of(source: str) -> str:
    """Return a comment about the source of a limit; empty where it is the partition itself."""
    return f"  # limit of {source}" if source else ""


def _account_lines(partition: FoundPartition, cluster: FoundCluster) -> Iterator[str]:
    usable = [association for association in cluster.associations if partition.accepts(association)]
    if usable:
        others = sorted({other.account for other in usable} - {usable[0].account})
        comment = f"  # or {', '.join(others)}" if others else ""
        yield f"    account: {json.dumps(usable[0].account)}{comment}"
        qos = _qos_names(usable[0], partition, cluster)
        if qos:
            yield f"    qos: {json.dumps(qos[0])}" + (f"  # or {', '.join(qos[1:])}" if qos[1:] else "")
        of_job = qos[0] if qos else usable[0].default_qos
        if preempting := cluster.preempting_qos(of_job):
            yield f"    # Preempt: jobs of QOS {', '.join(preempting)} take nodes from jobs of QOS {of_job}"
    elif partition.accounts:
        yield f"    # account: the partition accepts {', '.join(sorted(partition.accounts))}"


def _qos_names(association: Association, partition: FoundPartition, cluster: FoundCluster) -> list[str]:
    """Return the QOS of the account that the partition allows, the one for training first; [] where each job may go without.

    This is the default one. If the partition does not allow that, it is the one with the longest jobs, then with the most
    nodes, but not one for tests or for reservations, or one whose jobs make room for others.
    """

    def rank(name: str) -> tuple[bool, bool, bool, float, float]:
        fields = cluster.qos.get(name, {})
        nodes = node_limits(fields, partition.cpus, partition.gpus).values()
        is_special = bool(_TEST_QOS.search(name)) or "RequiresReservation" in fields.get("Flags", "")
        minutes = minutes_of(fields.get("MaxWall", ""))
        limits = math.inf if minutes is None else minutes, min(nodes, default=math.inf)
        return name == association.default_qos, not is_special, not cluster.preempting_qos(name), *limits

    if partition.qos is None and association.default_qos not in partition.denied_qos:
        return []
    return sorted(sorted(partition.allowed_qos(association)), key=rank, reverse=True)


def _gpu_keys(partition: FoundPartition, node: FoundNode | None) -> tuple[str, str]:
    """Return the keys of `node` about GPUs, and a comment."""
    if not partition.gpus:
        return "", ""
    keys = f", gpus: {partition.gpus}"
    if node is None:
        return keys, "  # gpu_memory_gib, gpu_peak_tflops: not known to Slurm"
    if not node.gpu_names:
        return (
            keys,
            f"  # Slurm counts {partition.gpus} GPUs, and the probe found none on {node.host}; remove gpus if there are none",
        )
    keys += f", gpu_memory_gib: {node.gpu_memory_gib:g}"
    rate = peak_tflops(node.gpu_names[0])
    comment = f"  # {', '.join(dict.fromkeys(node.gpu_names))}"
    if len(node.gpu_names) != partition.gpus:
        comment += f"; Slurm counts {partition.gpus} GPUs, and the probe found {len(node.gpu_names)} on {node.host}"
    return keys + (f", gpu_peak_tflops: {rate:g}" if rate else ""), comment


def _network_lines(node: FoundNode | None, interfaces: Sequence[str]) -> list[str]:
    where = "on a GPU node" if node else "on this machine"
    if not interfaces:
        return [f"interconnect: {{kind: ethernet}}  # no ib or hsn interface {where}; set socket_interface"]
    infiniband = [name for name in interfaces if name.startswith("ib")]
    kind, name = ("infiniband", infiniband[0]) if infiniband else ("ethernet", ",".join(interfaces))
    return [f"interconnect: {{kind: {kind}, socket_interface: {json.dumps(name)}}}  # as {where}"]
