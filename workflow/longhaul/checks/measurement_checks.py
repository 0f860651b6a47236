"""Judges what nodes measured: wrong results, and rates below the median of the other GPUs, nodes and disks."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from longhaul.artifacts.check_rows import CheckRow, Result
from longhaul.checks.burn_in import BurnIn
from longhaul.checks.check_table import Component
from longhaul.checks.node_measurements import NodeMeasurements

_MIN_SHARE, _FAILED_SHARE = 0.95, 0.8
"""Below the first share of the median rate of all GPUs, a GPU is named. Below the second one it fails: each step waits for it."""
_MIN_HOST_SHARE = 0.8
"""The same for memory and host copies, which other processes slow down for a moment; these never fail."""
_MIN_DISK_SHARE = 0.5
_MIN_FOR_MEDIAN = 3
"""Of two, the median does not say which one is slow."""
_SLOW_GPU = "exclude the node; let the admins compare clocks, temperature and power limit with those of a fast GPU"
_SLOW_HOST = "let the admins compare memory modules, NUMA settings and PCIe links with those of a fast node"
_SLOW_DISK = "let the admins check the disk's health (smartctl) and free space"
_COPIES = ("device_copy_gb_per_s", "host_to_device_gb_per_s", "device_to_host_gb_per_s")

Rates = Mapping[tuple[str, str], float]
"""(node, component) -> rate."""


def measurement_rows(measured: Mapping[str, NodeMeasurements], has_gpus: bool) -> list[CheckRow]:
    """Return the rows of all nodes. Without GPUs, rates are shown and not compared: virtual hosts share their cores."""
    rows: list[CheckRow] = []
    for node, found in measured.items():
        for name, device in _devices(found, has_gpus):
            rows.append(_exact_row(Component(node, name), device))
    if has_gpus:
        sustained = {key: device.sustained_tflops for key, device in _all_devices(measured).items()}
        rows += rate_rows("matrix products under load", "TFLOP/s", sustained, _SLOW_GPU, _MIN_SHARE, _FAILED_SHARE)
        rows += _copy_rows(_all_devices(measured))
    share = _MIN_HOST_SHARE if has_gpus else 0
    triads = {(node, ""): found.triad_gb_per_s for node, found in measured.items()}
    rows += rate_rows("memory bandwidth (triad)", "GB/s", triads, _SLOW_HOST, share)
    return rows + list(_disk_rows(measured, _MIN_DISK_SHARE if has_gpus else 0))


def _devices(found: NodeMeasurements, has_gpus: bool) -> list[tuple[str, BurnIn]]:
    return [(f"GPU {index}" if has_gpus else "CPU", device) for index, device in enumerate(found.devices)]


def _all_devices(measured: Mapping[str, NodeMeasurements]) -> dict[tuple[str, str], BurnIn]:
    return {(node, name): device for node, found in measured.items() for name, device in _devices(found, True)}


def _exact_row(component: Component, device: BurnIn) -> CheckRow:
    value = f"{device.wrong_rows} wrong rows in {device.verified} products"
    remedy = "never train on it: exclude the node, and let the admins replace the device"
    result: Result = "fail" if device.wrong_rows else "ok"
    return component.row("products with a known result", value, "0 wrong rows", result, remedy)


def _copy_rows(devices: Mapping[tuple[str, str], BurnIn]) -> Iterator[CheckRow]:
    """Compare each copy with that of the same GPU of the other nodes: GPUs of one node are unequally far from its memory."""
    for name in dict.fromkeys(name for _, name in devices):
        of_this_name = {key: device for key, device in devices.items() if key[1] == name}
        for rate in _COPIES:
            rates: dict[tuple[str, str], float] = {key: getattr(device, rate) for key, device in of_this_name.items()}
            title = rate.removesuffix("_gb_per_s").replace("_", " ")
            yield from rate_rows(title, "GB/s", rates, _SLOW_HOST, _MIN_HOST_SHARE)


def _disk_rows(measured: Mapping[str, NodeMeasurements], share: float) -> Iterator[CheckRow]:
    disks = {node: found.local_disk for node, found in measured.items()}
    for node, disk in disks.items():
        if disk.error:
            yield Component(node).unknown("local disk", disk.error, "direct reads and writes of storage.scratch")
    for what in ("write", "read"):
        rates = {(node, ""): getattr(disk, f"{what}_gb_per_s") for node, disk in disks.items() if not disk.error}
        yield from rate_rows(f"local disk, {what}", "GB/s", rates, _SLOW_DISK, share)
    for node, found in measured.items():
        yield _run_folder_row(Component(node), found)


def _run_folder_row(component: Component, found: NodeMeasurements) -> CheckRow:
    """A write error is a problem of the run folder, which the environment check states; other bytes are one of the node."""
    check, expected, write = (
        "write, fsync, rename, read in the run folder",
        "the bytes that were written",
        found.run_folder,
    )
    if write.is_corrupt:
        remedy = "exclude the node; let the admins check its mount of the file system and its memory"
        return component.row(check, "other bytes", expected, "fail", remedy)
    if write.seconds is None:
        return component.unknown(check, write.error, expected)
    return component.row(check, f"{write.seconds:.3g} s", expected)


def rate_rows(
    check: str, unit: str, rates: Rates, remedy: str, min_share: float, failed_share: float = 0
) -> list[CheckRow]:
    """Compare rates of like components with their median: below `min_share` of it is a warning, below `failed_share` a failure.

    Fewer than three rates are shown and not compared, and so are all rates if `min_share` is 0.
    """
    if not rates:
        return []
    median = statistics.median(rates.values())
    is_compared = len(rates) >= _MIN_FOR_MEDIAN and min_share > 0
    expected = f">= {min_share:.0%} of the median {median:.3g} {unit}" if is_compared else "measured only"
    rows = []
    for (node, component), rate in rates.items():
        result: Result = "ok"
        if is_compared and rate < min_share * median:
            result = "fail" if rate < failed_share * median else "warn"
        rows.append(Component(node, component).row(check, f"{rate:.3g} {unit}", expected, result, remedy))
    return rows
