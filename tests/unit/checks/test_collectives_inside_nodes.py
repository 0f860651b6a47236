"""A node whose own links are slow is named beside the other nodes, and a busy moment costs no node."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from longhaul.artifacts.fabric_report import CollectiveResult
from longhaul.checks import collectives_inside_nodes
from longhaul.checks.collectives_inside_nodes import (
    InsideNodes,
    NodeRows,
    findings_of,
    slowest_of_nodes,
    with_better,
)

MIB = 2**20
NCCL = 0.7


def row(host: str, collective: str, size: int, rate: float, **changes: Any) -> CollectiveResult:
    found: dict[str, Any] = {"collective": collective, "scope": "node", "bytes": size, "world_size": 8, "rounds": 9,
                             "time_us": 20.0, "median_us": 1.0, "p95_us": 1.0, "algorithm_bandwidth_gbps": rate,
                             "bus_bandwidth_gbps": rate, "correct": True, "host": host}  # fmt: skip
    return {**found, **changes}  # type: ignore[return-value]


def nodes(*rates: float, **changes: Any) -> NodeRows:
    """Return the rows of nodes n1, n2, … with these rates of all_reduce at 64 MiB; `changes` of the last one's row."""
    hosts = [f"n{number}" for number in range(1, len(rates) + 1)]
    found = {
        host: [row(host, "all_reduce", 8, 0.1), row(host, "all_reduce", 64 * MIB, rate), row(host, "broadcast", 8, 0.1)]
        for host, rate in zip(hosts, rates, strict=True)
    }
    found[hosts[-1]][1] = {**found[hosts[-1]][1], **changes}  # type: ignore[typeddict-item]
    return found


def inside(rows: NodeRows, limits: dict[str, float], share: float = NCCL) -> InsideNodes:
    return InsideNodes(list(rows), slowest_of_nodes(rows), findings_of(rows, limits, share))


@pytest.mark.parametrize(
    ("rates", "limits", "bad", "problems"),
    [
        ((400.0, 410.0, 390.0), {}, [], []),
        ((400.0, 410.0, 280.0), {}, [], []),
        ((400.0, 410.0, 279.0), {}, ["n3"], [
            "inside n3: all_reduce: bus bandwidth 279 GB/s at 64 MiB over 8 ranks, the median of the nodes is 400 GB/s"]),
        ((400.0, 100.0, 400.0, 200.0, 400.0), {}, ["n2", "n4"], [
            "inside n2, n4: all_reduce: bus bandwidth 100 GB/s at 64 MiB over 8 ranks, the median of the nodes is 400 GB/s"]),
        ((400.0, 100.0), {}, [], []),
        ((400.0, 100.0), {"all_reduce_gbps": 300.0}, ["n2"], [
            "inside n2: all_reduce: bus bandwidth 100 GB/s at 64 MiB over 8 ranks, the site file's minimum is 300 GB/s"]),
        ((200.0, 210.0, 190.0), {"all_reduce_gbps": 300.0}, [], [
            "inside n3, n1, n2: all_reduce: bus bandwidth 190 GB/s at 64 MiB over 8 ranks, the site file's minimum is 300 GB/s"]),
        ((90.0,) * 6, {"all_reduce_gbps": 300.0}, [], [
            "inside n1, n2, n3, n4 and 2 others: all_reduce: bus bandwidth 90 GB/s at 64 MiB over 8 ranks, the site file's "
            "minimum is 300 GB/s"]),
    ],
)  # fmt: skip
def test_slow_node_is_named_and_a_fault_of_all_nodes_excludes_none(
    rates: tuple[float, ...], limits: dict[str, float], bad: list[str], problems: list[str]
):
    found = inside(nodes(*rates), limits)
    assert (list(found.bad_nodes), found.problems()) == (bad, problems)
    assert {result["node"]: bool(result["problem"]) for result in found.node_results()} == {
        host: host in {finding.host for finding in found.findings} for host in found.hosts
    }


def test_wrong_values_and_a_late_message_are_named_with_their_node():
    wrong = inside(nodes(400.0, 400.0, 400.0, correct=False), {})
    assert list(wrong.bad_nodes) == ["n3"] and wrong.problems() == [
        "inside n3: all_reduce of 67,108,864 bytes gave wrong values"
    ]
    late = nodes(400.0, 400.0)
    late["n2"][0] = row("n2", "all_reduce", 8, 0.1, time_us=90.0)
    found = inside(late, {"all_reduce_latency_us": 50.0})
    assert list(found.bad_nodes) == ["n2"] and found.problems() == [
        "inside n2: all_reduce: 90 us for the smallest message, the site file's maximum is 50 us"
    ]


def test_node_that_is_slow_beside_the_others_can_be_accepted_but_not_one_below_a_limit():
    found = inside(nodes(400.0, 400.0, 100.0), {}).accepting_relative()
    assert (found.bad_nodes, found.problems()) == ({}, []) and {row["problem"] for row in found.node_results()} == {""}
    assert found.accepted_lines() == inside(nodes(400.0, 400.0, 100.0), {}).problems() != []
    limited = inside(nodes(400.0, 400.0, 100.0), {"all_reduce_gbps": 300.0})
    assert limited.accepting_relative() == limited
    assert limited.bad_nodes["n3"].endswith("the site file's minimum is 300 GB/s")
    wrong = inside(nodes(400.0, 400.0, 400.0, correct=False), {})
    assert wrong.accepting_relative() == wrong


def test_over_gloo_a_node_may_be_slower():
    assert inside(nodes(10.0, 10.0, 4.0), {}, share=0.3).bad_nodes == {}
    assert list(inside(nodes(10.0, 10.0, 2.9), {}, share=0.3).bad_nodes) == ["n3"]


def test_report_keeps_the_slowest_node_of_each_size_that_all_nodes_measured():
    found = nodes(400.0, 100.0, 300.0)
    found["n1"].append(row("n1", "broadcast", 64 * MIB, 300.0))
    assert [(one["collective"], one["bytes"], one.get("host")) for one in slowest_of_nodes(found)] == [
        ("all_reduce", 8, "n1"),
        ("all_reduce", 64 * MIB, "n2"),
        ("broadcast", 8, "n1"),
    ]


def test_faster_one_of_two_measurements_counts_and_wrong_values_stay_wrong():
    first = nodes(400.0, 400.0, 100.0)
    again: NodeRows = {host: [row(host, "all_reduce", 64 * MIB, 390.0)] for host in first}
    assert inside(with_better(first, again), {}).findings == []
    assert with_better(first, again)["n1"][1]["bus_bandwidth_gbps"] == 400.0
    first["n3"][1]["correct"] = False
    assert with_better(first, again)["n3"][1] == row("n3", "all_reduce", 64 * MIB, 390.0, correct=False)


def test_rank_that_waits_for_other_nodes_blames_no_collective_of_its_own(monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    monkeypatch.setattr(collectives_inside_nodes, "announce", lambda text, subject: steps.append(text))
    monkeypatch.setattr(dist, "get_rank", lambda: 9)
    monkeypatch.setattr(dist, "gather_object", lambda own, gathered: steps.append("waits"))
    assert collectives_inside_nodes._on_rank_0(["n1", "n2"], 8, []) == {}
    assert steps == ["results of the collectives inside the nodes", "waits"]
