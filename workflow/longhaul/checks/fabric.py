"""Runs the fabric check over NCCL or gloo: pairs of nodes, then collectives; compares with `interconnect.limits` of the site."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from longhaul.artifacts.artifact_schemas import failed_path
from longhaul.artifacts.fabric_report import CollectiveResult, FabricReport, PairResult
from longhaul.artifacts.node_results import NodeResult, append_node_results, new_node_result
from longhaul.artifacts.paths import JobFolder
from longhaul.checks.pair_evidence import slow_node_line
from longhaul.config.site_config import FabricLimits
from longhaul.errors import BadNodesError
from longhaul.jobs.kinds.fabric_job import FEWEST_COMPARED_NODES, FabricSpec
from longhaul.runtime.process_rank import Rank, require_planned_size, this_rank
from longhaul.runtime.rank_placement import gpu_index
from longhaul.runtime.rendezvous import process_group

if TYPE_CHECKING:
    from longhaul.checks.collective_benchmarks import MeasuredGroup
    from longhaul.checks.pair_tournament import Tournament

_TIMEOUT_S = 60.0
"""Time-out of one message or collective. The sizes are chosen so that each takes a few seconds at most."""
_TOURNAMENT_BUDGET_S, _QUICK_TOURNAMENT_BUDGET_S = 300.0, 20.0
"""Enough for every pair of 1,000 nodes; and before a training, of 66 nodes. Of more nodes, the pairs are a sample."""
_MOST_REPORTED_PAIRS = 20_000
_BANDWIDTH = "_gbps"
"""End of the names of limits of bandwidths."""
_COLLECTIVE_BUDGET_S = 4.0
"""Time for all sizes of one collective; six collectives, inside the nodes and between all ranks, take less than a minute."""
SIZES_BYTES = {
    "gloo": (8, 2**16, 2**20, 2**24),
    "nccl": (8, 2**16, 2**20, 2**24, 2**28, 2**30, 2**33),
}


def run(job: FabricSpec) -> None:
    """Measure pairs of nodes and collectives, and write job.out, or `<out>.failed.json` beside it when there is a problem.

    Raises:
        BadNodesError: nodes are slow with most others.
        UserError:     another problem; the first rank raises it and lists all problems.
    """
    import torch

    from longhaul.checks.pair_tournament import run_tournament

    rank = this_rank()
    require_planned_size(rank, job.nodes * job.gpus_per_node, job.nodes)
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    backend = "nccl" if on_gpu else "gloo"
    with process_group(rank, backend, _TIMEOUT_S):
        device = torch.device("cuda", gpu_index(rank)) if on_gpu else torch.device("cpu")
        hosts = _node_names(rank)
        budget_s = _QUICK_TOURNAMENT_BUDGET_S if job.pairs_only else _TOURNAMENT_BUDGET_S
        tournament = run_tournament(rank, hosts, device, budget_s)
        # A slow node or link makes every collective slow; nothing is learned from the time that they would take.
        is_full = tournament.is_healthy and not job.pairs_only
        results = _measure_all(rank, device, backend) if is_full else []
    if rank.is_main:
        report = _report(job, backend, hosts, results, rank.world_size, tournament)
        append_node_results(JobFolder(Path(job.folder)), node_results(tournament))
        if report.results:
            _print_measurements(report)
        for line in report.not_compared:
            print(f"unknown: {line}", flush=True)
        raise_if_slow(report, Path(job.out))
        report.write_or_raise(
            Path(job.out),
            f"the network between {', '.join(report.hosts)} is not fit for training",
            "exclude a node of each slow link; correct interconnect.limits in the site file if they are too strict",
        )


def _measure_all(rank: Rank, device: Any, backend: str) -> list[CollectiveResult]:
    """Return on rank 0 one row per scope, collective and size; a single process has none.

    With several ranks on several nodes, the ranks of each node are measured first, all nodes at once.
    """
    import torch.distributed as dist

    from longhaul.checks.collective_benchmarks import MeasuredGroup

    results: list[CollectiveResult] = []
    ranks_per_node = rank.world_size // rank.nodes
    if rank.nodes > 1 and ranks_per_node > 1:
        of_node: Any = dist.new_subgroups(ranks_per_node)[0]
        group = MeasuredGroup(rank.rank % ranks_per_node, ranks_per_node, device, of_node, "node")
        results += slowest_of_nodes(_on_rank_0(rank, _measure_group(group, backend)))
    if rank.world_size > 1:
        results += _measure_group(MeasuredGroup(rank.rank, rank.world_size, device), backend)
    return results


def _measure_group(group: MeasuredGroup, backend: str) -> list[CollectiveResult]:
    from longhaul.checks.collective_benchmarks import COLLECTIVES, largest_message, measure_sizes

    largest = largest_message(group)
    sizes = [size for size in SIZES_BYTES[backend] if size <= largest]
    return [row for one in COLLECTIVES for row in measure_sizes(one, group, sizes, _COLLECTIVE_BUDGET_S)]


def _on_rank_0(rank: Rank, own: list[CollectiveResult]) -> list[list[CollectiveResult]]:
    """Return on rank 0 the rows of every rank; [] on other ranks."""
    import torch.distributed as dist

    rows: list[Any] | None = [None] * rank.world_size if rank.is_main else None
    dist.gather_object(own, rows)
    return rows or []


def slowest_of_nodes(rows_of_ranks: list[list[CollectiveResult]]) -> list[CollectiveResult]:
    """Return of each collective and size the row of the slowest group. Sizes that a group left out are left out."""
    found: dict[tuple[str, int], list[CollectiveResult]] = {}
    for rows in rows_of_ranks:
        for row in rows:
            found.setdefault((row["collective"], row["bytes"]), []).append(row)
    complete = [rows for rows in found.values() if len(rows) == len(rows_of_ranks)]
    return [
        {
            **min(rows, key=lambda row: row["bus_bandwidth_gbps"]),
            "time_us": max(row["time_us"] for row in rows),
            "correct": all(row["correct"] for row in rows),
        }
        for rows in complete
    ]


def _node_names(rank: Rank) -> list[str]:
    """Return the name of each node, by its first rank."""
    import torch.distributed as dist

    names: list[Any] = [None] * rank.world_size
    dist.all_gather_object(names, rank.node_name)
    return names[:: rank.world_size // rank.nodes]


def node_results(tournament: Tournament) -> list[NodeResult]:
    """Return for each node the median bandwidth of its pairs, and why it is slow."""
    rates: dict[str, list[float]] = defaultdict(list)
    for pair in tournament.pairs:
        for host in pair["hosts"]:
            rates[host].append(pair["bandwidth_gbps"])
    problems = {
        node["host"]: f"slow: usual are {node['usual_bandwidth_gbps']:.3g} GB/s" for node in tournament.slow_nodes
    }
    return [
        new_node_result(host, "pair tournament", statistics.median(found), problems.get(host, ""))
        for host, found in rates.items()
    ]


def raise_if_slow(report: FabricReport, out: Path) -> None:
    """Write the failed report and raise BadNodesError if a node is slow."""
    if report.slow_nodes:
        report.write(failed_path(out))
        raise BadNodesError(
            "; ".join(report.problems),
            f"ask the administrators to test the network of these nodes; the full report is {failed_path(out)}",
            [node["host"] for node in report.slow_nodes],
        )


def _report(
    job: FabricSpec,
    backend: str,
    hosts: list[str],
    results: list[CollectiveResult],
    world_size: int,
    tournament: Tournament,
) -> FabricReport:
    limits, node_limits = _set_limits(job.limits), _set_limits(job.node_limits)
    for line in tournament.slow_links if job.pairs_only else ():
        print(f"warning: {line}", flush=True)
    problems = [
        *tournament.wrong_values,
        *map(slow_node_line, tournament.slow_nodes),
        *(() if job.pairs_only else tournament.slow_links),
        *fabric_problems([row for row in results if row["scope"] == "all"], limits),
        *(
            f"inside a node: {line}"
            for line in fabric_problems([r for r in results if r["scope"] == "node"], node_limits)
        ),
    ]
    return FabricReport(
        problems,
        backend,
        world_size,
        hosts,
        results,
        limits,
        slowest_pairs(tournament.pairs),
        tournament.slow_nodes,
        node_limits,
        not_compared(hosts, results, limits, node_limits),
    )


def not_compared(
    hosts: Sequence[str],
    results: Sequence[CollectiveResult],
    limits: Mapping[str, float],
    node_limits: Mapping[str, float],
) -> list[str]:
    """Return one line for each scope of collectives whose bandwidth passes at any speed, with the remedy.

    limits, node_limits: those that the site file sets. From FEWEST_COMPARED_NODES nodes on, pairs of nodes are compared.
    """
    if len(hosts) >= FEWEST_COMPARED_NODES:
        return []
    scopes = {"all": ("between all ranks", "limits", limits), "node": ("inside a node", "node_limits", node_limits)}
    measured = {row["scope"] for row in results}
    return [
        f"bandwidth {where}: nothing to compare with; set interconnect.{key} in the site file, or checks.nodes to at least "
        f"{FEWEST_COMPARED_NODES}"
        for scope, (where, key, found) in scopes.items()
        if scope in measured and not any(name.endswith(_BANDWIDTH) for name in found)
    ]


def slowest_pairs(pairs: list[PairResult]) -> list[PairResult]:
    """Return the pairs that the report keeps: all of up to 200 nodes, else the slowest ones."""
    if len(pairs) <= _MOST_REPORTED_PAIRS:
        return pairs
    return sorted(pairs, key=lambda pair: pair["bandwidth_gbps"])[:_MOST_REPORTED_PAIRS]


def _set_limits(limits: FabricLimits) -> dict[str, float]:
    return {name: value for name, value in limits.model_dump().items() if value is not None}


def fabric_problems(results: list[CollectiveResult], limits: dict[str, float]) -> list[str]:
    """Return wrong values, bandwidths below their minimum at the largest size, and a latency above its maximum."""
    found = [
        f"{row['collective']} of {row['bytes']:,} bytes gave wrong values" for row in results if not row["correct"]
    ]
    for name in dict.fromkeys(row["collective"] for row in results):
        minimum = limits.get(f"{name}{_BANDWIDTH}")
        row = max((row for row in results if row["collective"] == name), key=lambda row: row["bytes"])
        if minimum and row["bus_bandwidth_gbps"] < minimum:
            found.append(
                f"{name}: bus bandwidth {row['bus_bandwidth_gbps']:.3g} GB/s at {row['bytes'] / 2**20:.0f} MiB over "
                f"{row['world_size']} ranks, the site file's minimum is {minimum:g} GB/s"
            )
    maximum, latency = limits.get("all_reduce_latency_us"), latency_us(results)
    if maximum and latency and latency > maximum:
        found.append(
            f"all_reduce: {latency:.0f} us for the smallest message, the site file's maximum is {maximum:g} us"
        )
    return found


def latency_us(results: list[CollectiveResult]) -> float | None:
    """Return the time of the smallest all_reduce in microseconds; None without measurements."""
    rows = [row for row in results if row["collective"] == "all_reduce"]
    return min(rows, key=lambda row: row["bytes"])["time_us"] if rows else None


def _print_measurements(report: FabricReport) -> None:
    title = f"{report.backend} between {report.world_size} ranks on {', '.join(report.hosts)}"
    columns = ("ranks", "collective", "bytes", "time us", "median us", "95 % us", "algorithm GB/s", "bus GB/s")
    table = Table(*columns, title=title, title_justify="left")
    for row in report.results:
        rates = (f"{rate:.3f}" for rate in (row["algorithm_bandwidth_gbps"], row["bus_bandwidth_gbps"]))
        times = (f"{row[key]:,.1f}" for key in ("time_us", "median_us", "p95_us"))
        table.add_row(row["scope"], row["collective"], f"{row['bytes']:,}", *times, *rates)
    Console(width=120).print(table)
