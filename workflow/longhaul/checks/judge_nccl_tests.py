"""Compares what nccl-tests measured with the limits, baseline and catalogue of the check's own collectives, and prints it beside
these.
"""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from longhaul.artifacts.fabric_report import CollectiveResult, FabricReport
from longhaul.artifacts.nccl_tests_report import NcclTestsReport, NcclTestsResult
from longhaul.artifacts.site_baseline import SiteBaseline
from longhaul.checks.compare_with_published_rates import FabricHardware
from longhaul.checks.fabric_limits import fabric_problems
from longhaul.checks.nccl_tests import has_wrong_values
from longhaul.checks.network_baseline import compare_network

_NAME = "nccl-tests"


def with_nccl_tests(
    report: FabricReport,
    measured: NcclTestsReport,
    baseline: SiteBaseline | None,
    hardware: FabricHardware,
    accepts_slow: bool = False,
) -> FabricReport:
    """Return the report with the rows of nccl-tests. They are compared as the check's own rows between all ranks are.

    Wrong values of either half count; the bandwidth of separate buffers does, which all programs have.
    """
    rows = [_as_collective(row) for row in measured.results]
    alone = replace(report, backend="nccl", problems=[], results=rows, pairs=[], node_limits={}, warnings=[])
    compared = compare_network(alone, baseline, hardware, accepts_slow)
    problems = [*fabric_problems(rows, report.limits), *measured.problems, *compared.problems]
    return replace(
        report,
        problems=[*report.problems, *(f"{_NAME}: {line}" for line in problems)],
        warnings=[*report.warnings, *(f"{_NAME}: {line}" for line in (*measured.warnings, *compared.warnings))],
        nccl_tests=measured.results,
    )


def _as_collective(row: NcclTestsResult) -> CollectiveResult:
    timing = row["out_of_place"]
    return {
        "collective": row["collective"],
        "scope": "all",
        "bytes": row["bytes"],
        "world_size": row["world_size"],
        "rounds": 1,  # nothing compares rounds and percentiles
        "time_us": timing["time_us"],
        "median_us": timing["time_us"],
        "p95_us": timing["time_us"],
        "algorithm_bandwidth_gbps": timing["algorithm_bandwidth_gbps"],
        "bus_bandwidth_gbps": timing["bus_bandwidth_gbps"],
        "correct": not has_wrong_values(row),
    }


def print_nccl_tests(report: FabricReport) -> None:
    """Print the rows beside the bus bandwidth that the check itself measured at the same size."""
    own = report.own_bandwidths()
    columns = (
        "collective",
        "bytes",
        "time us",
        "algorithm GB/s",
        "bus GB/s",
        "in place",
        "wrong",
        f"{report.backend} bus GB/s",
    )
    table = Table(*columns, title=f"{_NAME} between {report.world_size} ranks", title_justify="left")
    for row in report.nccl_tests:
        timing, in_place = row["out_of_place"], row["in_place"]
        wrong = [half["wrong"] for half in (timing, in_place) if half and half["wrong"] is not None]
        table.add_row(
            row["collective"],
            f"{row['bytes']:,}",
            f"{timing['time_us']:,.1f}",
            f"{timing['algorithm_bandwidth_gbps']:.2f}",
            f"{timing['bus_bandwidth_gbps']:.2f}",
            f"{in_place['bus_bandwidth_gbps']:.2f}" if in_place else "",
            f"{sum(wrong):.0f}" if wrong else "not checked",
            f"{rate:.3f}" if (rate := own.get((row["collective"], row["bytes"]))) is not None else "",
        )
    Console(width=120).print(table)
