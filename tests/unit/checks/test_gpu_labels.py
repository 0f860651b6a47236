"""A GPU has one name in all checks, for any number that torch gives it."""

from __future__ import annotations

import pytest

from longhaul.checks.gpu_labels import gpu_name, names_of_torch_gpus, short_address
from longhaul.checks.nvidia_gpu_facts import GpuReading
from tests.support.healthy_node_facts import gpu


@pytest.mark.parametrize(
    ("address", "short"),
    [
        ("00000000:3B:00.0", "0000:3b:00.0"),
        ("0000:3b:00.0", "0000:3b:00.0"),
        ("0000:3b:00", "0000:3b:00.0"),
        ("0001:3b:00", "0001:3b:00.0"),
        ("", ""),
    ],
)
def test_addresses_of_nvml_torch_and_kernel_are_the_same(address: str, short: str):
    assert short_address(address) == short


def test_number_is_that_of_nvml_where_torch_has_another_one():
    """CUDA_VISIBLE_DEVICES=2,1: torch's GPU 0 is NVML's GPU 2."""
    reading = GpuReading([gpu(index) for index in range(3)])
    visible = [{"pci_address": "0000:3b:00.0"}, {"pci_address": "0000:2b:00.0"}]
    assert names_of_torch_gpus(visible, reading) == ["GPU 2 (PCI 0000:3b:00.0)", "GPU 1 (PCI 0000:2b:00.0)"]
    assert names_of_torch_gpus(visible, reading)[0] == gpu_name(2, gpu(2).pci_address)


def test_gpus_without_nvml_or_address_have_a_name_and_so_has_the_cpu():
    none = GpuReading([], "no NVML")
    assert names_of_torch_gpus([{"pci_address": "0000:c1:00.0"}], none) == ["GPU 0 (PCI 0000:c1:00.0)"]
    assert names_of_torch_gpus([{"pci_address": ""}] * 2, none) == ["GPU 0", "GPU 1"]
    assert names_of_torch_gpus([], none) == ["CPU"]
