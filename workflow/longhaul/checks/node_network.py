"""Reads which ports of this node carry NCCL's messages to other nodes, and their rate: InfiniBand, RoCE or Slingshot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longhaul.checks.infiniband_ports import PortFacts, read_ports
from longhaul.checks.network_interfaces import read_interfaces
from longhaul.checks.sysfs_files import SYS
from longhaul.runtime.rdma_variables import LINK_LAYERS

_NAMES = {"infiniband": "InfiniBand", "roce": "RoCE"}
_SLINGSHOT = re.compile(r"hsn\d+")
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

    Slower ports lead to other networks, as to the storage.

    kind:  interconnect.kind of the site file; others than infiniband and roce may be Slingshot
    ranks: of this node
    hca:   NCCL_IB_HCA
    """
    if kind in LINK_LAYERS:
        used = [port for port in read_ports(sys) if port.link_layer == LINK_LAYERS[kind] and _is_chosen(port, hca)]
    else:
        used = [interface for interface in read_interfaces(sys) if _SLINGSHOT.fullmatch(interface.name)]
    rates = [port.rate_gbit_per_s for port in used if port.is_active and port.rate_gbit_per_s]
    if not rates:
        return None
    return NodeNetwork(_NAMES.get(kind, "Slingshot"), min(rates.count(max(rates)), ranks), max(rates))


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
