"""Classifies hardware and limits of all nodes, one table row each, and warns of what differs between nodes: GPUs, PCIe, CPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from longhaul.artifacts.node_check_row import CheckRow, Result
from longhaul.checks.amd_gpu_checks import amd_kernel_log_rows, amd_rows
from longhaul.checks.build_check_rows import Component, FactCheck, fail_if, merge_equal_rows, warn_if
from longhaul.checks.compare_rates_with_limits import RateLimits
from longhaul.checks.core_speed import CoreSpeed, core_speed_rows
from longhaul.checks.hardware_facts import HardwareFacts
from longhaul.checks.hung_steps import hung_step_rows
from longhaul.checks.judge_measurements import measurement_rows
from longhaul.checks.network_interfaces import InterfaceFacts
from longhaul.checks.nvidia_gpu_checks import kernel_log_rows, nvidia_rows
from longhaul.checks.pcie_checks import pcie_rows
from longhaul.checks.port_checks import port_rows
from longhaul.checks.process_limits import ProcessLimits
from longhaul.jobs.kinds.environment_job import EnvironmentSpec

LINK_LAYERS = {"infiniband": "InfiniBand", "roce": "Ethernet"}
"""interconnect.kind in the site file -> link layer of the nodes' ports."""
# NFS clients may hide a new file until their directory cache expires.
SHARED_FOLDER_WAIT_S = 10.0
_MIN_OPEN_FILES = _MIN_PROCESSES = 4096
_MIN_LOCKED_BYTES = 64 * 2**20
"""RDMA registers its buffers as locked memory. Linux's default of 64 KiB or 8 MiB makes ibv_reg_mr fail."""

_MEMORY_CHECKS = (
    FactCheck("uncorrectable memory errors", "memory_uncorrected", "0", fail_if(lambda count: count > 0),
              "drain the node; the memory module must be replaced (dmesg names it)"),
    FactCheck("corrected memory errors", "memory_corrected", "0", warn_if(lambda count: count > 0),
              "watch whether the number grows"),
)  # fmt: skip
_CPU_CHECKS = (
    FactCheck("frequency governor", "governors", "performance", warn_if(lambda found: set(found) != {"performance"}),
              "set it: cpupower frequency-set -g performance",
              lambda found: ", ".join(f"{name} on {count} cores" for name, count in found.items())),
    FactCheck("transparent huge pages", "huge_pages", "always or madvise", warn_if(lambda word: word == "never"),
              "enable them in /sys/kernel/mm/transparent_hugepage/enabled"),
)  # fmt: skip
_NO_RDMA_VERSION = (
    "there is no /sys/module/mlx5_core/version, as with the kernel's own driver and with adapters of other vendors"
)


class Stated(NamedTuple):
    """A value as text, or why the node does not state it. Both are empty where the value means nothing."""

    value: str = ""
    reason: str = ""


Nodes = Sequence[Mapping[str, Any]]
"""Facts of node_facts.py, one mapping per node."""


def hardware_rows(nodes: Nodes, job: EnvironmentSpec) -> list[CheckRow]:
    """Return the rows of all nodes. Components of a node that are ok with the same value share a row."""
    measured, all_nodes = {node["host"]: node["measured"] for node in nodes if node["measured"]}, nodes
    nodes = [node for node in nodes if node["hardware"]]  # what a hung step hides is compared with no other node
    uses_rdma = job.interconnect in LINK_LAYERS and len(nodes) > 1
    rows = [
        *(row for node in all_nodes for row in hung_step_rows(node)),
        *measurement_rows(measured, RateLimits(job.minimums, job.baseline, _gpu_name(nodes, job))),
        *_gpu_rows(nodes, job),
        *core_speed_rows(_core_speeds(all_nodes), owns_cores=job.build != "cpu"),
        *(_port_rows(nodes, job) if len(nodes) > 1 else ()),
        *(pcie_rows({node["host"]: node["hardware"] for node in nodes}) if job.build != "cpu" else ()),
        *(row for node in nodes for row in _node_rows(node, job, uses_rdma)),
        *_equality_rows(nodes, job, uses_rdma),
    ]
    return merge_equal_rows(rows)


def _core_speeds(nodes: Nodes) -> dict[str, CoreSpeed]:
    return {node["host"]: node["core_speed"] for node in nodes if "core_speed" in node}


def _gpu_rows(nodes: Nodes, job: EnvironmentSpec) -> list[CheckRow]:
    hardware: dict[str, HardwareFacts] = {node["host"]: node["hardware"] for node in nodes}
    if job.build.startswith("rocm"):
        rows = amd_rows({node: facts.amd_gpus for node, facts in hardware.items()}, job.gpus_per_node)
        for node, facts in hardware.items():
            rows += amd_kernel_log_rows(node, facts.kernel_log, facts.amd_gpus, job.gpus_per_node)
        return rows
    if not job.build.startswith("cuda"):
        return []
    min_nvlinks = job.minimums.nvlinks if job.gpus_per_node > 1 else 0  # a GPU alone sends nothing over NVLinks
    rows = nvidia_rows({node: facts.gpus for node, facts in hardware.items()}, job.gpus_per_node, min_nvlinks)
    for node, facts in hardware.items():
        rows += kernel_log_rows(node, facts.kernel_log, facts.gpus, job.gpus_per_node)
    return rows


def _equality_rows(nodes: Nodes, job: EnvironmentSpec, uses_rdma: bool) -> Iterator[CheckRow]:
    """Yield the rows of values that are usually equal on all nodes of a partition."""
    hardware: dict[str, HardwareFacts] = {node["host"]: node["hardware"] for node in nodes}

    def same(check: str, stated: Callable[[HardwareFacts], Stated]) -> Iterator[CheckRow]:
        return _same_everywhere(check, {node: stated(facts) for node, facts in hardware.items()})

    yield from _same_everywhere("cores of the job", {node["host"]: Stated(str(node["cpus"])) for node in nodes})
    yield from same("CPU model", _cpu_model)
    yield from same("NUMA nodes", _numa_nodes)
    yield from same("memory modules", _memory_modules)
    yield from same("RDMA driver (OFED)", lambda facts: _rdma_driver(facts, uses_rdma))
    yield from same("adapters next to GPUs", lambda facts: _affinity(facts, uses_rdma and job.build != "cpu"))
    yield from same("paths between GPUs", _gpu_paths)


def _gpu_name(nodes: Nodes, job: EnvironmentSpec) -> str:
    """Return the name of the GPUs; nodes with other GPUs are a problem of their own. "": nodes without GPUs."""
    names = (gpu["name"] for node in nodes for gpu in node["gpus"])
    return "" if job.build == "cpu" else next(names, "")


def _visible_rows(component: Component, node: Mapping[str, Any]) -> Iterator[CheckRow]:
    """Yield the rows of files of other nodes. A folder that is not shared is a problem of the run, not of a node."""
    expected = f"within {SHARED_FOLDER_WAIT_S:g} s"
    if "run_folder_seen_after_s" not in node:  # the run folder of some node hangs
        return
    for check, seen_after_s in (
        ("file of the first node is visible", node["run_folder_seen_after_s"]),
        ("own file is visible to the first node", node["own_file_seen_after_s"]),
    ):
        if seen_after_s is None:
            yield component.unknown(check, "this node and the first one do not see the same run folder", expected)
        else:
            yield component.row(check, f"after {seen_after_s:.1f} s", expected)


def _node_rows(node: Mapping[str, Any], job: EnvironmentSpec, uses_rdma: bool) -> list[CheckRow]:
    component, facts = Component(node["host"]), node["hardware"]
    rows = [*_visible_rows(component, node)]
    rows += component.judged(_MEMORY_CHECKS, facts.cpu_and_memory)
    if job.build != "cpu":
        rows += component.judged(_CPU_CHECKS, facts.cpu_and_memory)
    rows += _limit_rows(component, facts.limits, uses_rdma)
    if uses_rdma and job.build.startswith("cuda") and not facts.peer_memory:
        reason = (
            "the module nvidia_peermem is not loaded; DMA-BUF can replace it, and only NCCL's log says whether it does"
        )
        rows.append(component.unknown("GPUDirect RDMA", reason, "nvidia_peermem or DMA-BUF", "modprobe nvidia_peermem"))
    return rows


def _limit_rows(component: Component, limits: ProcessLimits, uses_rdma: bool) -> Iterator[CheckRow]:
    limited = (
        ("open files (ulimit -n)", limits.open_files, _MIN_OPEN_FILES),
        ("processes (ulimit -u)", limits.processes, _MIN_PROCESSES),
    )
    for check, value, minimum in limited:
        result: Result = "warn" if value is not None and value < minimum else "ok"
        yield component.row(check, _limit_text(value), f">= {minimum}", result, "raise the limit on the compute nodes")
    if uses_rdma:
        locked = limits.locked_bytes
        result = "ok" if locked is None else "fail" if locked < _MIN_LOCKED_BYTES else "warn"
        remedy = "let the admins remove the limit for Slurm's jobs (LimitMEMLOCK=infinity of slurmd)"
        yield component.row("locked memory (ulimit -l)", _limit_text(locked), "unlimited", result, remedy)


def _limit_text(value: int | None) -> str:
    return "unlimited" if value is None else f"{value:,}"


def _port_rows(nodes: Nodes, job: EnvironmentSpec) -> Iterator[CheckRow]:
    layer = LINK_LAYERS.get(job.interconnect)
    ports = {node["host"]: [port for port in node["hardware"].ports if port.link_layer == layer] for node in nodes}
    yield from port_rows(ports, job.minimums.port_gbit_per_s)
    interfaces = {node["host"]: _used_interfaces(node["hardware"], job) for node in nodes}
    yield from port_rows(interfaces, None if layer else job.minimums.port_gbit_per_s)
    for name in dict.fromkeys(one.name for found in interfaces.values() for one in found):
        unread = f"/sys/class/net/{name}/mtu cannot be read"
        found = {node: one.mtu for node, own in interfaces.items() for one in own if one.name == name}
        yield from _same_everywhere(f"MTU of {name}", {node: _stated(mtu, unread) for node, mtu in found.items()})


def _used_interfaces(facts: HardwareFacts, job: EnvironmentSpec) -> list[InterfaceFacts]:
    """Return the interfaces of sockets and of Slingshot. A name in the site file is a prefix, as for NCCL_SOCKET_IFNAME.

    The model of the card tells the rate of Slingshot alone: RDMA ports have their own rows, and sockets may use a slow card.
    """
    prefixes = tuple(filter(None, (job.socket_interface or "").split(",")))
    used = [one for one in facts.interfaces if one.is_slingshot or one.name.startswith(prefixes)]
    has_model = job.interconnect not in LINK_LAYERS
    return [one if has_model and one.is_slingshot else replace(one, adapter="") for one in used]


def _stated(value: object, reason: str) -> Stated:
    return Stated(str(value)) if value else Stated(reason=reason)


def _cpu_model(facts: HardwareFacts) -> Stated:
    return _of_cpu_and_memory(facts, "model", str)


def _numa_nodes(facts: HardwareFacts) -> Stated:
    return _of_cpu_and_memory(facts, "numa_nodes", str)


def _memory_modules(facts: HardwareFacts) -> Stated:
    """Return the memory modules as `16 x 65536 MiB`."""

    def text(sizes_mib: Sequence[int]) -> str:
        return ", ".join(f"{count} x {size} MiB" for size, count in sorted(Counter(sizes_mib).items()))

    return _of_cpu_and_memory(facts, "modules_mib", text)


def _of_cpu_and_memory(facts: HardwareFacts, name: str, text: Callable[[Any], str]) -> Stated:
    value = getattr(facts.cpu_and_memory, name)
    reason = facts.cpu_and_memory.unavailable.get(name, "no reason is known")
    return Stated(reason=reason) if value is None else Stated(text(value))


def _rdma_driver(facts: HardwareFacts, is_needed: bool) -> Stated:
    return _stated(facts.rdma_driver, _NO_RDMA_VERSION if is_needed else "")


def _gpu_paths(facts: HardwareFacts) -> Stated:
    """Return the number of pairs of the job's GPUs by their path, `12 NODE, 16 SYS`; by NVML, or on AMD GPUs by amdsmi."""
    source, paths_of = "NVML", {gpu.uuid: gpu.paths for gpu in facts.gpus.gpus}
    if not paths_of:
        source, paths_of = "amdsmi", {gpu.address: gpu.paths for gpu in facts.amd_gpus.gpus}
    pairs = combinations(paths_of, 2)
    counts = Counter(path for first, second in pairs if (path := paths_of[second].get(first)))
    text = ", ".join(f"{count} {path}" for path, count in sorted(counts.items()))
    return _stated(text, f"{source} states no path between the GPUs" if len(paths_of) > 1 else "")


def _affinity(facts: HardwareFacts, is_needed: bool) -> Stated:
    """Return how many GPUs and active RDMA ports are next to each NUMA node.

    On a node where a GPU has no port beside it, its traffic crosses the link between the CPUs.
    """
    gpus = Counter(link.numa_node for link in facts.pcie_links if link.kind == "GPU" and link.numa_node is not None)
    ports = Counter(port.numa_node for port in facts.ports if port.is_active and port.numa_node is not None)
    if not gpus or not ports:
        without = "active RDMA port" if gpus else "GPU"
        return Stated(reason=f"the kernel states no NUMA node of any {without}" if is_needed else "")
    numa_nodes = sorted({*gpus, *ports})
    return Stated(", ".join(f"NUMA node {node}: {gpus[node]} GPUs, {ports[node]} ports" for node in numa_nodes))


def _same_everywhere(check: str, values: Mapping[str, Stated]) -> Iterator[CheckRow]:
    """Warn of nodes with another value than most nodes. A node that does not state the value is unknown."""
    known = Counter(stated.value for stated in values.values() if stated.value)
    usual, count = next(iter(known.most_common()), ("the same on all nodes", 0))
    for node, stated in values.items():
        if stated.value:
            differs = stated.value != usual and count > 1
            remedy = "ask the admins whether the nodes of this partition should be equal"
            yield Component(node).row(check, stated.value, usual, "warn" if differs else "ok", remedy)
        elif stated.reason:
            yield Component(node).unknown(check, stated.reason, usual)
