"""Counts what a node loses while messages are exchanged: TCP segments that it sends again, error counters that grow.

A slow link delays packets, a bad cable or transceiver loses them. TCP then sends segments again, and the kernel counts them:
RetransSegs beside OutSegs in /proc/net/snmp (RFC 4022), for all connections of the node. RDMA adapters count what was lost
themselves. Under RDMA, TCP carries few segments, and its share says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from longhaul.checks.infiniband_ports import TRANSPORT_ERROR_COUNTERS, read_ports
from longhaul.checks.network_interfaces import read_interfaces
from longhaul.checks.sysfs_files import SYS, read_text

_TCP_COUNTERS = Path("/proc/net/snmp")
_FEWEST_RESENT = 20
"""Fewer segments are sent again on a healthy node, too: after a pause of its CPU, or of other connections."""


@dataclass(frozen=True)
class TcpSegments:
    """TCP segments of this node since its start. sent: without those that were sent again."""

    sent: int
    resent: int

    def share_resent_since(self, earlier: TcpSegments) -> float:
        """Return the share of the segments sent since then that were sent again; 0.0 if they are too few to judge."""
        sent, resent = self.sent - earlier.sent, self.resent - earlier.resent
        return resent / (sent + resent) if resent >= _FEWEST_RESENT and sent >= 0 else 0.0


def read_tcp_segments(path: Path = _TCP_COUNTERS) -> TcpSegments:
    """Read the counters of this node, or of this container's network; 0 where the kernel does not have them."""
    names, values = ([], [])
    lines = [line.split()[1:] for line in read_text(path).splitlines() if line.startswith("Tcp:")]
    if len(lines) == 2:
        names, values = lines
    counts = dict(zip(names, values, strict=False))
    return TcpSegments(int(counts.get("OutSegs", 0)), int(counts.get("RetransSegs", 0)))


def read_error_counters(sys: Path = SYS) -> dict[str, int]:
    """Return counter -> count of all RDMA ports and interfaces of this node: "mlx5_0 port 1 symbol_error" -> 3."""
    found = {f"{port.name} {name}": count for port in read_ports(sys) for name, count in port.errors.items()}
    for port in read_ports(sys):
        folder = sys / "class" / "infiniband" / port.device / "ports" / str(port.port) / "hw_counters"
        values = {name: read_text(folder / name) for name in TRANSPORT_ERROR_COUNTERS}
        found |= {f"{port.name} {name}": int(value) for name, value in values.items() if value.isdecimal()}
    for interface in read_interfaces(sys):
        found |= {f"{interface.name} {name}": count for name, count in interface.errors.items()}
    return found


def grown(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Return counter -> by how much it has grown, of those that have."""
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}


def grown_line(host: str, counters: Mapping[str, int], during: str) -> str:
    """Return the counters of grown() as a warning. during: what was measured meanwhile"""
    text = f"errors of ports and interfaces during {during}: {grown_text(counters)}"
    return f"{host}: {text}; let the admins check cable, transceiver and switch port"


def grown_text(counters: Mapping[str, int]) -> str:
    """Return the counters of grown() as text."""
    return ", ".join(f"{name} +{count:,}" for name, count in counters.items())
