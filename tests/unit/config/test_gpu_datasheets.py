"""The first pattern that matches a name is that of the GPU, with the values of its datasheet."""

from __future__ import annotations

import pytest

from longhaul.config.gpu_datasheets import datasheet


@pytest.mark.parametrize(
    ("name", "tflops", "memory_gb_per_s", "nvlinks"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 1555, 12),
        ("NVIDIA A100-SXM4-80GB", 312, 2039, 12),
        ("NVIDIA A100-SXM-64GB", 312, 1555, 12),
        ("NVIDIA A100 80GB PCIe", 312, 1555, None),
        ("NVIDIA H100 80GB HBM3", 989, 3350, 18),
        ("NVIDIA H100", 989, 2000, None),
        ("NVIDIA H100 PCIe", 756, 2000, None),
        ("NVIDIA H100 NVL", 835, 3900, None),
        ("NVIDIA H200", 989, 4800, 18),
        ("NVIDIA H200 NVL", 835, 4800, None),
        ("NVIDIA GH200 480GB", 989, 4000, None),
        ("NVIDIA B200", 2250, 7700, None),
        ("NVIDIA L40S", 362, 864, None),
        ("AMD Instinct MI250X", 191.5, 1638, None),
        ("AMD Instinct MI300X OAM", 1307.4, 5300, None),
        ("AMD Instinct MI300A", 980.6, 5300, None),
    ],
)
def test_values_are_those_of_the_datasheet(name: str, tflops: float, memory_gb_per_s: float, nvlinks: int | None):
    found = datasheet(name)
    assert found and (found.bf16_tflops, found.memory_gb_per_s, found.nvlinks) == (tflops, memory_gb_per_s, nvlinks)


@pytest.mark.parametrize(
    ("name", "measured_tflops", "measured_copy"),
    [("NVIDIA H100 80GB HBM3", 600, 2800), ("NVIDIA A100-SXM4-80GB", 250, 1700), ("AMD Instinct MI300X", 560, 2200)],
)
def test_minimums_are_below_what_healthy_gpus_reach(name: str, measured_tflops: float, measured_copy: float):
    found = datasheet(name)
    assert found and found.min_matrix_tflops < measured_tflops < found.bf16_tflops
    assert found.min_copy_gb_per_s < measured_copy < found.memory_gb_per_s


def test_another_gpu_is_not_known():
    assert datasheet("Tesla V100-SXM2-32GB") is None
