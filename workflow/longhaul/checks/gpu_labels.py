"""Names the GPUs in tables of checks by number and PCI address: NVML, torch and the kernel number GPUs in orders of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longhaul.checks.nvidia_gpu_facts import GpuReading


def gpu_name(index: int, address: str) -> str:
    """Return `GPU 3 (PCI 0000:3b:00.0)`. index: by NVML, as nvidia-smi shows it; by torch where NVML does not know the GPU."""
    return f"GPU {index} (PCI {short_address(address)})" if address else f"GPU {index}"


def names_of_torch_gpus(gpus: Sequence[Mapping[str, Any]], reading: GpuReading) -> list[str]:
    """Return the name of each GPU that torch uses, in torch's order; on a node without GPUs, that of the CPU.

    gpus: facts of node_facts.py. CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER change torch's numbers, and not those of NVML.
    """
    known = {short_address(gpu.pci_address): gpu.index for gpu in reading.gpus if gpu.pci_address}
    addresses = [short_address(gpu["pci_address"]) for gpu in gpus]
    return [gpu_name(known.get(address, index), address) for index, address in enumerate(addresses)] or ["CPU"]


def short_address(address: str) -> str:
    """Return 0000:3b:00.0 for NVML's 00000000:3B:00.0 and for the kernel log's 0000:3b:00; "" if it is not known."""
    domain, _, rest = address.lower().partition(":")
    if not rest:
        return ""
    return f"{domain[-4:]}:{rest}" + ("" if "." in rest else ".0")
