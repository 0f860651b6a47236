"""Measures the network between all ranks of an allocation and holds it against the site's limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from longhaul.artifacts.schemas import FabricReport
from longhaul.jobs.specs import FabricSpec
from longhaul.runtime.rank import Rank, require_geometry, this_rank
from longhaul.runtime.rendezvous import process_group

_TIMEOUT_S = 300.0
_BUDGET_S = 0.3
"""Timed rounds of one collective at one size."""
_LATENCY_BYTES = 8
SIZES_BYTES = {
    "gloo": (_LATENCY_BYTES, 2**16, 2**20, 2**24),
    "nccl": (_LATENCY_BYTES, 2**16, 2**20, 2**24, 2**28, 2**30),
}


def run(job: FabricSpec) -> None:
    """Measures and writes job.out, or, when a floor is missed, `<out>.failed.json` beside it.

    Raises:
        UserError: on the first rank, with every collective that gave wrong values or is too slow.
    """
    import torch

    rank = this_rank()
    require_geometry(rank, job.nodes * job.gpus_per_node, job.nodes)
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    backend = "nccl" if on_gpu else "gloo"
    with process_group(rank, backend, _TIMEOUT_S):
        device = torch.device("cuda", rank.local_rank) if on_gpu else torch.device("cpu")
        results = _measure_all(rank, device, backend)
        hosts: list[Any] = [None] * rank.world_size
        torch.distributed.all_gather_object(hosts, rank.host)
    if rank.is_main:
        report = _report(job, backend, list(dict.fromkeys(hosts)), results, rank.world_size)
        _print(report)
        report.conclude(
            Path(job.out),
            f"the network between {', '.join(report.hosts)} is not fit for training",
            "try other nodes to find the slow link, or correct interconnect in the site file",
        )


def _measure_all(rank: Rank, device: Any, backend: str) -> list[dict[str, Any]]:
    from longhaul.checks.collective_benchmarks import COLLECTIVES, Group, measure

    if rank.world_size == 1:
        return []  # one process has nobody to talk to
    group = Group(rank.rank, rank.world_size, device)
    return [measure(collective, group, size, _BUDGET_S) for collective in COLLECTIVES for size in SIZES_BYTES[backend]]


def _report(
    job: FabricSpec, backend: str, hosts: list[str], results: list[dict[str, Any]], world_size: int
) -> FabricReport:
    limits = {name: value for name, value in job.limits.model_dump().items() if value is not None}
    return FabricReport(judge(results, limits), backend, world_size, hosts, results, limits)


def judge(results: list[dict[str, Any]], limits: dict[str, float]) -> list[str]:
    """Wrong values, bandwidths below their floor at the largest size, and the latency above its limit."""
    found = [
        f"{row['collective']} of {row['bytes']:,} bytes gave wrong values" for row in results if not row["correct"]
    ]
    largest = max((row["bytes"] for row in results), default=0)
    for row in results:
        floor = limits.get(f"{row['collective']}_gbps")
        if row["bytes"] == largest and floor and row["bus_bandwidth_gbps"] < floor:
            found.append(
                f"{row['collective']}: bus bandwidth {row['bus_bandwidth_gbps']:.3g} GB/s at {largest / 2**20:.0f} MiB over "
                f"{row['world_size']} ranks, the site's floor is {floor:g} GB/s"
            )
    limit, latency = limits.get("all_reduce_latency_us"), latency_us(results)
    if limit and latency and latency > limit:
        found.append(f"all_reduce: {latency:.0f} us for the smallest message, the site's limit is {limit:g} us")
    return found


def latency_us(results: list[dict[str, Any]]) -> float | None:
    """Time of the smallest all_reduce, in microseconds."""
    rows = [row for row in results if row["collective"] == "all_reduce"]
    return min(rows, key=lambda row: row["bytes"])["time_us"] if rows else None


def _print(report: FabricReport) -> None:
    title = f"{report.backend} between {report.world_size} ranks on {', '.join(report.hosts)}"
    table = Table("collective", "bytes", "time us", "algorithm GB/s", "bus GB/s", title=title, title_justify="left")
    for row in report.results:
        rates = (f"{row[f'{kind}_bandwidth_gbps']:.3f}" for kind in ("algorithm", "bus"))
        table.add_row(row["collective"], f"{row['bytes']:,}", f"{row['time_us']:,.1f}", *rates)
    Console(width=120).print(table)
