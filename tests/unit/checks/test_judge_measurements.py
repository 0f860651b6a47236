"""Wrong results fail on a single device too, as do other bytes and a full disk; what cannot be measured is unknown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.artifacts.site_baseline import SiteBaseline
from longhaul.checks.build_check_rows import problem_lines
from longhaul.checks.compare_rates_with_limits import RateLimits
from longhaul.checks.judge_measurements import measurement_rows
from longhaul.checks.measurement_types import BurnIn, DiskSpeed, NodeMeasurements, SafeWrite
from longhaul.config.node_minimums import NodeMinimums

GPU = BurnIn(9, 0, 640.0, 2900.0, 55.0, 54.0)
NODE = NodeMeasurements(
    [replace(GPU, name=f"GPU {index}") for index in range(2)], 400.0, DiskSpeed(3.0, 6.0), SafeWrite(0.2)
)
RUN_FOLDER = "write, fsync, rename, read in the run folder"


def rows(gpu: str = "NVIDIA H100 80GB HBM3", baseline: SiteBaseline | None = None, **changes: Any) -> list[CheckRow]:
    return measurement_rows({"n1": replace(NODE, **changes)}, RateLimits(NodeMinimums(), baseline, gpu))


def bad(found: list[CheckRow]) -> list[tuple[str, str, str]]:
    return [(row["component"], row["check"], row["result"]) for row in found if row["result"] != "ok"]


def test_healthy_node_has_no_findings():
    assert bad(rows()) == []


def test_wrong_result_fails_and_comes_first():
    found = rows(devices=[GPU, replace(GPU, name="GPU 5 (PCI 0000:3b:00.0)", wrong_rows=3, matrix_tflops=1.0)])
    assert problem_lines(found)[0] == (
        "n1: GPU 5 (PCI 0000:3b:00.0): products with a known result: 3 wrong rows in 9 products, expected 0 wrong rows; never "
        "train on it: exclude the node, and let the admins replace the device"
    )
    assert bad(rows("", devices=[replace(GPU, wrong_rows=1, name="CPU")])) == [
        ("CPU", "products with a known result", "fail")
    ]


def test_disk_that_cannot_be_measured_is_unknown_and_a_full_one_fails():
    assert bad(rows(local_disk=DiskSpeed(0.0, 0.0, "Invalid argument"))) == [("", "local disk", "unknown")]
    found = rows(local_disk=DiskSpeed(0.0, 0.0, "No space left on device", is_full=True))
    assert bad(found) == [("", "local disk", "fail")]
    assert problem_lines(found) == [
        "n1: local disk: No space left on device, expected direct writes to storage.scratch; remove files from storage.scratch "
        "on this node, or exclude the node"
    ]


def test_disk_that_returns_other_bytes_fails():
    found = rows(local_disk=DiskSpeed(3.0, 6.0, is_corrupt=True))
    assert bad(found) == [("", "local disk", "fail")]
    assert problem_lines(found)[0].startswith(
        "n1: local disk: other bytes, expected the bytes that were written; exclude the node"
    )


def test_short_check_has_rows_of_devices_alone():
    found = rows(memory_gb_per_s=None, local_disk=None, run_folder=None)
    assert {row["component"] for row in found} == {"GPU 0", "GPU 1"} and bad(found) == []


def test_gpu_that_fails_under_load_fails_the_node():
    found = rows(devices=[], error="CUDA error: unspecified launch failure")
    assert bad(found) == [("", "burn-in", "fail")]
    assert problem_lines(found)[0].startswith(
        "n1: burn-in: CUDA error: unspecified launch failure, expected all GPUs compute; exclude the node"
    )


def test_other_bytes_in_the_run_folder_fail():
    assert bad(rows(run_folder=SafeWrite(0.1, is_corrupt=True))) == [("", RUN_FOLDER, "fail")]
    assert bad(rows(run_folder=SafeWrite(None, error="Read-only file system"))) == [("", RUN_FOLDER, "unknown")]


def test_baseline_of_other_gpus_is_named():
    baseline = SiteBaseline("NVIDIA A100-SXM4-40GB", "good", "2026-11-29", {})
    (found,) = [row for row in rows(baseline=baseline) if row["result"] != "ok"]
    assert (
        found["value"] == ("not available: it was measured on NVIDIA A100-SXM4-40GB; measure again: longhaul baseline")
        and found["expected"] == "NVIDIA H100 80GB HBM3"
    )
