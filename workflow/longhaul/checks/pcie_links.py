"""Reads speed and width of the PCIe links of GPUs, network adapters and NVMe disks from /sys/bus/pci/devices.

Files: Documentation/ABI/testing/sysfs-bus-pci of the kernel. A link is as fast as the slower of its two ends, so the maximum of
the device is compared with that of the bridge above it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from longhaul.checks.sysfs_files import SYS, read_text

_KINDS = {"0x0302": "GPU", "0x0300": "GPU", "0x0380": "GPU", "0x1200": "GPU", "0x0207": "network adapter",
          "0x0200": "network adapter", "0x0108": "NVMe disk"}  # fmt: skip
"""First digits of a device's class (pci.ids): 3D and display controllers, accelerators, InfiniBand, Ethernet, NVMe."""

_PCIE_3 = 8.0


@dataclass(frozen=True)
class PcieLink:
    """The link of one device. Speeds are in GT/s per lane, widths in lanes. A maximum is the smaller one of both ends.

    numa_node: the NUMA node that the device is next to; None where the kernel does not know it
    """

    address: str
    kind: str
    vendor: str
    speed: float
    max_speed: float
    width: int
    max_width: int
    numa_node: int | None

    @property
    def max_gbit_per_s(self) -> float:
        """Rate of one direction, less the line code: 8b/10b up to PCIe 2, 128b/130b from PCIe 3 on."""
        return self.max_speed * self.max_width * (0.8 if self.max_speed < _PCIE_3 else 128 / 130)


def read_pcie_links(sys: Path = SYS) -> list[PcieLink]:
    """Return the links of this node's GPUs, network adapters and NVMe disks. Virtual devices have no link and are left out."""
    devices = sorted((sys / "bus" / "pci" / "devices").glob("*"))
    links = (_link(device, _KINDS.get(read_text(device / "class")[:6], "")) for device in devices)
    return [link for link in links if link]


def _link(device: Path, kind: str) -> PcieLink | None:
    bridge = device.resolve().parent
    speed, width = _speed(device / "current_link_speed"), _width(device / "current_link_width")
    max_speed, max_width = _speed(device / "max_link_speed"), _width(device / "max_link_width")
    if not (kind and speed and width and max_speed and max_width):
        return None
    numa_node = read_text(device / "numa_node")  # -1: unknown
    return PcieLink(
        address=device.name,
        kind=kind,
        vendor=read_text(device / "vendor"),
        speed=speed,
        max_speed=min(max_speed, _speed(bridge / "max_link_speed") or max_speed),
        width=width,
        max_width=min(max_width, _width(bridge / "max_link_width") or max_width),
        numa_node=int(numa_node) if numa_node.isdecimal() else None,
    )


def _speed(path: Path) -> float:
    """Return GT/s from a text such as `16.0 GT/s PCIe`; 0 if it is unknown."""
    found = re.match(r"[0-9.]+", read_text(path))
    return float(found[0]) if found else 0.0


def _width(path: Path) -> int:
    """Return the number of lanes; 0 if it is unknown. Devices without a link state 0 or 255."""
    text = read_text(path)
    return int(text) if text.isdecimal() and 0 < int(text) <= 32 else 0
