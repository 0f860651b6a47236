"""Collects facts from kernel and drivers about this node's hardware: GPUs, RDMA ports, PCIe links, kernel log, CPUs, limits."""

from __future__ import annotations

from dataclasses import dataclass

from longhaul.checks.amd_gpu_facts import AmdReading
from longhaul.checks.amd_gpu_reading import with_amd_links
from longhaul.checks.cpu_and_memory import CpuAndMemoryFacts, read_cpu_and_memory
from longhaul.checks.infiniband_ports import PortFacts, has_peer_memory, rdma_driver, read_ports
from longhaul.checks.kernel_log import KernelLog, read_kernel_log
from longhaul.checks.network_interfaces import InterfaceFacts, read_interfaces
from longhaul.checks.nvidia_gpu_facts import GpuReading
from longhaul.checks.pcie_links import PcieLink, read_pcie_links
from longhaul.checks.process_limits import ProcessLimits, read_process_limits


@dataclass(frozen=True)
class HardwareFacts:
    """Hardware of one node.

    peer_memory: a module of GPUDirect RDMA is loaded
    rdma_driver: version of the driver of the RDMA adapters, which is that of OFED; "" if it states none
    """

    gpus: GpuReading
    amd_gpus: AmdReading
    ports: list[PortFacts]
    interfaces: list[InterfaceFacts]
    peer_memory: bool
    rdma_driver: str
    pcie_links: list[PcieLink]
    kernel_log: KernelLog
    cpu_and_memory: CpuAndMemoryFacts
    limits: ProcessLimits


def read_hardware(gpus: GpuReading, amd_gpus: AmdReading) -> HardwareFacts:
    """Return the facts of this node.

    gpus, amd_gpus: read before and after the GPUs were at work, so they are given
    """
    return HardwareFacts(
        gpus=gpus,
        amd_gpus=amd_gpus,
        ports=read_ports(),
        interfaces=read_interfaces(),
        peer_memory=has_peer_memory(),
        rdma_driver=rdma_driver(),
        pcie_links=with_amd_links(read_pcie_links(), amd_gpus.gpus),
        kernel_log=read_kernel_log(),
        cpu_and_memory=read_cpu_and_memory(),
        limits=read_process_limits(),
    )
