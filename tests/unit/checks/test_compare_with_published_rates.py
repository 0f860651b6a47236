"""Healthy hardware gives no warning, degraded hardware one with measured and expected rate, source and remedy."""

from __future__ import annotations

from typing import Any

import pytest

from longhaul.artifacts.fabric_report import FabricReport
from longhaul.artifacts.site_baseline import SiteBaseline
from longhaul.checks.compare_rates_with_limits import usual_of
from longhaul.checks.compare_with_published_rates import FabricHardware
from longhaul.checks.network_baseline import compare_network, network_rates
from longhaul.checks.network_ports_for_nccl import NodeNetwork

H100, MI250X = "NVIDIA H100 80GB HBM3", "AMD Instinct MI250X"
NDR = NodeNetwork("InfiniBand", 8, 400.0)
SLINGSHOT = NodeNetwork("Slingshot", 4, 200.0)
GIB = 2**30


def row(collective: str, rate: float, scope: str = "all", ranks: int = 8, size: int = 8 * GIB) -> dict[str, Any]:
    return {
        "collective": collective,
        "scope": scope,
        "bytes": size,
        "world_size": ranks,
        "bus_bandwidth_gbps": rate,
    }


def compared(rows: list[Any], hardware: FabricHardware, nodes: int = 1, backend: str = "nccl", ranks_per_node: int = 8,
             limits: dict[str, float] | None = None, baseline: SiteBaseline | None = None) -> FabricReport:  # fmt: skip
    hosts = [f"n{number}" for number in range(nodes)]
    report = FabricReport([], backend, nodes * ranks_per_node, hosts, rows, limits or {})
    return compare_network(report, baseline, hardware)


@pytest.mark.parametrize(
    ("has_multicast", "rates", "slow"),
    [
        (True, {"all_reduce": 476, "all_gather": 361, "reduce_scatter": 363, "send_recv": 340}, []),
        (True, {"all_reduce": 211, "all_gather": 361}, ["all_reduce"]),
        (True, {"all_reduce": 367, "all_gather": 361}, ["all_reduce"]),  # NVLS is not in use
        (False, {"all_reduce": 367, "all_gather": 361}, []),
        (False, {"all_reduce": 290, "all_gather": 280, "broadcast": 200}, ["all_reduce", "all_gather", "broadcast"]),
    ],
)
def test_nvlink_of_h100_with_and_without_nvls(has_multicast: bool, rates: dict[str, float], slow: list[str]):
    found = compared([row(*one) for one in rates.items()], FabricHardware(H100, None, has_multicast))
    assert [line.split(", ")[1].partition(":")[0] for line in found.warnings] == slow
    assert found.problems == [] and found.not_compared == []


def test_warning_names_all_that_is_needed():
    (line,) = compared([row("all_reduce", 211)], FabricHardware(H100)).warnings
    assert line == (
        "between all ranks, all_reduce: bus bandwidth 211 GB/s at 8192 MiB over 8 ranks; expected 480 GB/s of healthy "
        "NVIDIA H100 80GB HBM3 (NVLink 4), with NVLink multicast (NVLS) (source: github.com/NVIDIA/nccl-tests/issues/212); "
        "if the site has no NVLS, set interconnect.nvlink_multicast: off; if this rate is usual at the site, set "
        "interconnect.limits in the site file, or store the run: longhaul baseline"
    )
    (line,) = compared([row("broadcast", 100, "node")], FabricHardware(H100, NDR), nodes=2).warnings
    assert line.startswith("inside a node, broadcast: ") and "(derived from " in line and "NVLS" not in line
    assert "interconnect.node_limits" in line


@pytest.mark.parametrize(
    ("rates", "slow"),
    [
        ({"all_reduce": 470, "all_gather": 340, "reduce_scatter": 345, "all_to_all": 46, "send_recv": 47}, []),
        ({"all_reduce": 290}, ["all_reduce"]),  # of 366
        ({"all_reduce": 216, "all_gather": 101, "all_to_all": 25}, ["all_reduce", "all_gather", "all_to_all"]),
    ],
)
def test_eight_ports_of_400_gbit(rates: dict[str, float], slow: list[str]):
    found = compared([row(*one, ranks=16) for one in rates.items()], FabricHardware(H100, NDR), nodes=2)
    assert [line.split(", ")[1].partition(":")[0] for line in found.warnings] == slow
    assert all(
        "of healthy NVIDIA H100 80GB HBM3 (NVLink 4) over 8 x 400 Gbit/s InfiniBand (" in line
        for line in found.warnings
    )


@pytest.mark.parametrize(
    ("all_reduce", "all_gather", "slow"),
    [(91.0, 90.0, []), (60.0, 90.0, ["all_reduce"]), (5.4, 60.0, ["all_reduce", "all_gather"])],
)
def test_mi250x_over_slingshot(all_reduce: float, all_gather: float, slow: list[str]):
    rows = [
        row("all_reduce", all_reduce, ranks=16),
        row("all_gather", all_gather, ranks=16),
        row("all_to_all", 0.1, ranks=16),
    ]
    found = compared(rows, FabricHardware(MI250X, SLINGSHOT), nodes=2)
    assert [line.split(", ")[1].partition(":")[0] for line in found.warnings] == slow, (
        "nothing is published of all_to_all"
    )
    inside = compared([row("all_reduce", 40.0, "node")], FabricHardware(MI250X, SLINGSHOT), nodes=2)
    assert len(inside.warnings) == 1 and "AMD Instinct MI250X (Infinity Fabric, direct)" in inside.warnings[0]


def test_roce_of_100_gbit_and_one_gpu_per_node():
    one = NodeNetwork("RoCE", 1, 100.0)
    healthy, slow = (
        compared([row("all_reduce", rate, ranks=2, size=GIB)], FabricHardware(H100, one), 2, ranks_per_node=1)
        for rate in (11.0, 6.0)
    )
    assert (
        healthy.warnings == []
        and "expected 10.3 GB/s of healthy NVIDIA H100 80GB HBM3 (NVLink 4) over 1 x 100 Gbit/s RoCE"
        in slow.warnings[0]
    )


def test_links_inside_the_nodes_bound_what_the_network_can_reach():
    fast = NodeNetwork("InfiniBand", 8, 800.0)
    found = compared([row("all_reduce", 367, ranks=16)], FabricHardware(H100, fast), nodes=2)
    assert found.warnings == [] and found.not_compared == []


def test_published_share_below_a_derived_rate_inside_the_nodes_counts_as_derived():
    """Four of eight H100 per node: 367 GB/s inside are derived, and 366 over the network are published."""
    four = [row("all_reduce", rate, ranks=8) for rate in (230.0, 215.0)]
    ports = NodeNetwork("InfiniBand", 8, 400.0)
    healthy, slow = (compared([one], FabricHardware(H100, ports), 2, ranks_per_node=4) for one in four)
    assert healthy.warnings == [] and "expected 366 GB/s" in slow.warnings[0]
    assert "(derived from github.com/NVIDIA/nccl-tests/issues/309; github.com/stas00/ml-engineering" in slow.warnings[0]


def test_published_share_far_below_a_derived_rate_inside_the_nodes_stays_a_published_one():
    (line,) = compared([row("all_to_all", 38.0, ranks=16)], FabricHardware(H100, NDR), nodes=2).warnings
    assert "expected 48 GB/s" in line and "(source: github.com/NVIDIA/nccl-tests/issues/267)" in line


@pytest.mark.parametrize(
    ("hardware", "backend"),
    [
        (FabricHardware("Tesla V100-SXM2-32GB", NDR), "nccl"),
        (FabricHardware(H100, None), "nccl"),
        (FabricHardware("NVIDIA A100 80GB PCIe", NDR), "nccl"),
        (FabricHardware(H100, NDR), "gloo"),
    ],
)
def test_unknown_hardware_and_gloo_are_not_compared(hardware: FabricHardware, backend: str):
    found = compared([row("all_reduce", 1.0, ranks=16)], hardware, nodes=2, backend=backend)
    assert found.warnings == [] and found.not_compared[0].startswith(
        "bandwidth between all ranks: nothing to compare with"
    )


@pytest.mark.parametrize(
    ("size", "rate", "is_slow", "is_compared"),
    [
        (8 * GIB, 290.0, True, True),
        (GIB // 4, 290.0, False, True),  # 16 MiB per rank
        (GIB // 4, 140.0, True, True),
        (GIB // 64, 64.0, False, True),  # 1 MiB per rank
        (GIB // 64, 1.0, True, True),  # so slow that the check has no time for larger messages
        (2**20, 0.1, False, False),  # the time is latency
    ],
)
def test_smaller_messages_may_be_slower(size: int, rate: float, is_slow: bool, is_compared: bool):
    found = compared([row("all_reduce", rate, ranks=16, size=size)], FabricHardware(H100, NDR), nodes=2)
    assert bool(found.warnings) == is_slow and bool(found.not_compared) != is_compared


def test_limits_of_the_site_come_before_the_baseline_and_that_before_the_catalogue():
    rows, hardware = [row("all_reduce", 211.0), row("all_gather", 211.0)], FabricHardware(H100)
    assert len(compared(rows, hardware).warnings) == 2
    (line,) = compared(rows, hardware, limits={"all_reduce_gbps": 200.0}).warnings
    assert "all_gather" in line
    usual = {rate.name: usual_of(rate.values) for rate in network_rates(compared(rows[:1], hardware))}
    (line,) = compared(rows, hardware, baseline=SiteBaseline(H100, "r", "2026-11-29", {}, usual)).warnings
    assert "all_gather" in line
