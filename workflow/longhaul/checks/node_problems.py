"""Facts of all nodes -> what must be mended before training, and what is worth a look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longhaul.jobs.specs import EnvironmentSpec

GB = 10**9
# NCCL and gloo pass buffers between the ranks of a node through /dev/shm.
MIN_SHARED_MEMORY_BYTES = 256 * 2**20
# Nodes of one kind differ by what their firmware and kernel keep, a lost memory module by more.
MEMORY_TOLERANCE = 0.03

# interconnect.kind -> the link layer of its ports (environment.facts.rdma_ports).
LINK_LAYERS = {"infiniband": "InfiniBand", "roce": "Ethernet"}

# DeepSpeed does not say of every op what it lacks.
_NEEDS = {"async_io": "; it needs libaio with its headers (libaio-dev), and CUDA's toolkit on a node with GPUs"}

Facts = Mapping[str, Any]


def problems(nodes: Sequence[Facts], job: EnvironmentSpec) -> list[str]:
    """One line for everything that would break training; empty when all is well."""
    found = _differences(nodes)
    for node in nodes:
        found += [f"{node['host']}: {text}" for text in _node_problems(node, job)]
    return found + _port_problems(nodes, job) + _clock_problems(nodes, job)


def warnings(nodes: Sequence[Facts], tested: Mapping[str, str]) -> list[str]:
    """Worth a look: untested versions, little shared memory, less memory than elsewhere, what was cleared."""
    found = [
        f"{package} {value} is installed; longhaul is tested with {tested[package]}"
        for package, value in nodes[0]["versions"].items()
        if value and package in tested and value.split("+")[0] != tested[package]
    ]
    for node in nodes:
        free = node["shared_memory_bytes"]
        if free is not None and free < MIN_SHARED_MEMORY_BYTES:
            found.append(f"{node['host']}: /dev/shm has {free / 2**20:.0f} MiB free; ranks of one node talk through it")
        most = max(other["memory_bytes"] for other in nodes)
        if node["memory_bytes"] < (1 - MEMORY_TOLERANCE) * most:
            found.append(
                f"{node['host']}: {node['memory_bytes'] / 2**30:.1f} GiB of memory, another node has {most / 2**30:.1f} GiB"
            )
        if node["ops"]["cleared"]:
            found.append(
                f"{node['host']}: cleared the build locks that a killed job left: {', '.join(node['ops']['cleared'])}"
            )
        if cleared := node.get("swap", {}).get("cleared"):
            found.append(f"{node['host']}: removed the optimizer states that killed ranks left: {', '.join(cleared)}")
    return found


def _differences(nodes: Sequence[Facts]) -> list[str]:
    """Versions and GPUs that are not the same on all nodes, with who has which."""
    found = []
    for name in nodes[0]["versions"]:
        found += _difference(name, {node["host"]: str(node["versions"].get(name)) for node in nodes})
    gpus = {node["host"]: _gpus_text(node["gpus"]) for node in nodes}
    return found + _difference("GPUs", gpus)


def _difference(name: str, by_host: Mapping[str, str]) -> list[str]:
    hosts: dict[str, list[str]] = {}
    for host, value in by_host.items():
        hosts.setdefault(value, []).append(host)
    if len(hosts) == 1:
        return []
    text = "; ".join(f"{value} on {', '.join(names)}" for value, names in hosts.items())
    return [f"{name} is not the same on all nodes: {text}"]


def _gpus_text(gpus: Sequence[Facts]) -> str:
    counts: dict[str, int] = {}
    for gpu in gpus:
        name = f"{gpu['name']} {gpu['memory_bytes'] / 2**30:.0f} GiB"
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"


def _node_problems(node: Facts, job: EnvironmentSpec) -> list[str]:
    return [
        *_build_problems(node, job),
        *_memory_problems(node, job),
        *_disk_problems(node, job),
        *_op_problems(node, job),
        *_swap_problems(node, job),
    ]


def _build_problems(node: Facts, job: EnvironmentSpec) -> list[str]:
    found, versions = [], node["versions"]
    if versions["cuda_build"] != job.cuda_build:
        found.append(f"torch is a {versions['cuda_build']} build, the site file says cuda_build: {job.cuda_build}")
    if versions["deepspeed"] is None:
        found.append("deepspeed is not installed")
    if job.cuda_build == "cpu":
        return found
    if len(node["gpus"]) < job.gpus_per_node:
        driver = versions["driver"] or "none found"
        found.append(f"torch can use {len(node['gpus'])} GPUs, {job.gpus_per_node} are needed (driver: {driver})")
    return found


def _memory_problems(node: Facts, job: EnvironmentSpec) -> list[str]:
    found_mb = node["memory_bytes"] // 2**20
    if found_mb >= job.memory_mb:
        return []
    return [f"the node has {found_mb} MiB of memory, the site file says node.memory_mb: {job.memory_mb}"]


def _disk_problems(node: Facts, job: EnvironmentSpec) -> list[str]:
    if node["write_error"]:
        return [f"cannot write to {job.folder}: {node['write_error']}"]
    if not node["sees_run_folder"]:
        return [f"{job.folder} is not the folder that the first node sees: it must be on a shared file system"]
    free, wanted = node["disk_free_bytes"], job.checks.min_disk_free_gb
    if free is not None and free < wanted * GB:
        return [f"{job.folder} has {free / GB:.1f} GB free, checks.min_disk_free_gb asks for {wanted:g}"]
    return []


def _op_problems(node: Facts, job: EnvironmentSpec) -> list[str]:
    if job.prebuild_ops and not node["compiler"]:
        return [f"no C++ compiler (c++ or $CXX), and optimizer offload needs {', '.join(job.prebuild_ops)} compiled"]
    return [
        f"DeepSpeed's {op} does not build: {reason}{_NEEDS.get(op, '')}" for op, reason in node["ops"]["failed"].items()
    ]


def _swap_problems(node: Facts, job: EnvironmentSpec) -> list[str]:
    """Of optimizer states or weights that are to lie on the node's disk."""
    swap = node.get("swap")
    if not swap:
        return []
    found, folder = [], f"storage.scratch {swap['folder']}"
    if swap["error"]:
        found.append(f"{folder} takes no unbuffered writes ({swap['error']}), as offloading to nvme makes them")
    free, lockable = swap["free_bytes"], swap["lockable_bytes"]
    if free is not None and free < job.swap_bytes:
        found.append(
            f"{folder} has {free / GB:.1f} GB free; what this node's ranks offload takes {job.swap_bytes / GB:.1f} GB"
        )
    if lockable is not None and lockable < job.locked_bytes:
        found.append(
            f"a process may lock {lockable / GB:.3f} GB of memory (ulimit -l); offloading to nvme locks "
            f"{job.locked_bytes / GB:.3f} GB in each"
        )
    return found


def _port_problems(nodes: Sequence[Facts], job: EnvironmentSpec) -> list[str]:
    """NCCL falls back to sockets in silence where it finds no port, and goes as fast as the node with the fewest."""
    layer = LINK_LAYERS.get(job.interconnect)
    if layer is None or len(nodes) == 1:
        return []
    counts = {node["host"]: node["rdma_ports"].count(layer) for node in nodes}
    missing = [
        f"{host}: no active {layer} port in /sys/class/infiniband, the site file says interconnect.kind: {job.interconnect}"
        for host, count in counts.items()
        if not count
    ]
    return missing or _difference(f"number of active {layer} ports", {host: str(n) for host, n in counts.items()})


def _clock_problems(nodes: Sequence[Facts], job: EnvironmentSpec) -> list[str]:
    limit = job.checks.max_clock_skew_s
    return [
        f"{node['host']}: clock is {node['clock_skew_s']:+.1f} s from that of {nodes[0]['host']}, "
        f"checks.max_clock_skew_s allows {limit:g}"
        for node in nodes
        if abs(node["clock_skew_s"]) > limit
    ]
