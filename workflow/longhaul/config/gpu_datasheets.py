"""Values of GPUs from their datasheets: dense bf16 rate, memory bandwidth, NVLinks."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuDatasheet:
    """One kind of GPU.

    name:                pattern of the name that nvidia-smi, amd-smi or rocm-smi prints
    bf16_tflops:         dense rate
    memory_gb_per_s:     bandwidth of its memory; of several sizes of memory, the lowest
    nvlinks:             NVLinks that are connected in every server; None where it depends on the server
    min_share_of_bf16:   share of the dense rate that large matrix products reach at least on a healthy GPU
    min_share_of_memory: share of the bandwidth that copies reach at least on a healthy GPU
    has_fp8:             whether it multiplies matrices in FP8
    """

    name: str
    bf16_tflops: float
    memory_gb_per_s: float
    nvlinks: int | None = None
    min_share_of_bf16: float = 0.6
    min_share_of_memory: float = 0.65
    has_fp8: bool = True

    @property
    def min_matrix_tflops(self) -> float:
        return self.min_share_of_bf16 * self.bf16_tflops

    @property
    def min_copy_gb_per_s(self) -> float:
        return self.min_share_of_memory * self.memory_gb_per_s


NVLINK_GB_PER_S = 25
"""Rate of an NVLink 3 or 4, in one direction: that of A100, H100 and H200."""
_MIN_SHARE_OF_NVLINKS = 0.6
"""Healthy copies reach 371 of 450 GB/s on eight H100 (github.com/NVIDIA/nccl/issues/1264), and 130 of 150 on four
(github.com/NVIDIA/cuda-samples/issues/392)."""
_MOST_DIRECT_GPUS = 4


def least_nvlinks_of_pair(nvlinks: int, gpus: int) -> int:
    """Return how many NVLinks two GPUs have at least. Servers of four GPUs may connect them directly, with a third of the links.

    nvlinks: of a GPU
    gpus:    of the node, as far as the job uses them
    """
    return nvlinks if gpus > _MOST_DIRECT_GPUS else nvlinks // (_MOST_DIRECT_GPUS - 1)


def min_copy_over_nvlinks(nvlinks: int) -> float:
    """Return the least rate in GB/s of a healthy copy over so many NVLinks. Over PCIe 5, a copy reaches at most 63 GB/s."""
    return _MIN_SHARE_OF_NVLINKS * NVLINK_GB_PER_S * nvlinks


# The first match counts. Products of 8192 reach 80 to 87 % of the datasheet on A100 and H100 and about half on MI300X
# (github.com/stas00/ml-engineering, Maximum Achievable Matmul FLOPS); the shares leave a margin for low power limits. Copies
# reach 84 % on H100, and 40 to 60 % on MI300X (scalarlm.com/blog/scalarlm-benchmarking-mi300x-memcpy).
_DATASHEETS = (
    # resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet: H100 PCIe, NVL, SXM
    GpuDatasheet(r"H100 PCIe", 756, 2000),
    GpuDatasheet(r"H100 NVL", 835, 3900),
    # resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip: the memory of 96 GB; a server may have one superchip
    GpuDatasheet(r"GH200", 989, 4000),
    # nvidia.com/en-us/data-center/h200
    GpuDatasheet(r"H200 NVL", 835, 4800),
    GpuDatasheet(r"H200", 989, 4800, nvlinks=18),
    # H100 of 64 GB (MareNostrum 5) and H20 have slower memory than the datasheet's 3,350 GB/s of 80 GB.
    GpuDatasheet(r"H100 80GB HBM3", 989, 3350, nvlinks=18),
    GpuDatasheet(r"H100", 989, 2000),
    # resources.nvidia.com/en-us-blackwell-architecture: HGX B200
    GpuDatasheet(r"B200", 2250, 7700),
    # nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet.pdf; 40 GB: 1,555 GB/s
    GpuDatasheet(r"A100-SXM4-80GB", 312, 2039, nvlinks=12, has_fp8=False),
    GpuDatasheet(r"A100-SXM", 312, 1555, nvlinks=12, has_fp8=False),
    GpuDatasheet(r"A100", 312, 1555, has_fp8=False),
    GpuDatasheet(r"L40S", 362, 864),
    # amd.com/en/products/accelerators/instinct/mi300.html
    GpuDatasheet(r"MI300A", 980.6, 5300, min_share_of_bf16=0.4, min_share_of_memory=0.35),
    GpuDatasheet(r"MI300X", 1307.4, 5300, min_share_of_bf16=0.4, min_share_of_memory=0.35),
    # amd.com/en/products/accelerators/instinct/mi200/mi250x.html: one of the card's two dies, which counts as a GPU
    GpuDatasheet(r"MI250X|MI200", 191.5, 1638, min_share_of_bf16=0.4, min_share_of_memory=0.5, has_fp8=False),
)


def datasheet(gpu_name: str) -> GpuDatasheet | None:
    """Return the values of a GPU; None for a GPU that is not listed."""
    return next((sheet for sheet in _DATASHEETS if re.search(sheet.name, gpu_name, re.IGNORECASE)), None)


def multiplies_in_fp8(gpu_name: str | None, bf16_tflops: float | None) -> bool:
    """Return False for a GPU that is known to have no FP8 units: by its name, or if that is not listed, by its dense rate."""
    named = datasheet(gpu_name) if gpu_name else None
    sheets = [named] if named else [sheet for sheet in _DATASHEETS if sheet.bf16_tflops == bf16_tflops]
    return not sheets or any(sheet.has_fp8 for sheet in sheets)


def peak_tflops(gpu_name: str) -> float | None:
    """Return the dense bf16 rate of a GPU in TFLOP/s; None for a GPU that is not listed."""
    found = datasheet(gpu_name)
    return found.bf16_tflops if found else None
