"""Types for the measurements of one node: results under load, rates of GPUs, memory and disks. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


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
class GpuPair:
    """Copies between two GPUs of a node, in both directions.

    first, second: their places in NodeMeasurements.devices
    gb_per_s:      rate of the slower direction
    wrong_bytes:   that arrived in both directions
    path:          what connects them, by gpu_pair_paths.py; "" where nothing states it
    """

    first: int
    second: int
    gb_per_s: float
    wrong_bytes: int
    path: str = ""


@dataclass(frozen=True)
class DiskSpeed:
    """Rates in GB/s.

    error:      why they could not be measured; the rates are 0 then
    is_full:    the disk, or the user's quota on it, has no space left
    is_corrupt: the file held other bytes than were written
    """

    write_gb_per_s: float
    read_gb_per_s: float
    error: str = ""
    is_full: bool = False
    is_corrupt: bool = False


@dataclass(frozen=True)
class SafeWrite:
    """Seconds of one safe write and read; None with an error. is_corrupt: the file held other bytes than were written."""

    seconds: float | None
    is_corrupt: bool = False
    error: str = ""


@dataclass(frozen=True)
class NodeMeasurements:
    """Measurements of one node; None for what a short check leaves out.

    devices:   in the order of the GPUs, or the CPU alone on a node without GPUs
    error:     why the devices could not be measured; there are none then
    gpu_pairs: every two GPUs; fewer on a node where they take too long
    """

    devices: list[BurnIn]
    memory_gb_per_s: float | None = None
    local_disk: DiskSpeed | None = None
    run_folder: SafeWrite | None = None
    error: str = ""
    gpu_pairs: list[GpuPair] = field(default_factory=list[GpuPair])

    def with_names(self, names: Sequence[str], paths: Mapping[tuple[int, int], str]) -> NodeMeasurements:
        """Return these measurements with a name for each device, and with what connects each pair of GPUs."""
        named = [replace(device, name=name) for device, name in zip(self.devices, names, strict=True)]
        pairs = [replace(pair, path=paths.get((pair.first, pair.second), "")) for pair in self.gpu_pairs]
        return replace(self, devices=named, gpu_pairs=pairs)

    @property
    def disk_write_gb_per_s(self) -> float | None:
        return self.local_disk.write_gb_per_s if self.local_disk and not self.local_disk.error else None

    @property
    def disk_read_gb_per_s(self) -> float | None:
        return self.local_disk.read_gb_per_s if self.local_disk and not self.local_disk.error else None
