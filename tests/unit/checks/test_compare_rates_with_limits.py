"""Rates are compared with the site file, the site's baseline, the median of the run, and the datasheet; the worst one counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.artifacts.site_baseline import SiteBaseline
from longhaul.checks.build_check_rows import problem_lines
from longhaul.checks.compare_rates_with_limits import RATE_CHECKS, RateLimits, rate_rows, rates_of, usual_of
from longhaul.checks.measurement_types import BurnIn, DiskSpeed, NodeMeasurements, SafeWrite
from longhaul.config.node_minimums import NodeMinimums

GPU = BurnIn(verified=9, wrong_rows=0, matrix_tflops=640.0, device_copy_gb_per_s=2900.0, host_to_device_gb_per_s=55.0,
             device_to_host_gb_per_s=54.0)  # fmt: skip
H100 = "NVIDIA H100 80GB HBM3"


def node(*changed: BurnIn, **changes: Any) -> NodeMeasurements:
    """Return the measurements of a node with 8 GPUs, the last of which are `changed`."""
    found = NodeMeasurements([*[GPU] * (8 - len(changed)), *changed], 400.0, DiskSpeed(3.0, 6.0), SafeWrite(0.2))
    found = replace(found, **changes)
    return found.with_names([f"GPU {index}" for index in range(len(found.devices))], {})


def rows(*last: NodeMeasurements, nodes: int = 4, baseline: SiteBaseline | None = None, gpu: str = H100,
         **minimums: Any) -> list[CheckRow]:  # fmt: skip
    """Return the rows of some nodes, the last of which are given."""
    found = [*[node()] * (nodes - len(last)), *last]
    measured = {f"n{number}": one for number, one in enumerate(found, start=1)}
    return list(rate_rows(measured, RateLimits(NodeMinimums(**minimums), baseline, gpu)))


def bad(found: list[CheckRow]) -> list[tuple[str, str, str, str]]:
    return [(row["node"], row["component"], row["check"], row["result"]) for row in found if row["result"] != "ok"]


def expected(found: list[CheckRow], check: str) -> set[str]:
    return {row["expected"] for row in found if row["check"] == check}


def learned(**rates: float) -> SiteBaseline:
    usual = {key: usual_of((rate, rate, 0.94 * rate)) for key, rate in rates.items()}
    return SiteBaseline(H100, "good", "2026-11-29", usual)


def test_equal_nodes_have_no_findings():
    assert bad(rows()) == [] and len(rows()) == 4 * (8 * 4 + 3)


def test_slow_gpu_is_named_and_a_very_slow_one_fails():
    found = rows(node(*(replace(GPU, matrix_tflops=rate) for rate in (608.0, 607.0, 512.0, 511.0))))
    assert bad(found) == [
        ("n4", "GPU 5", "matrix products under load", "warn"),
        ("n4", "GPU 6", "matrix products under load", "warn"),
        ("n4", "GPU 7", "matrix products under load", "fail"),
    ]
    assert problem_lines(found)[0].startswith(
        "n4: GPU 7: matrix products under load: 511 TFLOP/s, expected >= 512 TFLOP/s (the median of the run is 640); exclude"
    )


def test_gpu_whose_memory_is_five_percent_slow_is_named():
    """Two healthy H200 differed by 1 %."""
    found = rows(node(*(replace(GPU, device_copy_gb_per_s=rate) for rate in (2756.0, 2754.0))))
    assert bad(found) == [("n4", "GPU 7", "copy on the GPU", "warn")]


def test_host_copies_are_compared_with_the_same_gpu_of_other_nodes():
    """GPU 0 is far from the memory on every node. GPU 7 of one node lost half of its PCIe lanes."""
    far = replace(GPU, host_to_device_gb_per_s=25.0)
    others = node(devices=[far, *[GPU] * 7])
    lost = node(devices=[far, *[GPU] * 6, replace(GPU, host_to_device_gb_per_s=27.0)])
    assert bad(rows(others, others, others, lost)) == [("n4", "GPU 7", "copy from host to GPU", "warn")]


def test_slow_memory_and_slow_disks_are_warnings():
    found = rows(node(memory_gb_per_s=319.0, local_disk=DiskSpeed(1.4, 2.9)))
    assert [row[2:] for row in bad(found)] == [
        ("memory bandwidth (triad)", "warn"),
        ("local disk, write", "warn"),
        ("local disk, read", "warn"),
    ]


def test_disk_that_was_not_measured_has_no_rate():
    found = rows(node(local_disk=DiskSpeed(0.0, 0.0, "No space left on device")))
    assert bad(found) == [] and len([row for row in found if row["check"] == "local disk, read"]) == 3


def test_gpu_is_named_as_in_other_checks():
    """CUDA_VISIBLE_DEVICES may start at any GPU; rates are compared by torch's numbers."""
    slow = replace(GPU, matrix_tflops=500.0)
    found = rows(node(devices=[GPU, GPU, slow]).with_names(["GPU 5", "GPU 6", "GPU 7 (PCI 0000:8b:00.0)"], {}), nodes=1)
    assert bad(found)[0][:2] == ("n1", "GPU 7 (PCI 0000:8b:00.0)")


def test_two_gpus_are_compared_with_the_datasheet():
    two = node(devices=[GPU, replace(GPU, matrix_tflops=593.0, device_copy_gb_per_s=2177.0)])
    found = rows(two, nodes=1)
    assert bad(found) == [
        ("n1", "GPU 1", "matrix products under load", "warn"),
        ("n1", "GPU 1", "copy on the GPU", "warn"),
    ]
    assert expected(found, "matrix products under load") == {">= 593 TFLOP/s (the datasheet says 989)"}
    assert expected(found, "copy from host to GPU") == {"measured only"}


def test_gpu_that_is_in_no_datasheet_is_measured_only():
    found = rows(node(devices=[GPU]), nodes=1, gpu="Tesla V100-SXM2-32GB")
    assert bad(found) == [] and expected(found, "matrix products under load") == {"measured only"}


@pytest.mark.parametrize(
    ("key", "check", "value"),
    [
        ("matrix_tflops", "matrix products under load", 641.0),
        ("device_copy_gb_per_s", "copy on the GPU", 2901.0),
        ("host_copy_gb_per_s", "copy from host to GPU", 55.1),
        ("memory_gb_per_s", "memory bandwidth (triad)", 401.0),
        ("disk_write_gb_per_s", "local disk, write", 3.1),
        ("disk_read_gb_per_s", "local disk, read", 6.1),
    ],
)
def test_minimum_of_the_site_file_fails(key: str, check: str, value: float):
    found = bad(rows(node(devices=[GPU]), nodes=1, **{key: value}))
    assert (check, "fail") in [row[2:] for row in found] and {row[3] for row in found} == {"fail"}
    assert bad(rows(node(devices=[GPU]), nodes=1, **{key: value * 0.95})) == []


def test_baseline_names_a_fleet_that_became_slow():
    """All GPUs are equally slow, so no median shows it."""
    slow = node(devices=[replace(GPU, matrix_tflops=600.0)] * 8)
    found = rows(slow, slow, slow, slow, baseline=learned(matrix_tflops=640.0))
    assert len(bad(found)) == 32 and bad(found)[0][3] == "warn"
    assert expected(found, "matrix products under load") == {">= 602 TFLOP/s (the site's baseline is 640)"}
    worse = node(devices=[replace(GPU, matrix_tflops=511.0)] * 8)
    assert {row[3] for row in bad(rows(*[worse] * 4, baseline=learned(matrix_tflops=640.0)))} == {"fail"}


def test_rate_that_a_healthy_node_had_is_no_finding():
    """The lowest rate of the baseline was 94 % of its median, below the share that is else a warning."""
    same = node(devices=[replace(GPU, matrix_tflops=601.6)] * 8)
    assert bad(rows(*[same] * 4, baseline=learned(matrix_tflops=640.0))) == []


def test_baseline_of_other_gpus_is_not_used():
    other = replace(learned(matrix_tflops=9000.0), gpu="NVIDIA B200")
    assert bad(rows(baseline=other)) == []
    assert RateLimits(NodeMinimums(), other, H100).other_baseline == "NVIDIA B200"
    assert RateLimits(NodeMinimums(), None, H100).other_baseline is None


def test_nodes_without_gpus_are_compared_with_site_file_and_baseline_only():
    slow = node(memory_gb_per_s=1.0, local_disk=DiskSpeed(0.001, 0.001))
    assert bad(rows(slow, gpu="")) == []
    assert [row[2:] for row in bad(rows(slow, gpu="", memory_gb_per_s=2.0))] == [("memory bandwidth (triad)", "fail")]
    usual = replace(learned(memory_gb_per_s=400.0), gpu="")
    assert [row[2:] for row in bad(rows(slow, gpu="", baseline=usual))] == [("memory bandwidth (triad)", "warn")]


def test_each_rate_has_a_minimum_in_the_site_file():
    minimums = {check.minimum for check in RATE_CHECKS}
    assert minimums <= set(NodeMinimums.model_fields)
    assert set(NodeMinimums.model_fields) - minimums == {"port_gbit_per_s", "nvlinks"}, (
        "hardware_checks.py classifies these"
    )
    assert all(rates_of(check, {"n1": node()}) for check in RATE_CHECKS)
