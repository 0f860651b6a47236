"""Specs of environment checks, and facts of healthy nodes with 8 GPUs and 4 InfiniBand ports, as tests change them."""

from __future__ import annotations

import copy
from typing import Any

from longhaul.checks.amd_gpu_facts import AmdReading
from longhaul.checks.core_speed import CoreSpeed
from longhaul.checks.cpu_and_memory import CpuAndMemoryFacts
from longhaul.checks.hardware_facts import HardwareFacts
from longhaul.checks.infiniband_ports import PortFacts
from longhaul.checks.kernel_log import KernelLog
from longhaul.checks.network_interfaces import InterfaceFacts
from longhaul.checks.nvidia_gpu_facts import GpuFacts, GpuReading
from longhaul.checks.pcie_links import PcieLink
from longhaul.checks.process_limits import ProcessLimits
from longhaul.config.node_minimums import NodeMinimums
from longhaul.config.run_config import Checks
from longhaul.jobs.kinds.environment_job import EnvironmentSpec

HEALTHY_CORES = CoreSpeed(core=0, rate=2.0, run_share=1.0)


def environment_job(**changes: Any) -> EnvironmentSpec:
    """Return the spec of a check of 4 nodes with 8 GPUs each and InfiniBand between them."""
    settings: dict[str, Any] = {
        "run": "r", "nodes": 4, "gpus_per_node": 8, "checks": Checks(), "memory_mb": 100,
        "interconnect": "infiniband", "socket_interface": "ib0",
        "build": "cuda 13.0", "scratch": None, "prebuild_ops": (), "swap_bytes": 0, "locked_bytes": 0,
        "measures_speed": False, "minimums": NodeMinimums(), "baseline": None, "folder": "results",
        "job_folder": "results",
        "out": "environment.json",
    }  # fmt: skip
    return EnvironmentSpec(**{**settings, **changes})


def gpu(index: int, **changes: Any) -> GpuFacts:
    """Return an H100 that has just been at work."""
    facts: dict[str, Any] = {
        "index": index, "name": "NVIDIA H100 80GB HBM3", "uuid": f"GPU-{index}",
        "pci_address": f"00000000:{0x1B + 0x10 * index:02X}:00.0", "is_loaded": True, "ecc_enabled": True,
        "ecc_uncorrected": 0, "ecc_corrected": 0, "ecc_uncorrected_ever": 0, "remapping_pending": False,
        "remapping_failed": False, "slowdowns": [], "sm_clock_mhz": 1980, "sm_clock_max_mhz": 1980, "power_limit_w": 700.0,
        "power_limit_default_w": 700.0, "persistence": True, "mig": False, "processes": [], "nvlinks": 18,
        "nvlinks_down": [], "nvlink_errors": {}, "nvlink_errors_before": {}, "pcie_generation": 5, "pcie_generation_max": 5,
        "pcie_width": 16, "pcie_width_max": 16, "paths": {f"GPU-{other}": "NODE" for other in range(8) if other != index},
    }  # fmt: skip
    return GpuFacts(**{**facts, **changes})


def port(number: int, **changes: Any) -> PortFacts:
    """Return an active port of 400 Gbit/s."""
    facts: dict[str, Any] = {
        "device": f"mlx5_{number}", "port": 1, "state": "ACTIVE", "link_layer": "InfiniBand", "rate_gbit_per_s": 400.0,
        "errors": {}, "pci_address": f"0000:{0x18 + number:02x}:00.0", "numa_node": number % 2,
        "adapter": "MT4129",
    }  # fmt: skip
    return PortFacts(**{**facts, **changes})


def interface(name: str = "ib0", **changes: Any) -> InterfaceFacts:
    """Return an interface that is up."""
    facts: dict[str, Any] = {"name": name, "state": "ACTIVE", "rate_gbit_per_s": 400.0, "mtu": 4092, "errors": {}}
    return InterfaceFacts(**{**facts, **changes})


def link(address: str = "0000:18:00.0", kind: str = "network adapter", **changes: Any) -> PcieLink:
    """Return a link of 32 GT/s and 16 lanes."""
    facts = {"vendor": "0x15b3", "speed": 32.0, "max_speed": 32.0, "width": 16, "max_width": 16, "numa_node": 0}
    return PcieLink(address, kind, **{**facts, **changes})  # type: ignore[arg-type]


GPU_LINKS = [
    link(f"0000:{0x1B + 0x10 * index:02x}:00.0", "GPU", vendor="0x10de", numa_node=index // 4) for index in range(8)
]


def hardware(**changes: Any) -> HardwareFacts:
    """Return the hardware of a healthy node."""
    cpu = {"model": "Intel(R) Xeon(R) Platinum 8480C", "numa_nodes": 2, "governors": {"performance": 112},
           "huge_pages": "madvise", "modules_mib": [65536] * 16, "memory_uncorrected": 0, "memory_corrected": 0}  # fmt: skip
    cpu |= changes.pop("cpu", {})
    facts: dict[str, Any] = {
        "gpus": GpuReading([gpu(index) for index in range(8)]),
        "amd_gpus": AmdReading([]),
        "ports": [port(number) for number in range(4)],
        "interfaces": [interface(), interface("eth0", rate_gbit_per_s=1.0, mtu=1500)],
        "peer_memory": True,
        "rdma_driver": "24.10-1.1.4",
        "pcie_links": [link(), *GPU_LINKS],
        "kernel_log": KernelLog([]),
        "cpu_and_memory": CpuAndMemoryFacts(**cpu),
        "limits": ProcessLimits(1_048_576, None, None),
    }
    return HardwareFacts(**{**facts, **changes})


def two_gpu_nodes() -> list[dict[str, Any]]:
    """Return the facts of two GPU nodes without problems."""
    h100 = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30}
    versions = {
        "python": "3.11.7",
        "torch": "2.13.0+cu130",
        "deepspeed": "0.19.8",
        "build": "cuda 13.0",
        "driver": "590.1",
    }
    node = {
        "versions": versions,
        "memory_bytes": 512 * 2**30,
        "hardware": hardware(ports=[*map(port, range(4)), port(4, link_layer="Ethernet")]),
        "gpus": [h100] * 8,
        "disk_free_bytes": 50 * 10**9,
        "shared_memory_bytes": 2**33,
        "write_error": None,
        "core_speed": HEALTHY_CORES,
        "run_folder_seen_after_s": 0.1,
        "own_file_seen_after_s": 0.1,
        "clock_skew_s": 0.0,
        "compiler": "c++ 12",
        "ops": {"removed": [], "built": {}, "failed": {}},
        "swap": {"folder": "/local", "removed": [], "free_bytes": 10**12, "lockable_bytes": None, "error": None},
    }
    return [{**copy.deepcopy(node), "host": host} for host in ("n1", "n2")]
