"""Types for the measurements of one node: results under load, rates of GPUs, memory and disks. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BurnIn:
    """Results of one device under load. Rates are in TFLOP/s and GB/s.

    wrong_rows: of `verified` products with a known result
    name:       of the device in tables
    """

    verified: int
    wrong_rows: int
    matrix_tflops: float
    device_copy_gb_per_s: float
    host_to_device_gb_per_s: float
    device_to_host_gb_per_s: float
    name: str = ""


@dataclass(frozen=True)
class DiskSpeed:
    """Rates in GB/s.

    error:   why they could not be measured; the rates are 0 then
    is_full: the disk, or the user's quota on it, has no space left
    """

    write_gb_per_s: float
    read_gb_per_s: float
    error: str = ""
    is_full: bool = False


@dataclass(frozen=True)
class SafeWrite:
    """Seconds of one safe write and read; None with an error. is_corrupt: the file held other bytes than were written."""

    seconds: float | None
    is_corrupt: bool = False
    error: str = ""


@dataclass(frozen=True)
class NodeMeasurements:
    """Measurements of one node; None for what a short check leaves out.

    devices: in the order of the GPUs, or the CPU alone on a node without GPUs
    error:   why the devices could not be measured; there are none then
    """

    devices: list[BurnIn]
    memory_gb_per_s: float | None = None
    local_disk: DiskSpeed | None = None
    run_folder: SafeWrite | None = None
    error: str = ""

    def with_names(self, names: Sequence[str]) -> NodeMeasurements:
        """Return these measurements with a name for each device."""
        named = [replace(device, name=name) for device, name in zip(self.devices, names, strict=True)]
        return replace(self, devices=named)

    @property
    def disk_write_gb_per_s(self) -> float | None:
        return self.local_disk.write_gb_per_s if self.local_disk and not self.local_disk.error else None

    @property
    def disk_read_gb_per_s(self) -> float | None:
        return self.local_disk.read_gb_per_s if self.local_disk and not self.local_disk.error else None
