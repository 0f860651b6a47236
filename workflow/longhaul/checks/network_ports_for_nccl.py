"""Reads which ports of this node carry NCCL's messages to other nodes, and their rate: InfiniBand, RoCE or Slingshot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from longhaul.checks.infiniband_ports import PortFacts, read_ports
from longhaul.checks.network_interfaces import read_interfaces
from longhaul.checks.pcie_links import PcieLink, read_pcie_links
from longhaul.checks.sysfs_files import SYS
from longhaul.runtime.rdma_variables import LINK_LAYERS

_NAMES = {"infiniband": "InfiniBand", "roce": "RoCE"}
_BITS_PER_BYTE = 8


@dataclass(frozen=True)
class NodeNetwork:
    """The ports of a node that are used. name: one of config.interconnect_datasheets.NETWORKS"""

    name: str
    ports: int
    port_gbit_per_s: float

    @property
    def port_gb_per_s(self) -> float:
        return self.port_gbit_per_s / _BITS_PER_BYTE

    @property
    def gb_per_s(self) -> float:
        return self.ports * self.port_gb_per_s

    def __str__(self) -> str:
        return f"{self.ports} x {self.port_gbit_per_s:g} Gbit/s {self.name}"


def read_node_network(kind: str, ranks: int, hca: str = "", sys: Path = SYS) -> NodeNetwork | None:
    """Return the fastest ports of this node, at most one per rank; None where NCCL uses sockets, or no port has a rate.

    Slower ports lead to other networks, as to the storage. Ranks on a part of the node's GPUs have the same part of its ports.

    kind:  interconnect.kind of the site file; others than infiniband and roce may be Slingshot
    ranks: of this node
    hca:   NCCL_IB_HCA
    """
    if kind in LINK_LAYERS:
        found = [port for port in read_ports(sys) if port.link_layer == LINK_LAYERS[kind] and _is_chosen(port, hca)]
        devices = [sys / "class" / "infiniband" / port.device / "device" for port in found]
    else:
        found = [interface for interface in read_interfaces(sys) if interface.is_slingshot]
        devices = [sys / "class" / "net" / interface.name / "device" for interface in found]
    ports = [
        (device.resolve().name, port.rate_gbit_per_s)
        for port, device in zip(found, devices, strict=True)
        if port.is_active and port.rate_gbit_per_s and not _is_virtual(device)
    ]
    if not ports:
        return None
    links, port_rate = read_pcie_links(sys), max(rate for _, rate in ports)
    slots = {_slot(link.address): link.max_gbit_per_s for link in links}
    used = Counter(_slot(address) for address, rate in ports if rate == port_rate)
    count = sum(_carried(number, port_rate, slots.get(slot)) for slot, number in used.items())
    port_rate = min(port_rate, *(slots.get(slot, port_rate) for slot in used))
    return NodeNetwork(_NAMES.get(kind, "Slingshot"), _ports_of_ranks(count, ranks, links), port_rate)


def _is_virtual(device: Path) -> bool:
    """Return whether a PCI device is a virtual function (SR-IOV): it shares the port of its physical function."""
    return (device / "physfn").exists()


def _slot(address: str) -> str:
    """Return a PCI address without the function: the ports of one adapter may be functions of one device."""
    return address.rpartition(".")[0]


def _carried(ports: int, port_rate: float, slot_rate: float | None) -> int:
    """Return how many of a device's ports its slot can feed at full rate; all of them where its link is not known."""
    return ports if slot_rate is None else max(1, min(ports, int(slot_rate / port_rate)))


def _ports_of_ranks(ports: int, ranks: int, links: Iterable[PcieLink]) -> int:
    """Return how many ports the ranks use. Of the node's display controllers, those of the most frequent vendor are its GPUs."""
    vendors = Counter(link.vendor for link in links if link.kind == "GPU")
    gpus = max(vendors.values(), default=ranks)
    return min(ports, ranks, max(1, ports * ranks // gpus))


def slowest_network(networks: Sequence[NodeNetwork | None]) -> NodeNetwork | None:
    """Return that of the node with the lowest rate, which all others wait for; None if that of a node is not known."""
    known = [network for network in networks if network]
    return min(known, key=lambda network: network.gb_per_s) if known and len(known) == len(networks) else None


def _is_chosen(port: PortFacts, hca: str) -> bool:
    """Return whether NCCL_IB_HCA allows a port: ^ excludes, = asks for whole names, `:1` for a port of the adapter.

    https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-ib-hca
    """
    excludes, names = hca.startswith("^"), hca.removeprefix("^")
    is_exact, entries = names.startswith("="), [entry for entry in names.removeprefix("=").split(",") if entry]
    if not entries:
        return True
    return excludes != any(_is_meant(port, entry, is_exact) for entry in entries)


def _is_meant(port: PortFacts, entry: str, is_exact: bool) -> bool:
    name, _, number = entry.partition(":")
    is_adapter = port.device == name if is_exact else port.device.startswith(name)
    return is_adapter and number in ("", str(port.port))
