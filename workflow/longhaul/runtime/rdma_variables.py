"""Derives NCCL_IB_HCA and NCCL_IB_GID_INDEX on each node, from the InfiniBand and RoCE ports that the kernel shows.

Only what NCCL cannot know is set. NCCL uses every active port: InfiniBand ports, and also the
Ethernet port of a node's storage. Connections between ports of both kinds fail. Before 2.21, NCCL took GID 0 of a RoCE port,
which is a link-local address of RoCE version 1.
Sources: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html (NCCL_IB_HCA, NCCL_IB_GID_INDEX);
https://docs.kernel.org/admin-guide/abi-stable.html (/sys/class/infiniband)
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERCONNECT = "LONGHAUL_INTERCONNECT"
"""Variable of a job: interconnect.kind of the site file."""
LINK_LAYERS = {"infiniband": "InfiniBand", "roce": "Ethernet"}
"""interconnect.kind -> the kernel's name of the link layer."""
_SYSFS = Path("/sys/class/infiniband")
NCCL_OF_TORCH = (2, 28)
"""NCCL's version in the pinned torch."""
_CHOOSES_GID = (2, 21)
"""From this version on, NCCL chooses the GID itself."""


@dataclass(frozen=True)
class RdmaPort:
    """An active port.

    link_layer: InfiniBand, or Ethernet for RoCE
    roce_v2_gid: index of its first GID with an IPv4 address under RoCE version 2; None without one
    """

    adapter: str
    number: int
    link_layer: str
    roce_v2_gid: int | None = None

    @property
    def name(self) -> str:
        """Return the port's name in NCCL_IB_HCA."""
        return f"{self.adapter}:{self.number}"


def active_ports(devices: Path = _SYSFS) -> list[RdmaPort]:
    """Return the active RDMA ports of this node, in the order of their names."""
    found: list[RdmaPort] = []
    for port in sorted(devices.glob("*/ports/*")):
        if port.name.isdecimal() and _text(port / "state").endswith("ACTIVE"):
            layer = _text(port / "link_layer")
            gid = _roce_v2_gid(port) if layer == "Ethernet" else None
            found.append(RdmaPort(port.parents[1].name, int(port.name), layer, gid))
    return found


def rdma_variables(kind: str, ports: Sequence[RdmaPort], nccl: tuple[int, ...]) -> dict[str, tuple[str, str]]:
    """Return name -> (value, reason) of the variables that NCCL needs on a node with these ports.

    kind: interconnect.kind of the site file
    nccl: NCCL's version
    """
    layer = LINK_LAYERS.get(kind)
    used = [port for port in ports if port.link_layer == layer]
    found: dict[str, tuple[str, str]] = {}
    if used and len(used) < len(ports):
        reason = f"{len(used)} of {len(ports)} active ports are {layer}; without it, NCCL uses all of them"
        # "=" asks for exact names: mlx5_1 would also stand for mlx5_10
        found["NCCL_IB_HCA"] = ("=" + ",".join(port.name for port in used), reason)
    gids = {port.roce_v2_gid for port in used}
    if kind == "roce" and nccl < _CHOOSES_GID and len(gids) == 1 and (gid := gids.pop()) is not None:
        reason = f"NCCL {'.'.join(map(str, nccl))} would take GID 0; this one is RoCE version 2 with an IPv4 address"
        found["NCCL_IB_GID_INDEX"] = (str(gid), reason)
    return found


def set_rdma_variables(nccl: tuple[int, ...], environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Set those variables that are not set yet, and return one line about each.

    nccl: NCCL's version
    """
    lines: list[str] = []
    for name, (value, reason) in rdma_variables(environ.get(INTERCONNECT, ""), active_ports(), nccl).items():
        if name in environ:
            lines.append(f"{name} stays {environ[name]}, as it was set; longhaul would have set {value}: {reason}")
        else:
            environ[name] = value
            lines.append(f"{name}={value}: {reason}")
    return lines


def _roce_v2_gid(port: Path) -> int | None:
    for entry in sorted((port / "gid_attrs" / "types").glob("*"), key=lambda path: int(path.name)):
        # IPv4 addresses are mapped into IPv6: ::ffff:a.b.c.d
        is_ipv4 = _text(port / "gids" / entry.name).startswith("0000:0000:0000:0000:0000:ffff:")
        if is_ipv4 and _text(entry) == "RoCE v2":
            return int(entry.name)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # types of unused GIDs cannot be read
        return ""
