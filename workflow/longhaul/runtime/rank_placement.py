"""Chooses a rank's GPU on its node, and binds the rank to the cores near that GPU (NUMA)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from longhaul.runtime.process_rank import Rank

PCI_DEVICES = Path("/sys/bus/pci/devices")
NUMA_NODES = Path("/sys/devices/system/node")


def gpu_index(rank: Rank) -> int:
    """Return the index of a rank's GPU among those that its process sees.

    Without a binding, every process sees all GPUs of the node. With srun --gpu-bind it sees its own, or those of its socket.
    """
    import torch

    return rank.local_rank % torch.cuda.device_count()


def bind_to_gpu_cores(gpu: int, ranks_per_node: int, local_rank: int) -> list[int]:
    """Bind this process to its part of the cores that are next to its GPU, and return these cores.

    gpu: index among the GPUs of this process

    Ranks whose GPUs are on one NUMA node divide its cores. Where the kernel does not know the GPU's NUMA node, ranks divide all
    cores of the job.
    """
    import torch

    allowed = sorted(os.sched_getaffinity(0))
    addresses = [_pci_address(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
    nodes = [_numa_node(address) for address in addresses]
    near = [core for core in _cores_of_numa_node(nodes[gpu]) if core in allowed]
    neighbours = [rank for rank in range(ranks_per_node) if nodes[rank % len(nodes)] == nodes[gpu]]
    cores = part_of(near, neighbours, local_rank) or part_of(allowed, range(ranks_per_node), local_rank)
    if cores:
        os.sched_setaffinity(0, cores)
    return cores


def part_of(cores: Sequence[int], ranks: Sequence[int], rank: int) -> list[int]:
    """Return the part of the cores that a rank gets when these ranks divide them evenly; [] if there are too few."""
    size = len(cores) // max(1, len(ranks))
    first = list(ranks).index(rank) * size
    return list(cores[first : first + size])


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


def _cores_of_numa_node(node: int | None) -> list[int]:
    """Return the cores of a NUMA node: 0-3,8 -> 0 1 2 3 8."""
    if node is None:
        return []
    try:
        text = (NUMA_NODES / f"node{node}" / "cpulist").read_text(encoding="utf-8").strip()
    except OSError:
        return []
    spans = (part.partition("-") for part in text.split(",") if part)
    return [core for first, _, last in spans for core in range(int(first), int(last or first) + 1)]
