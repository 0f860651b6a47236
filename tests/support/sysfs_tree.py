"""Writes trees of files in the form of the kernel's /sys: RDMA ports, PCIe devices, memory controllers, CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_tree(root: Path, files: Mapping[str, object]) -> Path:
    """Write each file with its value and a line break, as the kernel does, and return the root."""
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n", encoding="utf-8")
    return root


def add_port(root: Path, device: str, *, state: str = "4: ACTIVE", rate: str = "400 Gb/sec (4X NDR)",
             layer: str = "InfiniBand", address: str = "0000:18:00.0", **counters: int) -> Path:  # fmt: skip
    """Add an RDMA device with one port, below the PCI device that /sys/class/infiniband/<device>/device points to."""
    pci = root / "devices" / "pci0000:15" / "0000:16:01.0" / address
    port = f"infiniband/{device}/ports/1"
    zero = dict.fromkeys(("symbol_error", "link_downed", "port_rcv_errors", "link_error_recovery"), 0)
    files = {f"{port}/counters/{name}": value for name, value in {**zero, **counters}.items()}
    write_tree(
        pci, {f"{port}/state": state, f"{port}/rate": rate, f"{port}/link_layer": layer, "numa_node": 0, **files}
    )
    (pci / "infiniband" / device / "device").symlink_to("../..")
    classes = root / "class" / "infiniband"
    classes.mkdir(parents=True, exist_ok=True)
    (classes / device).symlink_to(pci / "infiniband" / device)
    return root


def add_pcie_device(root: Path, address: str, kind: str, *, speed: str = "16.0 GT/s PCIe", width: int = 16,
                    max_speed: str = "16.0 GT/s PCIe", max_width: int = 16, bridge_speed: str = "16.0 GT/s PCIe",
                    vendor: str = "0x15b3") -> Path:  # fmt: skip
    """Add a PCIe device below a bridge. kind: the device's class as the kernel writes it, such as 0x020700."""
    bridge = root / "devices" / "pci0000:15" / f"0000:16:{address[5:7]}.0"
    write_tree(bridge, {"max_link_speed": bridge_speed, "max_link_width": 16})
    links = {"current_link_speed": speed, "current_link_width": width, "max_link_speed": max_speed,
             "max_link_width": max_width}  # fmt: skip
    write_tree(bridge / address, {"class": kind, "vendor": vendor, **links})
    listed = root / "bus" / "pci" / "devices"
    listed.mkdir(parents=True, exist_ok=True)
    (listed / address).symlink_to(bridge / address)
    return root
