"""States what connects every two GPUs of a node, by NVML or amdsmi: only pairs with the same path have the same rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from longhaul.checks.amd_gpu_facts import AmdReading
from longhaul.checks.gpu_labels import short_address
from longhaul.checks.nvidia_gpu_facts import GpuReading


class _Known(NamedTuple):
    """A GPU that the driver's library knows: its name in the paths of other GPUs, and its own paths."""

    name: str
    paths: Mapping[str, str]


def paths_between_torch_gpus(
    gpus: Sequence[Mapping[str, Any]], nvidia: GpuReading, amd: AmdReading
) -> dict[tuple[int, int], str]:
    """Return (number, larger number) of two GPUs by torch -> NVLink, a word of `nvidia-smi topo -m`, or XGMI with its rate.

    gpus: facts of node_facts.py
    """
    by_uuid = {gpu.uuid.removeprefix("GPU-"): _Known(gpu.uuid, gpu.paths) for gpu in nvidia.gpus}
    by_address = {short_address(gpu.address): _Known(gpu.address, gpu.paths) for gpu in amd.gpus}
    known = [by_uuid.get(gpu["uuid"]) or by_address.get(short_address(gpu["pci_address"])) for gpu in gpus]
    return {
        (first, second): path
        for (first, gpu), (second, other) in combinations(enumerate(known), 2)
        if gpu and other and (path := gpu.paths.get(other.name))
    }
