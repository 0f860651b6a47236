"""Decides what the environment check refuses (problems) and what it only warns of: versions, GPUs, memory, disk, RDMA, clocks.
Problems stop the run, warnings do not.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from longhaul.checks.hardware_checks import LINK_LAYERS, SHARED_FOLDER_WAIT_S
from longhaul.checks.hung_steps import COMMANDS, GPUS, hangs
from longhaul.jobs.container import SHARED_MEMORY
from longhaul.jobs.kinds.environment_job import EnvironmentSpec
from longhaul.jobs.kinds.fabric_job import FEWEST_COMPARED_NODES

GB = 10**9
MIN_SHARED_MEMORY_BYTES = 256 * 2**20
"""NCCL and gloo pass buffers between the ranks of a node through /dev/shm."""
FEWEST_SHARED_MEMORY_BYTES = 16 * 2**20
"""With less, /dev/shm counts as full."""
MEMORY_TOLERANCE = 0.03
"""Firmware and kernel reserve slightly different amounts on nodes of one kind. A lost memory module is a larger difference."""
_OP_REQUIREMENTS = {
    "async_io": "it needs libaio with its headers (libaio-dev), and the CUDA toolkit on a node with GPUs"
}
"""Requirements that DeepSpeed's own messages do not name."""
_ONE_ENVIRONMENT = "give all nodes one environment (software in the site file)"
_ONE_KIND = "use nodes of one kind (constraint or gpu_type of the partition)"

Facts = Mapping[str, Any]


def node_problems(nodes: Sequence[Facts], job: EnvironmentSpec) -> list[str]:
    """Return one line for each problem that would make training fail, with its remedy. `nodes` begins with the first node."""
    found = _version_and_gpu_differences(nodes)
    for node in nodes:
        found += [f"{node['host']}: {text}" for text in problems_of_node(node, job)]
    return found + _port_problems(nodes, job) + _clock_problems(nodes, job)


def node_warnings(nodes: Sequence[Facts], tested: Mapping[str, str]) -> list[str]:
    """Return one line for each untested version, shortage of memory, and leftover of killed jobs that was removed.

    tested: package -> tested version
    """
    found = [
        f"{package} {value} is installed; longhaul is tested with {tested[package]}"
        for package, value in nodes[0]["versions"].items()
        if value and package in tested and value.split("+")[0] != tested[package]
    ]
    largest_bytes = max(node["memory_bytes"] for node in nodes)
    for node in nodes:
        found += [f"{node['host']}: {text}" for text in _warnings_of_node(node, largest_bytes)]
    return found


def _warnings_of_node(node: Facts, largest_bytes: int) -> list[str]:
    """Return the warnings of one node. largest_bytes: memory of the node with the most memory."""
    found, free = [], node["shared_memory_bytes"]
    if free is not None and FEWEST_SHARED_MEMORY_BYTES <= free < MIN_SHARED_MEMORY_BYTES:
        found.append(f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free; ranks of one node communicate through it")
    if node["memory_bytes"] < (1 - MEMORY_TOLERANCE) * largest_bytes:
        memory, largest = node["memory_bytes"] / 2**30, largest_bytes / 2**30
        found.append(f"the node has {memory:.1f} GiB of memory, another node has {largest:.1f} GiB")
    if removed := node["ops"]["removed"]:
        found.append(f"removed the build locks that a killed job left: {', '.join(removed)}")
    if removed := node.get("swap", {}).get("removed"):
        found.append(f"removed the optimizer states that killed ranks left: {', '.join(removed)}")
    return found


def _version_and_gpu_differences(nodes: Sequence[Facts]) -> list[str]:
    """Return one line for each version or GPU that is not the same on all nodes that state it."""
    found = []
    for name in dict.fromkeys(name for node in nodes for name in node["versions"]):
        remedy = "let the admins install one driver" if name == "driver" else _ONE_ENVIRONMENT
        known = {node["host"]: str(node["versions"][name]) for node in nodes if name in node["versions"]}
        found += _difference(name, known, remedy)
    gpus = {node["host"]: _gpus_text(node["gpus"]) for node in nodes if not hangs(node, GPUS)}
    return found + _difference("GPUs", gpus, _ONE_KIND)


def _difference(name: str, value_of_host: Mapping[str, str], remedy: str) -> list[str]:
    """Return a line that names the hosts of each value, or [] when all hosts have the same value."""
    hosts: dict[str, list[str]] = {}
    for host, value in value_of_host.items():
        hosts.setdefault(value, []).append(host)
    if len(hosts) < 2:
        return []
    text = "; ".join(f"{value} on {', '.join(names)}" for value, names in hosts.items())
    return [f"{name} is not the same on all nodes: {text}; {remedy}"]


def _gpus_text(gpus: Sequence[Facts]) -> str:
    counts: dict[str, int] = {}
    for gpu in gpus:
        name = f"{gpu['name']} {gpu['memory_bytes'] / 2**30:.0f} GiB"
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"


class Problem(NamedTuple):
    """A problem of one node, and the remedy; "" where the text says it."""

    text: str
    remedy: str

    def __str__(self) -> str:
        return "; ".join(filter(None, self))


def problems_of_node(node: Facts, job: EnvironmentSpec) -> list[Problem]:
    """Return the problems of one node that need no comparison with others."""
    return [
        *_software_problems(node, job),
        *_memory_problems(node, job),
        *_shared_memory_problems(node),
        *_disk_problems(node, job),
        *_op_problems(node, job),
        *_offload_problems(node, job),
    ]


def _shared_memory_problems(node: Facts) -> list[Problem]:
    free = node["shared_memory_bytes"]
    if free is None or free >= FEWEST_SHARED_MEMORY_BYTES:
        return []
    text = f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, {FEWEST_SHARED_MEMORY_BYTES / 2**20:.0f} MiB are needed"
    return [Problem(text, "remove files that killed jobs left there")]


def _software_problems(node: Facts, job: EnvironmentSpec) -> list[Problem]:
    """Return problems of torch, DeepSpeed and the number of GPUs that torch can use."""
    found, versions = list[Problem](), node["versions"]
    if versions.get("build", job.build) != job.build:
        text = f"torch is built for {versions['build']}, the site file says accelerator: {job.build}"
        found.append(Problem(text, f"install torch for {job.build} in the job environment, or correct accelerator"))
    if versions.get("deepspeed", "") is None:
        found.append(Problem("deepspeed is not installed", "pip install 'longhaul[job]' in the job environment"))
    if job.build != "cpu" and len(node["gpus"]) < job.gpus_per_node and not hangs(node, GPUS):
        driver = versions.get("driver") or "none found"
        text = f"torch can use {len(node['gpus'])} GPUs, {job.gpus_per_node} are needed (driver: {driver})"
        found.append(Problem(text, "exclude the node, or lower gpus_per_node"))
    return found


def _memory_problems(node: Facts, job: EnvironmentSpec) -> list[Problem]:
    found_mb = node["memory_bytes"] // 2**20
    if found_mb >= job.memory_mb:
        return []
    text = f"the node has {found_mb} MiB of memory, the site file says node.memory_mb: {job.memory_mb}"
    return [Problem(text, "exclude the node, or correct node.memory_mb")]


def _disk_problems(node: Facts, job: EnvironmentSpec) -> list[Problem]:
    if node["write_error"]:
        return [
            Problem(f"cannot write to {job.folder}: {node['write_error']}", "let this user write there on all nodes")
        ]
    if node.get("run_folder_seen_after_s", 0.0) is None:
        text = f"{job.folder} is not the folder that the first node sees: it must be on a shared file system"
        return [Problem(text, "mount it")]
    if node.get("own_file_seen_after_s", 0.0) is None:
        text = f"files that this node writes to {job.folder} are not visible on the first node after {SHARED_FOLDER_WAIT_S:g} s"
        return [Problem(text, "mount the same folder on all nodes, without a cache for writes")]
    free, minimum = node["disk_free_bytes"], job.checks.min_disk_free_gb
    if free is not None and free < minimum * GB:
        text = f"{job.folder} has {free / GB:.1f} GB free, checks.min_disk_free_gb is {minimum:g}"
        return [Problem(text, "free space, or lower the limit")]
    return []


def _op_problems(node: Facts, job: EnvironmentSpec) -> list[Problem]:
    if job.prebuild_ops and not node["compiler"] and not hangs(node, COMMANDS):
        text = f"no C++ compiler (c++ or $CXX), but optimizer offload needs {', '.join(job.prebuild_ops)} compiled"
        return [Problem(text, "install g++ in the job environment, or load a module")]
    return [
        Problem(f"DeepSpeed's {op} does not build: {reason}", _OP_REQUIREMENTS.get(op, ""))
        for op, reason in node["ops"]["failed"].items()
    ]


def _offload_problems(node: Facts, job: EnvironmentSpec) -> list[Problem]:
    """Return problems of offloading optimizer states or weights to the node's disk."""
    swap = node.get("swap")
    if not swap:
        return []
    found, folder = list[Problem](), f"storage.scratch {swap['folder']}"
    if swap["error"]:
        text = f"{folder} does not support unbuffered writes ({swap['error']}), which offloading to nvme needs"
        found.append(Problem(text, "choose a folder on a disk"))
    free, lockable = swap["free_bytes"], swap["lockable_bytes"]
    if free is not None and free < job.swap_bytes:
        text = f"{folder} has {free / GB:.1f} GB free; the ranks of this node offload {job.swap_bytes / GB:.1f} GB"
        found.append(Problem(text, "free space, or offload to cpu"))
    if lockable is not None and lockable < job.locked_bytes:
        text = (
            f"a process may lock {lockable / GB:.3f} GB of memory (ulimit -l); offloading to nvme locks "
            f"{job.locked_bytes / GB:.3f} GB in each process"
        )
        found.append(Problem(text, "let the admins raise the limit"))
    return found


def _port_problems(nodes: Sequence[Facts], job: EnvironmentSpec) -> list[str]:
    """Return nodes without active ports for RDMA, or with fewer than others.

    Without a port NCCL uses sockets and gives no message. Collectives run at the speed of the node with the fewest ports.
    """
    layer = LINK_LAYERS.get(job.interconnect)
    if layer is None or len(nodes) == 1:
        return []
    counts = {
        node["host"]: sum(port.is_active and port.link_layer == layer for port in node["hardware"].ports)
        for node in nodes
        if node["hardware"]
    }
    missing = [
        f"{host}: no active {layer} port in /sys/class/infiniband, the site file says interconnect.kind: {job.interconnect}; "
        "exclude the node, or correct interconnect.kind"
        for host, count in counts.items()
        if not count
    ]
    remedy = "exclude the node with fewer ports, or let the admins repair it"
    return missing or _difference(
        f"number of active {layer} ports", {host: str(n) for host, n in counts.items()}, remedy
    )


def _clock_problems(nodes: Sequence[Facts], job: EnvironmentSpec) -> list[str]:
    """Return the nodes whose clock is far from the median of all clocks; of two nodes, far from the first one's."""
    maximum, skews_s = job.checks.max_clock_skew_s, [node["clock_skew_s"] for node in nodes]
    right_s, whose = statistics.median(skews_s), "the median of all nodes"
    if len(nodes) < FEWEST_COMPARED_NODES:
        right_s, whose = skews_s[0], f"that of {nodes[0]['host']}"
    return [
        f"{node['host']}: clock is {skew_s - right_s:+.1f} s from {whose}, "
        f"checks.max_clock_skew_s is {maximum:g}; let the admins synchronise the clocks, or raise the limit"
        for node, skew_s in zip(nodes, skews_s, strict=True)
        if abs(skew_s - right_s) > maximum
    ]
