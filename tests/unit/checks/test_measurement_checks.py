"""Wrong results fail, slow GPUs are named by the median of all, and rates of nodes without GPUs are only shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longhaul.artifacts.check_rows import CheckRow
from longhaul.checks.burn_in import BurnIn
from longhaul.checks.check_table import problem_lines, warning_lines
from longhaul.checks.disk_speed import DiskSpeed, SafeWrite
from longhaul.checks.measurement_checks import measurement_rows
from longhaul.checks.node_measurements import NodeMeasurements

GPU = BurnIn(verified=9, wrong_rows=0, sustained_tflops=640.0, device_copy_gb_per_s=2900.0, host_to_device_gb_per_s=55.0,
             device_to_host_gb_per_s=54.0)  # fmt: skip


def node(*changed: BurnIn, **changes: Any) -> NodeMeasurements:
    """Return the measurements of a node with 8 GPUs, the last of which are `changed`."""
    found = NodeMeasurements([*[GPU] * (8 - len(changed)), *changed], 400.0, DiskSpeed(3.0, 6.0), SafeWrite(0.2))
    return replace(found, **changes)


def rows(*last: NodeMeasurements, has_gpus: bool = True) -> list[CheckRow]:
    """Return the rows of four nodes."""
    found = [*[node()] * (4 - len(last)), *last]
    return measurement_rows({f"n{number}": one for number, one in enumerate(found, start=1)}, has_gpus)


def bad(found: list[CheckRow]) -> list[tuple[str, str, str, str]]:
    return [(row["node"], row["component"], row["check"], row["result"]) for row in found if row["result"] != "ok"]


def test_equal_nodes_have_no_findings():
    assert bad(rows()) == []
    assert len(rows()) == 4 * (8 * (1 + 1 + 3) + 4)


def test_wrong_result_fails_on_a_single_gpu_too():
    alone = measurement_rows({"n1": node(replace(GPU, wrong_rows=3))}, has_gpus=True)
    assert problem_lines(alone) == [
        "n1: GPU 7: products with a known result: 3 wrong rows in 9 products, expected 0 wrong rows; never train on it: exclude "
        "the node, and let the admins replace the device"
    ]


def test_slow_gpu_is_named_and_a_very_slow_one_fails():
    found = rows(node(*(replace(GPU, sustained_tflops=rate) for rate in (608.0, 607.0, 512.0, 511.0))))
    assert bad(found) == [
        ("n4", "GPU 5", "matrix products under load", "warn"),
        ("n4", "GPU 6", "matrix products under load", "warn"),
        ("n4", "GPU 7", "matrix products under load", "fail"),
    ]
    assert problem_lines(found)[0].startswith(
        "n4: GPU 7: matrix products under load: 511 TFLOP/s, expected >= 95% of the median 640 TFLOP/s; exclude the node"
    )


def test_copies_are_compared_with_the_same_gpu_of_other_nodes():
    """GPU 0 is far from the memory on every node. GPU 7 of one node lost half of its PCIe lanes."""
    far = replace(GPU, host_to_device_gb_per_s=25.0)
    nodes = [NodeMeasurements([far, *[GPU] * 7], 400.0, DiskSpeed(3, 6), SafeWrite(0.2))] * 3
    lost = replace(nodes[0], devices=[far, *[GPU] * 6, replace(GPU, host_to_device_gb_per_s=27.0)])
    assert bad(rows(*nodes, lost)) == [("n4", "GPU 7", "host to device", "warn")]


def test_two_gpus_are_not_compared():
    two = node(devices=[GPU, replace(GPU, sustained_tflops=100.0)])
    found = measurement_rows({"n1": two}, has_gpus=True)
    assert bad(found) == []
    assert {row["expected"] for row in found if row["check"] == "matrix products under load"} == {"measured only"}


def test_slow_memory_and_slow_disks_are_warnings():
    found = rows(node(triad_gb_per_s=319.0, local_disk=DiskSpeed(1.4, 2.9)))
    assert bad(found) == [
        ("n4", "", "memory bandwidth (triad)", "warn"),
        ("n4", "", "local disk, write", "warn"),
        ("n4", "", "local disk, read", "warn"),
    ]
    assert "n4: local disk, write: 1.4 GB/s, expected >= 50% of the median 3 GB/s" in warning_lines(found)[1]


def test_disk_that_cannot_be_measured_is_unknown():
    found = rows(node(local_disk=DiskSpeed(0.0, 0.0, "No space left on device")))
    assert bad(found) == [("n4", "", "local disk", "unknown")]


def test_other_bytes_in_the_run_folder_fail():
    found = rows(node(run_folder=SafeWrite(0.1, is_corrupt=True)))
    assert bad(found) == [("n4", "", "write, fsync, rename, read in the run folder", "fail")]
    unwritable = rows(node(run_folder=SafeWrite(None, error="Read-only file system")))
    assert bad(unwritable) == [("n4", "", "write, fsync, rename, read in the run folder", "unknown")]


def test_rates_of_nodes_without_gpus_are_shown_and_not_compared():
    slow = node(devices=[GPU], triad_gb_per_s=1.0, local_disk=DiskSpeed(0.001, 0.001))
    found = rows(*[node(devices=[GPU])] * 3, slow, has_gpus=False)
    assert bad(found) == [] and not [row for row in found if "matrix" in row["check"]]
    assert bad(rows(node(devices=[replace(GPU, wrong_rows=1)]), has_gpus=False)) == [
        ("n4", "CPU", "products with a known result", "fail")
    ]
