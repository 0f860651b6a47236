"""Keys of the site file for the least that a healthy node reaches: rates of GPUs, memory and disks, ports, NVLinks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from longhaul.config.field_types import FrozenModel

# Limits beyond every device: a value above them is in another unit.
Tflops = Annotated[float, Field(gt=0, le=20_000)]
GpuMemoryRate = Annotated[float, Field(gt=0, le=50_000)]
HostRate = Annotated[float, Field(gt=0, le=10_000)]
DiskRate = Annotated[float, Field(gt=0, le=1000)]
PortRate = Annotated[float, Field(ge=1, le=3200)]


class NodeMinimums(FrozenModel):
    """The least that a healthy node reaches in the environment check; a node with less ends the run before training."""

    matrix_tflops: Tflops | None = Field(
        default=None,
        description="Minimum rate of bf16 matrix products of each GPU while all GPUs work, in TFLOP/s; null: a share of the "
        "datasheet's rate, with a warning below it.",
    )
    device_copy_gb_per_s: GpuMemoryRate | None = Field(
        default=None,
        description="Minimum rate of copies in a GPU's memory, in GB/s read and written; null: a share of the datasheet's "
        "bandwidth, with a warning below it.",
    )
    host_copy_gb_per_s: HostRate | None = Field(
        default=None,
        description="Minimum rate of copies between a GPU and pinned memory of the host, in GB/s; null: no minimum.",
    )
    memory_gb_per_s: HostRate | None = Field(
        default=None, description="Minimum memory bandwidth of a node (STREAM triad), in GB/s; null: no minimum."
    )
    disk_write_gb_per_s: DiskRate | None = Field(
        default=None, description="Minimum rate of direct writes to storage.scratch, in GB/s; null: no minimum."
    )
    disk_read_gb_per_s: DiskRate | None = Field(
        default=None, description="Minimum rate of direct reads from storage.scratch, in GB/s; null: no minimum."
    )
    port_gbit_per_s: PortRate | None = Field(
        default=None,
        description="Minimum rate of each active RDMA port, or interface of Slingshot, in Gbit/s, for example 400 for NDR; null: "
        "that of the other nodes, and a warning below the highest rate of the adapter's model.",
    )
    nvlinks: Annotated[int, Field(ge=0, le=36)] | None = Field(
        default=None,
        description="Minimum number of active NVLinks of each GPU; null: that of the datasheet, or of the other GPUs.",
    )
