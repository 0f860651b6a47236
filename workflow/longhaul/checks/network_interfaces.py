"""Reads the network interfaces of this node from /sys/class/net: state, rate, MTU, errors.

Files: Documentation/ABI/testing/sysfs-class-net of the kernel, and those of the PCI device below `device`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from longhaul.checks.sysfs_files import SYS, read_text

ERROR_COUNTERS = ("rx_errors", "rx_crc_errors", "tx_errors", "tx_carrier_errors")
_SLINGSHOT = re.compile(r"hsn\d+")
"""Name of an interface of Slingshot. Those of Slingshot 10 belong to ConnectX-5, those of Slingshot 11 to Cassini."""
_NVIDIA = "0x15b3"
_UP = ("up", "unknown")
"""States of an interface that works; some drivers never report one."""


@dataclass(frozen=True)
class InterfaceFacts:
    """One interface.

    state:   ACTIVE, or the kernel's word, such as DOWN
    errors:  counter -> count, of those that are not 0
    adapter: model of the card, MT4119 as in hca_type for NVIDIA's, else IDs of vendor and device, 17db:0501; "" if unknown
    """

    name: str
    state: str
    rate_gbit_per_s: float | None
    mtu: int | None
    errors: dict[str, int]
    adapter: str = ""
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def is_active(self) -> bool:
        return self.state == "ACTIVE"

    @property
    def is_slingshot(self) -> bool:
        return bool(_SLINGSHOT.fullmatch(self.name))


def read_interfaces(sys: Path = SYS) -> list[InterfaceFacts]:
    """Return all interfaces but the loopback, in the order of their names."""
    return [
        _interface(path) for path in sorted((sys / "class" / "net").glob("*")) if path.name != "lo" and path.is_dir()
    ]


def _interface(path: Path) -> InterfaceFacts:
    state, mbit_per_s, mtu = (read_text(path / name) for name in ("operstate", "speed", "mtu"))
    counts = {name: read_text(path / "statistics" / name) for name in ERROR_COUNTERS}
    is_known = mbit_per_s.isdecimal() and int(mbit_per_s) > 0  # -1: unknown, as in virtual machines
    return InterfaceFacts(
        name=path.name,
        state="ACTIVE" if state in _UP else state.upper(),
        rate_gbit_per_s=int(mbit_per_s) / 1000 if is_known else None,
        mtu=int(mtu) if mtu.isdecimal() else None,
        errors={name: int(value) for name, value in counts.items() if value.isdecimal() and int(value)},
        adapter=_adapter(path / "device"),
        unavailable={} if is_known else {"rate_gbit_per_s": f"{path / 'speed'} states no speed"},
    )


def _adapter(device: Path) -> str:
    vendor, number = read_text(device / "vendor"), read_text(device / "device")  # 0x17db, 0x0501
    if not (vendor.startswith("0x") and number.startswith("0x")):
        return ""
    return f"MT{int(number, 16)}" if vendor == _NVIDIA else f"{vendor[2:]}:{number[2:]}"
