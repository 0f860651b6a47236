"""Runs the fabric check over NCCL or gloo: pairs of nodes, then collectives; compares with limits, baseline and catalogue."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from longhaul.artifacts.fabric_report import CollectiveResult, FabricReport, PairResult
from longhaul.artifacts.nccl_tests_report import NcclTestsReport
from longhaul.artifacts.node_results import NodeResult, append_node_results, new_node_result
from longhaul.artifacts.paths import JobFolder
from longhaul.checks.collectives_inside_nodes import InsideNodes, hosts_text, measure_inside_nodes
from longhaul.checks.compare_with_published_rates import FabricHardware
from longhaul.checks.fabric_limits import fabric_problems, set_limits
from longhaul.checks.find_slow_nodes import SLOW_SHARES
from longhaul.checks.hung_steps import COLLECTIVES_OF_RANKS, CONNECTIONS, GPUS, KERNEL, RUN_FOLDER
from longhaul.checks.judge_nccl_tests import print_nccl_tests, with_nccl_tests
from longhaul.checks.network_baseline import MOST_REPORTED_PAIRS, compare_network
from longhaul.checks.network_ports_for_nccl import NodeNetwork, read_node_network, slowest_network
from longhaul.checks.packet_loss import grown_line
from longhaul.checks.pair_evidence import loss_text, slow_node_line, slow_node_text
from longhaul.checks.pair_schedule import planned_repetition_seconds, planned_seconds
from longhaul.checks.repetition_pauses import REPETITION_PAUSES_S
from longhaul.checks.run_parts_in_child import HungStep, Part, Step, announce, run_parts
from longhaul.errors import UserError
from longhaul.jobs.kinds.fabric_job import FabricSpec
from longhaul.runtime.process_rank import Rank, require_planned_size, this_rank
from longhaul.runtime.rank_placement import computes_on_gpus, gpu_index
from longhaul.runtime.rdma_variables import INTERCONNECT
from longhaul.runtime.rendezvous import process_group

if TYPE_CHECKING:
    from longhaul.checks.collective_benchmarks import MeasuredGroup
    from longhaul.checks.pair_tournament import Tournament

_TIMEOUT_S = 60.0
"""Time-out of one message or collective. The sizes are chosen so that each takes a few seconds at most."""
_TOURNAMENT_BUDGET_S, _QUICK_TOURNAMENT_BUDGET_S = 300.0, 20.0
"""Enough for every pair of 1,000 nodes; and before a training, of 66 nodes. Of more nodes, the pairs are a sample."""
_COLLECTIVES, _COLLECTIVE_BUDGET_S = 6, 4.0
"""Time for all sizes of one collective; six collectives, inside the nodes and between all ranks, take less than a minute."""
SIZES_BYTES = {
    "gloo": (8, 2**16, 2**20, 2**24),
    "nccl": (8, 2**16, 2**20, 2**24, 2**28, 2**30, 2**33),
}


def run(job: FabricSpec) -> None:
    """Measure pairs of nodes and collectives, and write job.out, or `<out>.failed.json` beside it when there is a problem.

    Raises:
        BadNodesError:  nodes are slow with most others, or too slow or wrong inside.
        HungCheckError: a step of this rank did not end, or ended its process.
        UserError:      another problem; the first rank raises it and lists all problems.
    """
    import torch  # noqa: F401  # before the child starts, so that the time of the import is not that of its first step

    first_step = Step("first call into CUDA or ROCm", GPUS)
    _, hung = run_parts([Part("check", first_step, lambda _: _check(job))])
    if hung:
        raise HungCheckError(hung[0], this_rank())


class HungCheckError(UserError):
    """A step of a rank did not end in time. On other nodes it may."""

    failure_class = "node"

    def __init__(self, hung: HungStep, rank: Rank) -> None:
        step = hung.step
        places = [rank.node_name, f"rank {rank.rank}", *(f"GPU {index} by torch's number" for index in step.gpus)]
        super().__init__(f"{': '.join(places)}: {step.text}: {hung.reason}", step.subject.remedy)


def _check(job: FabricSpec) -> None:
    from longhaul.checks.new_link_errors import LinkErrors
    from longhaul.checks.pair_tournament import run_tournament

    rank = this_rank()
    require_planned_size(rank, job.nodes * job.gpus_per_node, job.nodes)
    if rank.is_main:
        _print_planned_time(job)
    device = _open_device(rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    announce("rendezvous, and opening of connections to the other ranks", _numbers(device), CONNECTIONS)
    with process_group(rank, backend, _TIMEOUT_S):
        announce("names of the nodes", _numbers(device), COLLECTIVES_OF_RANKS)
        hosts = _of_first_ranks(rank, rank.node_name)
        tournament = run_tournament(rank, hosts, device, _tournament_budget_s(job.pairs_only))
        is_full = not job.pairs_only and _may_go_on(tournament, job)
        announce("error counters of links before the collectives", _numbers(device), KERNEL)
        errors = LinkErrors(rank, device) if is_full else None
        inside = _measure_inside(rank, hosts, device, backend, job) if is_full else InsideNodes()
        results = _measure_between(rank, device, backend) if is_full else []
        announce("error counters of links after the collectives", _numbers(device), COLLECTIVES_OF_RANKS)
        new_errors = errors.gather_new() if errors else []
        hardware = measured_hardware(device, _slowest_network(rank) if is_full else None)
    announce(f"report in {job.out}", subject=RUN_FOLDER)
    if rank.is_main:
        report = _report(job, backend, hosts, results, inside, rank.world_size, tournament)
        report = _compared(replace(report, warnings=new_errors), job, hardware)
        if job.nccl_tests:
            measured = NcclTestsReport.read(JobFolder(Path(job.folder)).nccl_tests)
            report = with_nccl_tests(report, measured, job.baseline, hardware, _accepts_slow(job))
        results_of_nodes = [*node_results(tournament, _accepts_slow(job)), *inside.node_results()]
        append_node_results(JobFolder(Path(job.folder)), results_of_nodes)
        if report.results:
            _print_measurements(report)
        if report.nccl_tests:
            print_nccl_tests(report)
        for line in (*report.accepted, *report.warnings):
            print(f"warning: {line}", flush=True)
        for line in report.not_compared:
            print(f"unknown: {line}", flush=True)
        write_or_raise(job, report, inside.bad_nodes)


def planned_check_seconds(nodes: int, ranks_per_node: int, pairs_only: bool = False) -> dict[str, float]:
    """Return part of the check -> its planned duration in seconds; parts that are not measured have none.

    A part ends at its budget, so that the time does not grow with the number of nodes: of more nodes, pairs are a sample.
    """
    found = {"pairs": planned_seconds(nodes, _tournament_budget_s(pairs_only))}
    of_collectives = 0.0 if pairs_only else _COLLECTIVES * _COLLECTIVE_BUDGET_S
    if nodes > 1 and ranks_per_node > 1:
        found["collectives inside the nodes"] = of_collectives
    if nodes * ranks_per_node > 1:
        found["collectives between all ranks"] = of_collectives
    return {part: seconds for part, seconds in found.items() if seconds}


def most_added_seconds(nodes: int, ranks_per_node: int, pairs_only: bool = False) -> float:
    """Return how many seconds the repetitions of slow measurements add to the planned time, at most by plan."""
    inside_s = 0.0 if pairs_only or nodes == 1 or ranks_per_node == 1 else sum(REPETITION_PAUSES_S)
    return planned_repetition_seconds(nodes) + inside_s


def _tournament_budget_s(pairs_only: bool) -> float:
    return _QUICK_TOURNAMENT_BUDGET_S if pairs_only else _TOURNAMENT_BUDGET_S


def _open_device(rank: Rank) -> Any:
    """Return this rank's GPU, which CUDA has opened; the CPU on a node without GPUs."""
    import torch

    if not computes_on_gpus():
        return torch.device("cpu")
    device = torch.device("cuda", gpu_index(rank))
    announce("first call into CUDA or ROCm", _numbers(device))
    torch.cuda.set_device(device)
    return device


def _numbers(device: Any) -> list[int]:
    return [] if device.index is None else [device.index]


def _print_planned_time(job: FabricSpec) -> None:
    parts = planned_check_seconds(job.nodes, job.gpus_per_node, job.pairs_only)
    text = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in parts.items()) or "nothing to measure"
    added_s = most_added_seconds(job.nodes, job.gpus_per_node, job.pairs_only)
    more = f", up to {added_s:.0f} s more if something is slow" if added_s else ""
    print(f"fabric check of {job.nodes} nodes: about {sum(parts.values()):.0f} s ({text}){more}", flush=True)


def _measure_inside(rank: Rank, hosts: list[str], device: Any, backend: str, job: FabricSpec) -> InsideNodes:
    """Measure between the ranks of each node; a single node or nodes of one rank have nothing apart from all ranks."""
    import torch.distributed as dist

    from longhaul.checks.collective_benchmarks import MeasuredGroup

    ranks_per_node = rank.world_size // rank.nodes
    if rank.nodes == 1 or ranks_per_node == 1:
        return InsideNodes()
    of_node: Any = dist.new_subgroups(ranks_per_node)[0]
    group = MeasuredGroup(rank.rank % ranks_per_node, ranks_per_node, device, of_node, "node")
    rows = _measure_group(group, backend)
    inside = measure_inside_nodes(hosts, group, rows, set_limits(job.node_limits), SLOW_SHARES[backend])
    return inside.accepting_relative() if _accepts_slow(job) else inside


def _measure_between(rank: Rank, device: Any, backend: str) -> list[CollectiveResult]:
    """Return one row per collective and size between all ranks; a single process has none."""
    from longhaul.checks.collective_benchmarks import MeasuredGroup

    if rank.world_size == 1:
        return []
    return _measure_group(MeasuredGroup(rank.rank, rank.world_size, device), backend)


def _measure_group(group: MeasuredGroup, backend: str) -> list[CollectiveResult]:
    from longhaul.checks.collective_benchmarks import COLLECTIVES, largest_message, measure_sizes

    largest = largest_message(group)
    sizes = [size for size in SIZES_BYTES[backend] if size <= largest]
    return [row for one in COLLECTIVES for row in measure_sizes(one, group, sizes, _COLLECTIVE_BUDGET_S)]


def _of_first_ranks(rank: Rank, value: Any) -> list[Any]:
    """Return the value of each node, by its first rank."""
    import torch.distributed as dist

    values: list[Any] = [None] * rank.world_size
    dist.all_gather_object(values, value)
    return values[:: rank.world_size // rank.nodes]


def _slowest_network(rank: Rank) -> NodeNetwork | None:
    network = read_node_network(
        os.environ.get(INTERCONNECT, ""), rank.world_size // rank.nodes, os.environ.get("NCCL_IB_HCA", "")
    )
    return slowest_network(_of_first_ranks(rank, network))


def measured_hardware(device: Any, network: NodeNetwork | None) -> FabricHardware:
    """Return this rank's GPU, and the network. Without GPUs, the catalogue says nothing."""
    import torch

    if device.type != "cuda":
        return FabricHardware()
    has_multicast = os.environ.get("NCCL_NVLS_ENABLE") != "0"
    return FabricHardware(torch.cuda.get_device_name(device), network, has_multicast)


def node_results(tournament: Tournament, accepts_slow: bool = False) -> list[NodeResult]:
    """Return for each node the median bandwidth of its pairs, and why it is slow, if that is a problem."""
    rates: dict[str, list[float]] = defaultdict(list)
    for pair in tournament.pairs:
        for host in pair["hosts"]:
            rates[host].append(pair["bandwidth_gbps"])
    problems = {
        node["host"]: f"slow{loss_text(node.get('resent', 0.0))}: usual are {node['usual_bandwidth_gbps']:.3g} GB/s"
        for node in (() if accepts_slow else tournament.slow_nodes)
    }
    return [
        new_node_result(host, "pair tournament", statistics.median(found), problems.get(host, ""))
        for host, found in rates.items()
    ]


def _accepts_slow(job: FabricSpec) -> bool:
    """Return whether the config accepts what is slow. It never accepts wrong values and the limits of the site file."""
    return job.bad_hardware == "warn"


def _may_go_on(tournament: Tournament, job: FabricSpec) -> bool:
    """Return whether collectives are measured. Something slow makes all of them slow; how slow matters only if it is accepted."""
    return tournament.is_healthy or (_accepts_slow(job) and not tournament.wrong_values)


def write_or_raise(job: FabricSpec, report: FabricReport, slow_inside: Mapping[str, str]) -> None:
    """Write the report, or raise the error of FabricReport.write_or_raise.

    slow_inside: node that is too slow or wrong inside -> what was measured
    """
    bad_nodes = dict(slow_inside)
    if not _accepts_slow(job):
        bad_nodes |= {
            node["host"]: slow_node_text(node, report.grown_errors.get(node["host"], {})) for node in report.slow_nodes
        }
    if bad_nodes:
        hint = "ask the administrators to test network and GPU links of these nodes"
    else:
        hint = (
            "exclude a node of each slow link; correct interconnect.limits in the site file if they are too strict, and "
            "store a new baseline if the network has changed: longhaul baseline"
        )
    if report.accepted:
        hint += f"; the cause may be what the check accepted: {'; '.join(report.accepted)}"
    summary = f"the network between {hosts_text(report.hosts)} is not fit for training"
    report.write_or_raise(Path(job.out), summary, hint, bad_nodes)


def _report(
    job: FabricSpec,
    backend: str,
    hosts: list[str],
    between: list[CollectiveResult],
    inside: InsideNodes,
    world_size: int,
    tournament: Tournament,
) -> FabricReport:
    limits, node_limits = set_limits(job.limits), set_limits(job.node_limits)
    for host, counters in tournament.grown_errors.items():
        print(f"warning: {grown_line(host, counters, 'the pair tournament')}", flush=True)
    slow_nodes = [slow_node_line(node, tournament.grown_errors.get(node["host"], {})) for node in tournament.slow_nodes]
    accepted = [*(slow_nodes if _accepts_slow(job) else ()), *inside.accepted_lines()]
    if job.pairs_only or _accepts_slow(job):
        accepted += tournament.slow_links
    problems = [
        *tournament.wrong_values,
        *(line for line in (*slow_nodes, *tournament.slow_links) if line not in accepted),
        *fabric_problems(between, limits),
        *inside.problems(),
    ]
    results = [*inside.rows, *between]
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
        grown_errors=tournament.grown_errors,
        accepted=accepted,
    )


def _compared(report: FabricReport, job: FabricSpec, hardware: FabricHardware) -> FabricReport:
    """Return the report compared with baseline and catalogue. Before a training, and where the config accepts what is slow, the
    baseline is no limit.
    """
    return compare_network(report, job.baseline, hardware, accepts_slow=job.pairs_only or _accepts_slow(job))


def slowest_pairs(pairs: list[PairResult]) -> list[PairResult]:
    """Return the pairs that the report keeps: all of up to 200 nodes, else the slowest ones."""
    if len(pairs) <= MOST_REPORTED_PAIRS:
        return pairs
    return sorted(pairs, key=lambda pair: pair["bandwidth_gbps"])[:MOST_REPORTED_PAIRS]


def _print_measurements(report: FabricReport) -> None:
    title = f"{report.backend} between {report.world_size} ranks on {', '.join(report.hosts)}"
    times = {
        "time us": "time_us",
        "min us": "min_us",
        "median us": "median_us",
        "95 % us": "p95_us",
        "99 % us": "p99_us",
        "max us": "max_us",
    }
    columns = ("ranks", "collective", "bytes", *times, "algorithm GB/s", "bus GB/s")
    table = Table(*columns, title=title, title_justify="left")
    for row in report.results:
        rates = (f"{rate:.3f}" for rate in (row["algorithm_bandwidth_gbps"], row["bus_bandwidth_gbps"]))
        microseconds = (f"{row[key]:,.1f}" for key in times.values())
        table.add_row(row.get("host", row["scope"]), row["collective"], f"{row['bytes']:,}", *microseconds, *rates)
    Console(width=140).print(table)
