"""Lists the measured rates with their limits: minimum of the site file, baseline of the site, median of the run, datasheet."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from longhaul.artifacts.node_check_row import CheckRow, Result
from longhaul.artifacts.site_baseline import SiteBaseline, UsualRate
from longhaul.checks.build_check_rows import Component
from longhaul.checks.measurement_types import NodeMeasurements
from longhaul.config.gpu_datasheets import datasheet
from longhaul.config.node_minimums import NodeMinimums

FEWEST_FOR_MEDIAN = 3
"""Fewest values to compare: the median of two does not say which one is slow."""
_SLOW_GPU = "exclude the node; let the admins compare clocks, temperature and power limit with those of a fast GPU"
_SLOW_HOST = "let the admins compare memory modules, NUMA settings and PCIe links with those of a fast node"
_SLOW_DISK = "let the admins check the disk's health (smartctl) and its free space"

Rates = dict[tuple[str, str], float]
"""(node, component) -> rate. A GPU's component is its number by torch, which is the same place on nodes of one kind."""


@dataclass(frozen=True)
class RateCheck:
    """One rate. key: its field in BurnIn (is_of_device) or NodeMeasurements; minimum: its key in node_minimums.

    min_share:    below this share of the usual rate, a component is named
    failed_share: below this share it fails; 0: never, as other processes slow such rates down for a moment
    by_component: compare GPU 3 only with GPU 3 of other nodes: GPUs of a node are unequally far from its memory
    """

    check: str
    key: str
    minimum: str
    unit: str
    remedy: str
    min_share: float
    failed_share: float = 0.0
    is_of_device: bool = False
    by_component: bool = False


RATE_CHECKS = (
    RateCheck("matrix products under load", "matrix_tflops", "matrix_tflops", "TFLOP/s", _SLOW_GPU, 0.95, 0.8,
              is_of_device=True),
    RateCheck("copy on the GPU", "device_copy_gb_per_s", "device_copy_gb_per_s", "GB/s", _SLOW_GPU, 0.95, 0.5,
              is_of_device=True),
    RateCheck("copy from host to GPU", "host_to_device_gb_per_s", "host_copy_gb_per_s", "GB/s", _SLOW_HOST, 0.8,
              is_of_device=True, by_component=True),
    RateCheck("copy from GPU to host", "device_to_host_gb_per_s", "host_copy_gb_per_s", "GB/s", _SLOW_HOST, 0.8,
              is_of_device=True, by_component=True),
    RateCheck("memory bandwidth (triad)", "memory_gb_per_s", "memory_gb_per_s", "GB/s", _SLOW_HOST, 0.8),
    RateCheck("local disk, write", "disk_write_gb_per_s", "disk_write_gb_per_s", "GB/s", _SLOW_DISK, 0.5),
    RateCheck("local disk, read", "disk_read_gb_per_s", "disk_read_gb_per_s", "GB/s", _SLOW_DISK, 0.5),
)  # fmt: skip


@dataclass(frozen=True)
class RateLimits:
    """Sources of the limits of rates. gpu_name: "" on nodes without GPUs, whose rates are not compared with each other."""

    minimums: NodeMinimums
    baseline: SiteBaseline | None
    gpu_name: str

    @property
    def other_baseline(self) -> str | None:
        """Return the GPUs of the baseline if they are not those of the nodes; None if they are, or without a baseline."""
        return self.baseline.gpu if self.baseline and self.baseline.gpu != self.gpu_name else None

    @property
    def usable_baseline(self) -> SiteBaseline | None:
        """Return the baseline if it was measured on GPUs like those of the nodes."""
        return self.baseline if self.other_baseline is None else None


@dataclass(frozen=True)
class Limit:
    """A limit of a rate.

    origin: where it is from, for people
    below:  result of a lower rate
    remedy: of a lower rate; "": that of the RateCheck
    """

    minimum: float
    origin: str
    below: Result
    remedy: str = ""


def rate_rows(measured: Mapping[str, NodeMeasurements], limits: RateLimits) -> Iterator[CheckRow]:
    """Yield the rows of all rates of all nodes. Virtual hosts share their cores, so nodes without GPUs are not compared."""
    for check in RATE_CHECKS:
        if check.is_of_device and not limits.gpu_name:
            continue
        fixed = [*_site_limits(check, limits), *_datasheet_limits(check, limits.gpu_name)]
        for peers in _peers(check, rates_of(check, measured)):
            usual = _usual_limits(check, peers) if limits.gpu_name else []
            for key, rate in peers.items():
                yield rate_row(check, _named(measured, *key), rate, [*fixed, *usual])


def _named(measured: Mapping[str, NodeMeasurements], node: str, number: str) -> Component:
    """Return the component of a rate: a GPU gets the name that other checks have for it."""
    return Component(node, measured[node].devices[int(number)].name if number else "")


def rates_of(check: RateCheck, measured: Mapping[str, NodeMeasurements]) -> Rates:
    """Return the rates of one kind; a node that could not measure it has none."""
    if check.is_of_device:
        return {
            (node, str(number)): getattr(device, check.key)
            for node, found in measured.items()
            for number, device in enumerate(found.devices)
        }
    rates = {(node, ""): getattr(found, check.key) for node, found in measured.items()}
    return {key: rate for key, rate in rates.items() if rate is not None}


def _peers(check: RateCheck, rates: Rates) -> list[Rates]:
    """Return the groups of rates that are compared with each other."""
    groups: dict[str, Rates] = {}
    for (node, component), rate in rates.items():
        groups.setdefault(component if check.by_component else "", {})[node, component] = rate
    return list(groups.values())


def usual_of(values: Collection[float]) -> UsualRate:
    """Return median and spread of values of one kind."""
    return {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "count": len(values),
    }


def _site_limits(check: RateCheck, limits: RateLimits) -> Iterator[Limit]:
    """Yield the site's limits."""
    if minimum := getattr(limits.minimums, check.minimum):
        yield Limit(minimum, "node_minimums of the site file", "fail")
    usual = limits.usable_baseline.rates.get(check.key) if limits.usable_baseline else None
    if usual:
        yield from baseline_limits(check, usual)


def baseline_limits(check: RateCheck, usual: UsualRate) -> list[Limit]:
    """Return the limits by the site's baseline. A rate that a healthy node had when it was taken is no finding."""
    origin = f"the site's baseline is {usual['median']:.3g}"
    return [
        Limit(min(check.min_share * usual["median"], usual["lowest"]), origin, "warn"),
        Limit(min(check.failed_share * usual["median"], usual["lowest"]), origin, "fail"),
    ]


def _datasheet_limits(check: RateCheck, gpu_name: str) -> Iterator[Limit]:
    sheet = datasheet(gpu_name) if gpu_name else None
    if sheet and check.key == "matrix_tflops":
        yield Limit(sheet.min_matrix_tflops, f"the datasheet says {sheet.bf16_tflops:g}", "warn")
    if sheet and check.key == "device_copy_gb_per_s":
        yield Limit(sheet.min_copy_gb_per_s, f"the datasheet says {sheet.memory_gb_per_s:g}", "warn")


def _usual_limits(check: RateCheck, peers: Rates) -> list[Limit]:
    if len(peers) < FEWEST_FOR_MEDIAN:
        return []
    return median_limits(check, statistics.median(peers.values()))


def median_limits(check: RateCheck, median: float) -> list[Limit]:
    """Return the limits by the median of the run."""
    origin = f"the median of the run is {median:.3g}"
    return [
        Limit(check.min_share * median, origin, "warn"),
        Limit(check.failed_share * median, origin, "fail"),
    ]


def rate_row(check: RateCheck, component: Component, rate: float, limits: list[Limit]) -> CheckRow:
    """Return the row with the worst limit that the rate misses; if it misses none, with the highest one."""
    missed = sorted((limit for limit in limits if rate < limit.minimum), key=lambda limit: limit.below)  # fail, warn
    shown = next(iter(missed), max(limits, key=lambda limit: limit.minimum, default=None))
    expected = f">= {shown.minimum:.3g} {check.unit} ({shown.origin})" if shown else "measured only"
    result: Result = missed[0].below if missed else "ok"
    remedy = (shown.remedy if shown else "") or check.remedy
    return component.row(check.check, f"{rate:.3g} {check.unit}", expected, result, remedy)
