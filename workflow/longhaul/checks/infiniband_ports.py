"""Reads the RDMA ports of this node from /sys/class/infiniband: state, rate, error counters, PCIe address and NUMA node.

The files are those of the kernel's ABI documentation, Documentation/ABI/stable/sysfs-class-infiniband.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from longhaul.checks.sysfs_files import SYS, read_text

ERROR_COUNTERS = (
    "symbol_error",
    "link_error_recovery",
    "link_downed",
    "port_rcv_errors",
    "local_link_integrity_errors",
    "excessive_buffer_overrun_errors",
)
"""Counters of a port that stay at 0 as long as cable and transceiver are good. They count since the driver was loaded."""
TRANSPORT_ERROR_COUNTERS = ("packet_seq_err", "local_ack_timeout_err", "implied_nak_seq_err")
"""Counters of NVIDIA's adapters, in hw_counters: packets of this port that did not arrive, and were sent again. Adaptive routing
raises out_of_sequence on a healthy fabric, so it is none of them."""
PEER_MEMORY_MODULES = ("nvidia_peermem", "nv_peer_mem")


@dataclass(frozen=True)
class PortFacts:
    """One RDMA port. state: ACTIVE, DOWN, INIT or ARMED; link_layer: InfiniBand, or Ethernet for RoCE.

    rate_gbit_per_s: current rate, None where the kernel does not state it
    errors:          counter -> count, of the counters that are not 0
    adapter:         the adapter's model, such as MT4129; "" where the kernel does not state it
    """

    device: str
    port: int
    state: str
    link_layer: str
    rate_gbit_per_s: float | None
    errors: dict[str, int]
    pci_address: str
    numa_node: int | None
    adapter: str = ""
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.device} port {self.port}"

    @property
    def is_active(self) -> bool:
        return self.state == "ACTIVE"


def read_ports(sys: Path = SYS) -> list[PortFacts]:
    """Return the RDMA ports of this node in the order of their names; [] on a node without RDMA devices."""
    return [_port_facts(port) for port in sorted(sys.glob("class/infiniband/*/ports/*")) if port.name.isdecimal()]


def has_peer_memory(sys: Path = SYS) -> bool:
    """Return whether a module of GPUDirect RDMA is loaded. Without it, drivers may still use DMA-BUF."""
    return any((sys / "module" / name).is_dir() for name in PEER_MEMORY_MODULES)


def rdma_driver(sys: Path = SYS) -> str:
    """Return the version of the driver of NVIDIA's adapters; "" if none is loaded, or if it has no version."""
    return read_text(sys / "module" / "mlx5_core" / "version")


def _port_facts(port: Path) -> PortFacts:
    device = port.parents[1]
    rate = re.match(r"[0-9.]+", read_text(port / "rate"))  # 400 Gb/sec (4X NDR)
    numa_node = read_text(device / "device" / "numa_node")
    return PortFacts(
        device=device.name,
        port=int(port.name),
        state=read_text(port / "state").rpartition(" ")[2],  # 4: ACTIVE
        link_layer=read_text(port / "link_layer"),
        rate_gbit_per_s=float(rate[0]) if rate else None,
        errors=_errors(port / "counters"),
        pci_address=(device / "device").resolve().name,
        numa_node=int(numa_node) if numa_node.isdecimal() else None,  # -1: unknown
        adapter=read_text(device / "hca_type"),
        unavailable={} if rate else {"rate_gbit_per_s": f"{port / 'rate'} cannot be read"},
    )


def _errors(counters: Path) -> dict[str, int]:
    values = {name: read_text(counters / name) for name in ERROR_COUNTERS}
    return {name: int(value) for name, value in values.items() if value.isdecimal() and int(value)}
