"""Compares measured collectives with the limits of the site file, and says which bandwidths nothing was compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from longhaul.artifacts.fabric_report import CollectiveResult
from longhaul.config.site_config import FabricLimits
from longhaul.jobs.kinds.fabric_job import FEWEST_COMPARED_NODES

BANDWIDTH = "_gbps"
"""End of the names of limits of bandwidths."""
SCOPES = {"all": ("between all ranks", "limits"), "node": ("inside a node", "node_limits")}
"""Scope of a collective -> where it was measured, and the key of its limits below `interconnect`."""


def set_limits(limits: FabricLimits) -> dict[str, float]:
    """Return the limits that the site file states."""
    return {name: value for name, value in limits.model_dump().items() if value is not None}


def fabric_problems(results: Sequence[CollectiveResult], limits: Mapping[str, float]) -> list[str]:
    """Return wrong values, bandwidths below their minimum at the largest size, and a latency above its maximum."""
    found = [wrong_values_text(row) for row in results if not row["correct"]]
    for name in dict.fromkeys(row["collective"] for row in results):
        minimum = limits.get(f"{name}{BANDWIDTH}")
        row = max((row for row in results if row["collective"] == name), key=lambda row: row["bytes"])
        if minimum and row["bus_bandwidth_gbps"] < minimum:
            found.append(f"{bandwidth_text(row)}, the site file's minimum is {minimum:g} GB/s")
    maximum, latency = limits.get("all_reduce_latency_us"), latency_us(results)
    if maximum and latency and latency > maximum:
        found.append(latency_text(latency, maximum))
    return found


def wrong_values_text(row: CollectiveResult) -> str:
    return f"{row['collective']} of {row['bytes']:,} bytes gave wrong values"


def bandwidth_text(row: CollectiveResult) -> str:
    return (
        f"{row['collective']}: bus bandwidth {row['bus_bandwidth_gbps']:.3g} GB/s at {row['bytes'] / 2**20:.0f} MiB over "
        f"{row['world_size']} ranks"
    )


def latency_text(latency: float, maximum: float) -> str:
    return f"all_reduce: {latency:.0f} us for the smallest message, the site file's maximum is {maximum:g} us"


def latency_us(results: Sequence[CollectiveResult]) -> float | None:
    """Return the time of the smallest all_reduce in microseconds; None without measurements."""
    rows = [row for row in results if row["collective"] == "all_reduce"]
    return min(rows, key=lambda row: row["bytes"])["time_us"] if rows else None


def not_compared(
    hosts: Sequence[str],
    results: Sequence[CollectiveResult],
    limits: Mapping[str, float],
    node_limits: Mapping[str, float],
) -> list[str]:
    """Return one line for each scope of collectives whose bandwidth passes at any speed, with the remedy.

    limits, node_limits: those that the site file states. From FEWEST_COMPARED_NODES nodes on, nodes and pairs are compared with
        each other, but collectives between all ranks with nothing: a network that is slow everywhere passes.
    """
    limits_of = {"all": limits, "node": node_limits}
    more_nodes = f"set checks.nodes to at least {FEWEST_COMPARED_NODES}, "
    if len(hosts) >= FEWEST_COMPARED_NODES:
        del limits_of["node"]
        more_nodes = ""
    measured = {row["scope"] for row in results}
    return [
        f"bandwidth {SCOPES[scope][0]}: nothing to compare with; set interconnect.{SCOPES[scope][1]} in the site file, "
        f"{more_nodes}or store a healthy run: longhaul baseline"
        for scope, found in limits_of.items()
        if scope in measured and not any(name.endswith(BANDWIDTH) for name in found)
    ]
