"""Compares pairs of nodes and collectives with the rates that the network of a site usually reaches (`longhaul baseline`), and
collectives that have none with the catalogue.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from longhaul.artifacts.fabric_report import CollectiveResult, FabricReport
from longhaul.artifacts.site_baseline import SiteBaseline, UsualRate
from longhaul.checks.compare_with_published_rates import FabricHardware, compare_with_catalogue, slow_lines
from longhaul.checks.fabric_limits import SCOPES, not_compared
from longhaul.checks.find_slow_nodes import SLOW_SHARES

MOST_REPORTED_PAIRS = 20_000
"""A report with more pairs keeps the slowest ones, whose median says nothing."""


@dataclass(frozen=True)
class NetworkRate:
    """Bandwidths in GB/s. The name says what was measured between how many ranks: only equal names are compared.

    scope: pairs, or that of a collective
    row:   of a collective
    """

    name: str
    scope: str
    values: list[float]
    row: CollectiveResult | None = None


def network_rates(report: FabricReport) -> list[NetworkRate]:
    """Return the bandwidths of all pairs, and of each collective that at its largest size."""
    found: list[NetworkRate] = []
    if 0 < len(report.pairs) < MOST_REPORTED_PAIRS:
        name = f"pairs of nodes, {report.backend}, {report.world_size // len(report.hosts)} ranks per node"
        found.append(NetworkRate(name, "pairs", [pair["bandwidth_gbps"] for pair in report.pairs]))
    largest: dict[tuple[str, str], CollectiveResult] = {}
    for row in sorted(report.results, key=lambda row: row["bytes"]):
        largest[row["scope"], row["collective"]] = row
    for (scope, collective), row in largest.items():
        name = f"{collective} {SCOPES[scope][0]}, {report.backend}, {row['world_size']} ranks, {row['bytes']:,} bytes"
        found.append(NetworkRate(name, scope, [row["bus_bandwidth_gbps"]], row))
    return found


def compare_network(
    report: FabricReport, baseline: SiteBaseline | None, hardware: FabricHardware, accepts_slow: bool = False
) -> FabricReport:
    """Return the report with a problem per rate that is far below the baseline, and a warning per rate without a limit or a
    baseline that is far below the catalogue's.

    A baseline of other GPUs says nothing. A report that refuses slow nodes needs no second reason.
    accepts_slow: what is far below the baseline is a warning, too
    """
    usual = baseline.network if baseline and baseline.gpu == hardware.gpu else {}
    rates = network_rates(report)
    others = [rate.row for rate in rates if rate.row and rate.name not in usual]
    in_catalogue = compare_with_catalogue(report, others, hardware)
    compared = {rate.scope for rate in rates if rate.name in usual} | {one.row["scope"] for one in in_catalogue}
    uncompared = [row for row in report.results if row["scope"] not in compared]
    below = [] if report.slow_nodes and not accepts_slow else list(_slow_rates(report, usual))
    return replace(
        report,
        problems=[*report.problems, *(() if accepts_slow else below)],
        not_compared=not_compared(report.hosts, uncompared, report.limits, report.node_limits),
        warnings=[*report.warnings, *(below if accepts_slow else ()), *slow_lines(in_catalogue)],
    )


def _slow_rates(report: FabricReport, usual: Mapping[str, UsualRate]) -> Iterator[str]:
    """Yield a line per slow rate. A rate that the healthy run had, too, is no finding."""
    for rate in network_rates(report):
        known, found = usual.get(rate.name), statistics.median(rate.values)
        if known and found < min(SLOW_SHARES[report.backend] * known["median"], known["lowest"]):
            yield f"{rate.name}: {found:.3g} GB/s, the site's baseline is {known['median']:.3g} GB/s"
