"""A network that is slow everywhere is found beside the baseline of the site, also between two nodes."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from longhaul.artifacts.fabric_report import FabricReport, SlowNode
from longhaul.artifacts.site_baseline import SiteBaseline
from longhaul.checks.compare_rates_with_limits import usual_of
from longhaul.checks.compare_with_published_rates import FabricHardware
from longhaul.checks.network_baseline import MOST_REPORTED_PAIRS, compare_network, network_rates

GPU = "NVIDIA H200"
HARDWARE = FabricHardware(GPU)
PAIRS = "pairs of nodes, nccl, 8 ranks per node"
ALL_REDUCE = "all_reduce between all ranks, nccl, 16 ranks, 1,073,741,824 bytes"
INSIDE = "all_reduce inside a node, nccl, 8 ranks, 1,073,741,824 bytes"
UNKNOWN = "bandwidth between all ranks: nothing to compare with"


def row(scope: str, size: int, rate: float) -> dict[str, Any]:
    return {
        "collective": "all_reduce",
        "scope": scope,
        "bytes": size,
        "world_size": 16 if scope == "all" else 8,
        "bus_bandwidth_gbps": rate,
    }


def report(pairs: float = 48.0, between: float = 360.0, inside: float = 450.0, nodes: int = 2) -> FabricReport:
    hosts = [f"n{number}" for number in range(1, nodes + 1)]
    results = [row("all", 8, 0.001), row("all", 2**30, between), row("node", 2**30, inside), row("node", 8, 0.001)]
    measured = [
        {"hosts": list(pair), "rail": 0, "bandwidth_gbps": pairs, "latency_us": 9.0} for pair in combinations(hosts, 2)
    ]
    return FabricReport([], "nccl", 8 * nodes, hosts, results, {}, measured)  # type: ignore[arg-type]


def baseline(gpu: str = GPU, **changes: float) -> SiteBaseline:
    """Return the baseline that a healthy run of two nodes gives."""
    return SiteBaseline(gpu, "good", "2026-11-29", {}, {
        rate.name: usual_of(rate.values) for rate in network_rates(report(**changes))})  # fmt: skip


def test_rates_are_all_pairs_and_each_collective_at_its_largest_size():
    found = {rate.name: (rate.scope, rate.values) for rate in network_rates(report(nodes=2))}
    assert found == {PAIRS: ("pairs", [48.0]), ALL_REDUCE: ("all", [360.0]), INSIDE: ("node", [450.0])}
    (pairs, *_) = network_rates(report(nodes=4))
    assert pairs.name == PAIRS and pairs.values == [48.0] * 6
    many = replace(report(), pairs=report().pairs * MOST_REPORTED_PAIRS)
    assert PAIRS not in {rate.name for rate in network_rates(many)}, "only the slowest ones are left"
    assert [rate.scope for rate in network_rates(report(nodes=1))] == ["all", "node"]


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({}, []),
        ({"pairs": 0.71 * 48, "between": 0.71 * 360, "inside": 0.71 * 450}, []),
        ({"pairs": 24.0}, [f"{PAIRS}: 24 GB/s, the site's baseline is 48 GB/s"]),
        ({"between": 180.0}, [f"{ALL_REDUCE}: 180 GB/s, the site's baseline is 360 GB/s"]),
        ({"inside": 225.0}, [f"{INSIDE}: 225 GB/s, the site's baseline is 450 GB/s"]),
    ],
)
def test_rate_far_below_the_baseline_is_a_problem(changes: dict[str, float], problems: list[str]):
    found = compare_network(report(**changes), baseline(), HARDWARE)
    assert found.problems == problems and found.not_compared == []
    slow: SlowNode = {"host": "n1", "rails": [0], "bandwidth_gbps": 1.0, "usual_bandwidth_gbps": 9.0}
    with_slow_node = replace(report(**changes), slow_nodes=[slow])
    assert compare_network(with_slow_node, baseline(), HARDWARE).problems == []
    accepted = compare_network(with_slow_node, baseline(), HARDWARE, accepts_slow=True)
    assert (accepted.problems, accepted.warnings) == ([], problems)


@pytest.mark.parametrize("known", [None, baseline("NVIDIA A100"), SiteBaseline(GPU, "old", "2026-11-28", {})])
def test_without_a_baseline_of_these_gpus_the_report_says_what_is_unknown(known: SiteBaseline | None):
    found = compare_network(report(pairs=1.0, between=1.0), known, HARDWARE)
    assert found.problems == [] and found.not_compared[0].startswith(UNKNOWN)
    assert found.not_compared[0].endswith("or store a healthy run: longhaul baseline")


def test_other_shapes_are_not_compared_and_a_rate_of_the_healthy_run_is_no_finding():
    other = {**{name: usual_of([900.0]) for name in ("all_reduce between all ranks, nccl, 32 ranks, 8 bytes",)},
             PAIRS: usual_of([48.0, 48.0, 20.0])}  # fmt: skip
    found = compare_network(report(pairs=21.0), SiteBaseline(GPU, "good", "2026-11-29", {}, other), HARDWARE)
    assert found.problems == [] and found.not_compared[0].startswith(UNKNOWN)
