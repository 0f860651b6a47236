"""Limits of the fabric check apply to the largest and the smallest size; a measurement without a limit is named."""

from __future__ import annotations

from typing import Any

import pytest

from longhaul.checks.fabric_limits import fabric_problems, latency_us, not_compared


def row(collective: str, size: int, bus: float, time_us: float = 10.0, correct: bool = True) -> dict[str, Any]:
    return {
        "collective": collective,
        "bytes": size,
        "bus_bandwidth_gbps": bus,
        "time_us": time_us,
        "scope": "all",
        "world_size": 16,
        "correct": correct,
    }


ROWS = [row("all_reduce", 8, 0.001, 60.0), row("all_reduce", 2**24, 20.0), row("all_gather", 2**24, 11.0)]


@pytest.mark.parametrize(
    ("limits", "messages"),
    [
        ({}, []),
        ({"all_reduce_gbps": 20.0, "all_gather_gbps": 11.0, "all_reduce_latency_us": 60.0}, []),
        (
            {"all_reduce_gbps": 20.5},
            ["all_reduce: bus bandwidth 20 GB/s at 16 MiB over 16 ranks, the site file's minimum is 20.5"],
        ),
        ({"all_gather_gbps": 12.0}, ["all_gather: bus bandwidth 11 GB/s"]),
        (
            {"all_reduce_latency_us": 50.0},
            ["all_reduce: 60 us for the smallest message, the site file's maximum is 50 us"],
        ),
    ],
)
def test_limits_apply_to_the_largest_and_the_smallest_size(limits: dict[str, float], messages: list[str]) -> None:
    found = fabric_problems(ROWS, limits)
    assert len(found) == len(messages)
    assert all(message in line for message, line in zip(messages, found, strict=True))


def test_wrong_values_are_named_without_limits() -> None:
    found = fabric_problems([row("send_recv", 65536, 99.0, correct=False)], {})
    assert found == ["send_recv of 65,536 bytes gave wrong values"]


def test_single_process_has_no_measurements_and_no_problems() -> None:
    limits = {"all_reduce_gbps": 1.0, "all_reduce_latency_us": 1.0}
    assert latency_us([]) is None and fabric_problems([], limits) == []


ALL_LINE = (
    "bandwidth between all ranks: nothing to compare with; set interconnect.limits in the site file, set checks.nodes to at "
    "least 3, or store a healthy run: longhaul baseline"
)
NODE_LINE = (
    "bandwidth inside a node: nothing to compare with; set interconnect.node_limits in the site file, set checks.nodes to at "
    "least 3, or store a healthy run: longhaul baseline"
)


@pytest.mark.parametrize(
    ("hosts", "limits", "node_limits", "lines"),
    [
        (2, {}, {}, [ALL_LINE, NODE_LINE]),
        (2, {"all_reduce_latency_us": 50.0}, {"all_reduce_gbps": 300.0}, [ALL_LINE]),
        (2, {"all_gather_gbps": 12.0}, {}, [NODE_LINE]),
        (2, {"all_gather_gbps": 12.0}, {"all_reduce_gbps": 300.0}, []),
        (3, {}, {}, [ALL_LINE.replace("set checks.nodes to at least 3, ", "")]),
        (3, {"all_gather_gbps": 12.0}, {}, []),
    ],
)
def test_bandwidth_that_passes_at_any_speed_is_unknown(
    hosts: int, limits: dict[str, float], node_limits: dict[str, float], lines: list[str]
) -> None:
    rows: Any = [*ROWS, {**ROWS[0], "scope": "node"}]
    names = [f"n{number}" for number in range(hosts)]
    assert not_compared(names, rows, limits, node_limits) == lines
    assert not_compared(names, rows[:-1], limits, node_limits) == [line for line in lines if line != NODE_LINE]
    assert not_compared(names, [], limits, node_limits) == [], "a single rank measures nothing"
