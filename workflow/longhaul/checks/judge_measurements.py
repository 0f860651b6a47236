"""Classifies what nodes measured: products with a known result, rates, pairs of GPUs, the local disk, files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping

from longhaul.artifacts.node_check_row import CheckRow, Result
from longhaul.checks.build_check_rows import Component
from longhaul.checks.compare_rates_with_limits import RateLimits, rate_rows
from longhaul.checks.judge_gpu_pairs import EXACT_COPIES, copy_rate_rows, wrong_copy_rows
from longhaul.checks.measurement_types import BurnIn, DiskSpeed, NodeMeasurements, SafeWrite

EXACT_PRODUCTS = "products with a known result"
EXACT_RESULTS = (EXACT_PRODUCTS, EXACT_COPIES)
"""Checks whose failure no config tolerates: nobody can use a device that computes or sends wrong values."""


def measurement_rows(measured: Mapping[str, NodeMeasurements], limits: RateLimits) -> list[CheckRow]:
    """Return the rows of all nodes that measured something, wrong results first."""
    rows = [
        _exact_row(Component(node, device.name), device) for node, found in measured.items() for device in found.devices
    ]
    rows += wrong_copy_rows(measured)
    rows += [_no_burn_in_row(Component(node), found.error) for node, found in measured.items() if found.error]
    rows += _baseline_rows(limits)
    rows += rate_rows(measured, limits)
    rows += copy_rate_rows(measured, limits)
    for node, found in measured.items():
        rows += _local_disk_rows(Component(node), found.local_disk) if found.local_disk else []
        rows += [_run_folder_row(Component(node), found.run_folder)] if found.run_folder else []
    return rows


def _baseline_rows(limits: RateLimits) -> list[CheckRow]:
    """Return a row if the site's baseline was measured on other GPUs: its rates say nothing about these."""
    if limits.other_baseline is None:
        return []
    reason = f"it was measured on {limits.other_baseline or 'nodes without GPUs'}; measure again: longhaul baseline"
    return [Component("").unknown("baseline of the site", reason, limits.gpu_name or "nodes without GPUs")]


def _exact_row(component: Component, device: BurnIn) -> CheckRow:
    value = f"{device.wrong_rows} wrong rows in {device.verified} products"
    remedy = "never train on it: exclude the node, and let the admins replace the device"
    result: Result = "fail" if device.wrong_rows else "ok"
    return component.row(EXACT_PRODUCTS, value, "0 wrong rows", result, remedy)


def _no_burn_in_row(component: Component, error: str) -> CheckRow:
    remedy = "exclude the node; its kernel log, and nvidia-smi, amd-smi or rocm-smi, show which GPU fails or is in use"
    return component.row("burn-in", error, "all GPUs compute", "fail", remedy)


def _local_disk_rows(component: Component, disk: DiskSpeed) -> list[CheckRow]:
    """Return a row if the disk could not be measured. A full or corrupt one fails: compiled ops and optimizer states use it."""
    check, expected = "local disk", "direct writes to storage.scratch"
    if disk.is_full:
        remedy = "remove files from storage.scratch on this node, or exclude the node"
        return [component.row(check, disk.error, expected, "fail", remedy)]
    if disk.is_corrupt:
        remedy = "exclude the node; let the admins check the disk (smartctl), its cable and the node's memory"
        return [component.row(check, "other bytes", "the bytes that were written", "fail", remedy)]
    return [component.unknown(check, disk.error, expected)] if disk.error else []


def _run_folder_row(component: Component, write: SafeWrite) -> CheckRow:
    """A write error is a problem of the run folder, which the environment check states; other bytes are one of the node."""
    check, expected = "write, fsync, rename, read in the run folder", "the bytes that were written"
    if write.is_corrupt:
        remedy = "exclude the node; let the admins check its mount of the file system and its memory"
        return component.row(check, "other bytes", expected, "fail", remedy)
    if write.seconds is None:
        return component.unknown(check, write.error, expected)
    return component.row(check, f"{write.seconds:.3g} s", expected)
