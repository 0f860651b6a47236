"""Says whether a job computes on GPUs, chooses the GPU of a rank, and binds it to whole cores near that GPU (NUMA)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from longhaul.runtime.process_rank import Rank

CPUS = Path("/sys/devices/system/cpu")
PCI_DEVICES = Path("/sys/bus/pci/devices")
NUMA_NODES = Path("/sys/devices/system/node")


def computes_on_gpus() -> bool:
    """Return whether the processes of this job compute on GPUs: torch finds one, and the site file has some.

    A job gets DS_ACCELERATOR=cpu where the site file has none. DeepSpeed reads it, too.
    """
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def gpu_index(rank: Rank) -> int:
    """Return the index of a rank's GPU among those that its process sees.

    Without a binding, every process sees all GPUs of the node. With srun --gpu-bind it sees its own, or those of its socket.
    """
    import torch

    return rank.local_rank % torch.cuda.device_count()


def bind_to_gpu_cores(ranks_per_node: int, local_rank: int) -> list[int]:
    """Bind this process to its part of the cores that are next to its GPU, and return their CPUs.

    Ranks whose GPUs are on one NUMA node divide its cores. A core stays whole: its CPUs, which are its hardware threads, go to
    one rank. Where the kernel does not know the NUMA node of a GPU, or the job has too few cores there, the ranks divide all
    cores of the job.
    """
    import torch

    addresses = [_pci_address(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
    nodes = [_numa_node(address) for address in addresses]
    node_of_rank = [nodes[rank % len(nodes)] for rank in range(ranks_per_node)]
    parts = core_parts(whole_cores(os.sched_getaffinity(0)), node_of_rank)
    cpus = sorted(cpu for core in parts[local_rank] for cpu in core)
    if cpus:
        os.sched_setaffinity(0, cpus)
    return cpus


def whole_cores(cpus: Iterable[int]) -> list[list[int]]:
    """Return these CPUs by core, in the order of the cores. A core whose siblings the kernel does not name has one CPU."""
    cores: dict[int, list[int]] = {}
    for cpu in sorted(cpus):
        siblings = _read_cpu_list(CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list")
        cores.setdefault(min(siblings, default=cpu), []).append(cpu)
    return [cores[first] for first in sorted(cores)]


def core_parts(cores: Sequence[list[int]], node_of_rank: Sequence[int | None]) -> list[Sequence[list[int]]]:
    """Return the cores of each rank of a node.

    node_of_rank: NUMA node of each rank's GPU; None where it is unknown
    """
    near = [_near_part(cores, node_of_rank, rank) for rank in range(len(node_of_rank))]
    if all(near):
        return near
    return [part_of(cores, range(len(node_of_rank)), rank) for rank in range(len(node_of_rank))]


def _near_part(cores: Sequence[list[int]], node_of_rank: Sequence[int | None], rank: int) -> Sequence[list[int]]:
    node = node_of_rank[rank]
    cpus = set(_read_cpu_list(NUMA_NODES / f"node{node}" / "cpulist"))
    near = [core for core in cores if cpus.intersection(core)]
    return part_of(near, [other for other, its_node in enumerate(node_of_rank) if its_node == node], rank)


def part_of(cores: Sequence[list[int]], ranks: Sequence[int], rank: int) -> Sequence[list[int]]:
    """Return the part of the cores that a rank gets when these ranks divide them evenly; none if there are too few."""
    size = len(cores) // len(ranks)
    first = ranks.index(rank) * size
    return cores[first : first + size]


def _pci_address(properties: object) -> str:
    domain, bus, device = (getattr(properties, f"pci_{part}_id", 0) for part in ("domain", "bus", "device"))
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def _numa_node(pci_address: str) -> int | None:
    """Return the NUMA node of a PCI device; None where the kernel does not know it."""
    try:
        node = int((PCI_DEVICES / pci_address / "numa_node").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _read_cpu_list(path: Path) -> list[int]:
    """Return the CPUs in a file of the kernel: 0-3,8 -> 0 1 2 3 8. The result is empty if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return []
    spans = (part.partition("-") for part in text.split(",") if part)
    return [cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1)]
