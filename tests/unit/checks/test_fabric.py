"""The fabric check: formulas, slow nodes, and real collectives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.artifacts.artifact_schemas import failed_path
from longhaul.artifacts.fabric_report import FabricReport, PairResult, SlowNode
from longhaul.artifacts.line_records import read_records
from longhaul.artifacts.node_results import NodeResult
from longhaul.artifacts.paths import JobFolder, JobId
from longhaul.artifacts.site_baseline import SiteBaseline, UsualRate
from longhaul.checks.collective_benchmarks import COLLECTIVES
from longhaul.checks.collectives_inside_nodes import InsideNodes
from longhaul.checks.compare_with_published_rates import FabricHardware
from longhaul.checks.fabric import (
    _compared,
    _may_go_on,
    _report,
    measured_hardware,
    most_added_seconds,
    node_results,
    planned_check_seconds,
    slowest_pairs,
    write_or_raise,
)
from longhaul.checks.network_ports_for_nccl import NodeNetwork
from longhaul.checks.pair_tournament import Tournament
from longhaul.config.site_config import FabricLimits
from longhaul.errors import BadNodesError, UserError
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.fabric_job import FabricSpec
from tests.support.small_configs import plan_of

LINK = "the link between n1 and n3"
FACTORS = {
    "all_reduce": {2: 1.0, 4: 1.5, 8: 1.75},
    "all_gather": {2: 0.5, 4: 0.75, 8: 0.875},
    "reduce_scatter": {2: 0.5, 4: 0.75, 8: 0.875},
    "all_to_all": {2: 0.5, 4: 0.75, 8: 0.875},
    "broadcast": {2: 1.0, 4: 1.0, 8: 1.0},
    "send_recv": {2: 1.0, 4: 1.0, 8: 1.0},
}


def test_bus_bandwidth_factors_equal_those_of_nccl_tests() -> None:
    """The expected values are from doc/PERFORMANCE.md of nccl-tests."""
    found = {collective.name: {n: collective.bus_factor(n) for n in (2, 4, 8)} for collective in COLLECTIVES}
    assert found == FACTORS


@pytest.mark.parametrize(
    ("nodes", "ranks_per_node", "pairs_only", "seconds"),
    [
        (1000, 8, False, [299.7, 24.0, 24.0]),
        (4096, 8, False, [300.0, 24.0, 24.0]),
        (1000, 8, True, [19.8]),
        (2, 1, False, [0.3, 24.0]),
        (1, 8, False, [24.0]),
        (1, 1, False, []),
    ],
)
def test_planned_time_does_not_grow_beyond_the_budgets(
    nodes: int, ranks_per_node: int, pairs_only: bool, seconds: list[float]
) -> None:
    planned = planned_check_seconds(nodes, ranks_per_node, pairs_only)
    assert list(planned.values()) == pytest.approx(seconds) and sum(planned.values()) <= 15 * 60
    assert len(COLLECTIVES) * 4 == 24


@pytest.mark.parametrize(
    ("nodes", "ranks_per_node", "pairs_only", "seconds"),
    [(1, 8, False, 0.0), (2, 8, False, 12.0), (8, 1, False, 18.3), (8, 8, False, 30.3), (8, 8, True, 18.3)],
)
def test_repetitions_add_a_bounded_time(nodes: int, ranks_per_node: int, pairs_only: bool, seconds: float) -> None:
    assert most_added_seconds(nodes, ranks_per_node, pairs_only) == pytest.approx(seconds)


@pytest.mark.parametrize("nodes", [3, 8, 66, 1000, 4096])
def test_quick_half_takes_less_than_a_minute_with_all_repetitions(nodes: int) -> None:
    planned_s = sum(planned_check_seconds(nodes, 8, pairs_only=True).values())
    assert planned_s + most_added_seconds(nodes, 8, pairs_only=True) <= 60


def test_variable_of_nccl_says_whether_nvls_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    network, gpu = NodeNetwork("InfiniBand", 8, 400.0), torch.device("cuda", 0)
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    assert measured_hardware(gpu, network) == FabricHardware("NVIDIA H200", network, has_multicast=True)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    assert measured_hardware(gpu, network) == FabricHardware("NVIDIA H200", network, has_multicast=False)
    assert measured_hardware(torch.device("cpu"), network) == FabricHardware()


def start_ranks(job: Path, nodes: int, ranks_per_node: int) -> list[subprocess.Popen[str]]:
    """Start the check on this machine as srun would on several nodes. The nodes are n0, n1, …"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(nodes * ranks_per_node), "LOCAL_WORLD_SIZE": str(ranks_per_node)}
    command = [sys.executable, "-m", "longhaul", "job", "run", "fabric", str(job)]
    processes = []
    for rank in range(nodes * ranks_per_node):
        node, local_rank = divmod(rank, ranks_per_node)
        own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "SLURMD_NODENAME": f"n{node}"}
        output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        environment = {**os.environ, **shared, **own}
        processes.append(subprocess.Popen(command, stdout=output, stderr=output, text=True, env=environment))
    return processes


def fabric_job(out: Path, **changes: Any) -> FabricSpec:
    """Return the spec of a complete check of three nodes without limits."""
    fields: dict[str, Any] = {"run": "r", "nodes": 3, "gpus_per_node": 1, "baseline": None, "pairs_only": False}
    fields |= {"limits": FabricLimits(), "node_limits": FabricLimits(), "bad_hardware": "refuse"}
    return FabricSpec(**{**fields, "folder": str(out.parent), "out": str(out), **changes})


@pytest.mark.parametrize(
    ("bad_hardware", "pairs_only", "refused", "accepted"),
    [
        ("refuse", False, ["n2", LINK], []),
        ("refuse", True, ["n2"], [LINK]),
        ("warn", False, [], ["n2", LINK]),
        ("warn", True, [], ["n2", LINK]),
    ],
)
def test_config_says_what_slow_nodes_and_links_do_but_wrong_values_are_problems(
    tmp_path: Path, bad_hardware: str, pairs_only: bool, refused: list[str], accepted: list[str]
) -> None:
    node = SlowNode(host="n2", rails=[0], bandwidth_gbps=1.0, usual_bandwidth_gbps=9.0)
    job = fabric_job(tmp_path / "fabric.json", pairs_only=pairs_only, bad_hardware=bad_hardware)
    tournament = Tournament([], [node], [f"{LINK} is slow"], ["n1 received wrong values"])
    report = _report(job, "gloo", ["n1", "n2", "n3"], [], InsideNodes(), 3, tournament)
    wrong, *problems = report.problems
    assert wrong == "n1 received wrong values"
    assert [line.split(" is slow")[0] for line in problems] == refused
    assert [line.split(" is slow")[0] for line in report.accepted] == accepted
    assert report.slow_nodes == [node]


@pytest.mark.parametrize(
    ("bad_hardware", "found", "goes_on"),
    [
        ("refuse", {}, True),
        ("refuse", {"slow_links": [LINK]}, False),
        ("warn", {"slow_links": [LINK]}, True),
        ("warn", {"slow_links": [LINK], "wrong_values": ["n1 received wrong values"]}, False),
    ],
)
def test_collectives_are_measured_unless_something_is_wrong_or_slow_and_not_accepted(
    tmp_path: Path, bad_hardware: str, found: dict[str, Any], goes_on: bool
) -> None:
    job = fabric_job(tmp_path / "fabric.json", bad_hardware=bad_hardware)
    assert _may_go_on(Tournament(**found), job) == goes_on


@pytest.mark.parametrize("pairs_only", [False, True])
@pytest.mark.parametrize("bad_hardware", ["refuse", "warn"])
def test_rate_below_the_baseline_is_a_warning_before_a_training_and_where_the_config_says_so(
    tmp_path: Path, bad_hardware: str, pairs_only: bool
) -> None:
    """Also if a node is slow: the check goes on then, and says what else is slow."""
    slow = SlowNode(host="n2", rails=[0], bandwidth_gbps=1.0, usual_bandwidth_gbps=9.0)
    usual = UsualRate(median=90.0, lowest=80.0, highest=99.0, count=3)
    baseline = SiteBaseline("", "r", "today", {}, {"pairs of nodes, gloo, 1 ranks per node": usual})
    job = fabric_job(tmp_path / "fabric.json", bad_hardware=bad_hardware, pairs_only=pairs_only, baseline=baseline)
    nodes = [slow] if bad_hardware == "warn" else []
    report = FabricReport([], "gloo", 3, ["n1", "n2", "n3"], [], {}, [pair(1, 1.0)], nodes)
    compared = _compared(report, job, FabricHardware())
    line = "pairs of nodes, gloo, 1 ranks per node: 1 GB/s, the site's baseline is 90 GB/s"
    is_accepted = pairs_only or bad_hardware == "warn"
    assert (compared.problems, compared.warnings) == (([], [line]) if is_accepted else ([line], []))


def test_accepted_slow_node_counts_as_fit() -> None:
    slow = SlowNode(host="m1", rails=[0], bandwidth_gbps=1.0, usual_bandwidth_gbps=9.0)
    tournament = Tournament([pair(1, 1.0), pair(2, 7.0)], [slow])
    assert [row["problem"] for row in node_results(tournament, accepts_slow=True)] == ["", "", ""]


def test_plan_gives_the_check_the_setting(tmp_path: Path) -> None:
    spec = job_spec(plan_of(tmp_path, {"checks.bad_hardware": "warn"}), JobId("fabric"))
    assert isinstance(spec, FabricSpec) and spec.bad_hardware == "warn"


def test_accepted_slow_node_is_not_raised_but_named_where_a_limit_is_missed(tmp_path: Path) -> None:
    node = SlowNode(host="n2", rails=[0], bandwidth_gbps=1.0, usual_bandwidth_gbps=9.0)
    job = fabric_job(tmp_path / "fabric.json", bad_hardware="warn")
    report = FabricReport([], "gloo", 3, ["n1", "n2", "n3"], [], {}, [], [node], accepted=["n2 is slow"])
    write_or_raise(job, report, {})
    assert FabricReport.read(Path(job.out)) == report
    missed = replace(report, problems=["all_reduce: 1 GB/s"])
    with pytest.raises(UserError, match=r"not fit for training:\n  - all_reduce: 1 GB/s") as raised:
        write_or_raise(job, missed, {})
    assert "the cause may be what the check accepted: n2 is slow" in raised.value.hint and not Path(job.out).exists()
    with pytest.raises(UserError, match="between n0, n1, n2, n3 and 6 others is not fit"):
        write_or_raise(job, replace(missed, hosts=[f"n{number}" for number in range(10)]), {})
    with pytest.raises(BadNodesError) as bad:
        write_or_raise(job, missed, {"n3": "all_reduce is slow"})
    assert bad.value.nodes == {"n3": "all_reduce is slow"}


def test_slow_node_is_raised_with_its_name_and_the_report_is_kept(tmp_path: Path) -> None:
    node = SlowNode(host="n2", rails=[0], bandwidth_gbps=1.0, usual_bandwidth_gbps=9.0)
    report = FabricReport(["n2 is slow"], "gloo", 3, ["n1", "n2", "n3"], [], {}, [], [node])
    with pytest.raises(BadNodesError, match="n2 is slow") as raised:
        write_or_raise(fabric_job(tmp_path / "fabric.json"), report, {})
    assert list(raised.value.nodes) == ["n2"] and raised.value.failure_class == "node"
    assert raised.value.nodes["n2"].startswith("slow with most other nodes: 1 GB/s")
    assert FabricReport.read(failed_path(tmp_path / "fabric.json")) == report
    healthy = FabricReport([], "gloo", 3, ["n1", "n2", "n3"], [], {})
    other = fabric_job(tmp_path / "other.json")
    write_or_raise(other, healthy, {})
    assert not failed_path(tmp_path / "other.json").exists()


def pair(number: int, rate: float) -> PairResult:
    return {"hosts": ["n1", f"m{number}"], "rail": 0, "bandwidth_gbps": rate, "latency_us": 9.0}


def test_report_keeps_the_slowest_pairs_of_a_large_network() -> None:
    pairs = [pair(number, float(30_000 - number)) for number in range(30_000)]
    assert slowest_pairs(pairs[:20_000]) == pairs[:20_000]
    assert slowest_pairs(pairs) == pairs[:9_999:-1]


def test_each_node_gets_the_median_of_its_pairs_and_the_reason_why_it_is_slow() -> None:
    slow = SlowNode(host="m1", rails=[0], bandwidth_gbps=1.0, usual_bandwidth_gbps=9.0)
    tournament = Tournament([pair(1, 1.0), pair(2, 7.0), pair(3, 9.0)], [slow])
    assert [(row["node"], row["bandwidth_gbps"], row["problem"]) for row in node_results(tournament)] == [
        ("n1", 7.0, ""),
        ("m1", 1.0, "slow: usual are 9 GB/s"),
        ("m2", 7.0, ""),
        ("m3", 9.0, ""),
    ]


def test_low_bandwidth_stops_the_run_and_keeps_the_measurements(tmp_path: Path) -> None:
    """Two nodes of two real processes each measure over gloo. No machine reaches 5,000 GB/s."""
    limits = FabricLimits(send_recv_gbps=5000, all_reduce_gbps=1e-6)
    node_limits = FabricLimits(broadcast_gbps=5000)
    out = tmp_path / "fabric.json"
    job = fabric_job(out, nodes=2, gpus_per_node=2, limits=limits, node_limits=node_limits)
    job.write(tmp_path / "job.json")
    first, *others = start_ranks(tmp_path / "job.json", 2, 2)
    stdout, stderr = first.communicate(timeout=300)
    planned = "about 48 s (pairs 0 s, collectives inside the nodes 24 s, collectives between all ranks 24 s)"
    planned += ", up to 12 s more if something is slow"
    assert f"fabric check of 2 nodes: {planned}" in stdout.splitlines()[0]
    assert first.returncode != 0 and [other.wait(timeout=60) for other in others] == [0, 0, 0]
    assert "is not fit for training" in stderr and "the site file's minimum is 5000 GB/s" in stderr
    assert not out.exists()
    report = FabricReport.read(failed_path(out))
    assert report.backend == "gloo" and report.world_size == 4 and report.hosts == ["n0", "n1"]
    assert report.warnings == [], "the catalogue is of NCCL"
    between, inside = (problem.partition(": bus")[0] for problem in report.problems)
    assert between == "send_recv" and inside in ("inside n0, n1: broadcast", "inside n1, n0: broadcast")
    (measured,) = report.pairs
    assert measured["hosts"] == ["n0", "n1"] and measured["bandwidth_gbps"] > 0 and measured["latency_us"] > 0
    rows = read_records(JobFolder(tmp_path).node_results, NodeResult)
    assert [(row["node"], row["check"], row["bandwidth_gbps"], row["problem"].partition(":")[0]) for row in rows] == [
        ("n0", "pair tournament", measured["bandwidth_gbps"], ""),
        ("n1", "pair tournament", measured["bandwidth_gbps"], ""),
        ("n0", "collectives inside the node", None, "broadcast"),
        ("n1", "collectives inside the node", None, "broadcast"),
    ]
    measured_sizes = Counter((found["scope"], found["collective"]) for found in report.results)
    assert set(measured_sizes) == {(scope, name) for scope in ("node", "all") for name in FACTORS}
    assert set(measured_sizes.values()) <= {3, 4}, "on a busy machine, the budget leaves out 16 MiB"
    for found in report.results:
        assert found.get("host") in (("n0", "n1") if found["scope"] == "node" else (None,))
        assert found["correct"] and found["world_size"] == (2 if found["scope"] == "node" else 4)
        spread = [found.get(name, 0.0) for name in ("min_us", "median_us", "p95_us", "p99_us", "max_us")]
        assert spread[0] > 0 and spread == sorted(spread)
        bandwidth = found["bytes"] / found["time_us"] / 1e3
        assert found["scope"] == "node" or found["algorithm_bandwidth_gbps"] == pytest.approx(
            bandwidth, rel=0.02, abs=1e-4
        )
        bus = found["algorithm_bandwidth_gbps"] * FACTORS[found["collective"]][found["world_size"]]
        assert found["bus_bandwidth_gbps"] == pytest.approx(bus, rel=1e-3, abs=2e-4)
