"""Measures the collectives between the ranks of each node, all nodes at once; names the nodes that are slow beside the others
or below the limits of the site file.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from longhaul.artifacts.fabric_report import CollectiveResult
from longhaul.artifacts.node_results import NodeResult, new_node_result
from longhaul.checks.fabric_limits import BANDWIDTH, bandwidth_text, latency_text, wrong_values_text
from longhaul.checks.hung_steps import COLLECTIVES_OF_RANKS
from longhaul.checks.repetition_pauses import REPETITION_PAUSES_S
from longhaul.checks.run_parts_in_child import announce
from longhaul.jobs.kinds.fabric_job import FEWEST_COMPARED_NODES

if TYPE_CHECKING:
    from longhaul.checks.collective_benchmarks import MeasuredGroup

_NAMED_HOSTS = 4
_LATENCY = "all_reduce_latency_us"

NodeRows = dict[str, list[CollectiveResult]]
"""Host -> the rows of its ranks."""


@dataclass(frozen=True)
class SlowCollective:
    """A collective of one node that is too slow or wrong.

    text:     what was measured; limit: what it was compared with
    is_wrong: the values are wrong, so the time does not matter
    is_relative: it is slow beside the other nodes, and above the site file's limits
    """

    host: str
    collective: str
    bytes: int
    text: str
    limit: str
    is_wrong: bool = False
    is_relative: bool = False


@dataclass(frozen=True)
class InsideNodes:
    """Measurements inside the nodes; on rank 0 alone.

    rows:     of each collective and size the row of the slowest node
    findings: of each collective and limit the worst one first
    accepted: findings that the config accepts, in the same order
    """

    hosts: list[str] = field(default_factory=list)
    rows: list[CollectiveResult] = field(default_factory=list)
    findings: list[SlowCollective] = field(default_factory=list)
    accepted: list[SlowCollective] = field(default_factory=list)

    def accepting_relative(self) -> InsideNodes:
        """Return these measurements with nodes accepted that are slow beside the others alone."""
        accepted = [found for found in self.findings if found.is_relative]
        refused = [found for found in self.findings if not found.is_relative]
        return replace(self, findings=refused, accepted=accepted)

    @property
    def bad_nodes(self) -> dict[str, str]:
        """Return each node with findings -> the first, if other nodes have none: a fault of all nodes is one of the site."""
        first = self._first_findings()
        return {host: first[host] for host in self.hosts if host in first} if len(first) < len(self.hosts) else {}

    def problems(self) -> list[str]:
        """Return one line per collective and limit, with the values of the worst node."""
        return _lines(self.findings)

    def accepted_lines(self) -> list[str]:
        """Return the same of what is accepted."""
        return _lines(self.accepted)

    def node_results(self) -> list[NodeResult]:
        """Return a result for each node."""
        first = self._first_findings()
        return [new_node_result(host, "collectives inside the node", None, first.get(host, "")) for host in self.hosts]

    def _first_findings(self) -> dict[str, str]:
        return {found.host: f"{found.text}{found.limit}" for found in reversed(self.findings)}


def _lines(findings: Iterable[SlowCollective]) -> list[str]:
    groups: dict[tuple[str, str], list[SlowCollective]] = {}
    for found in findings:
        groups.setdefault((found.collective, found.limit.partition(" is ")[0]), []).append(found)
    return [
        f"inside {hosts_text([one.host for one in found])}: {found[0].text}{found[0].limit}"
        for found in groups.values()
    ]


def measure_inside_nodes(
    hosts: Sequence[str],
    group: MeasuredGroup,
    measure_all: Iterable[CollectiveResult],
    limits: Mapping[str, float],
    slow_share: float,
) -> InsideNodes:
    """Measure on all ranks, and again what is suspicious on some node. Of several measurements the best one counts.

    group:       the ranks of this rank's node
    measure_all: yields the rows of this rank's node
    limits:      those of the site file for collectives inside a node
    slow_share:  a bandwidth below this share of the median of the nodes is slow
    """
    from longhaul.checks.collective_benchmarks import COLLECTIVES, measure

    by_name = {collective.name: collective for collective in COLLECTIVES}
    rows = _on_rank_0(hosts, group.size, list(measure_all))
    for pause_s in REPETITION_PAUSES_S:
        suspects = _value_of_rank_0(_slow_sizes(findings_of(rows, limits, slow_share)))
        if not suspects:
            break
        time.sleep(pause_s)
        repeated = [measure(by_name[name], group, size_bytes) for name, size_bytes in suspects]
        rows = with_better(rows, _on_rank_0(hosts, group.size, repeated))
    return InsideNodes(list(rows), slowest_of_nodes(rows), findings_of(rows, limits, slow_share))


def findings_of(rows: NodeRows, limits: Mapping[str, float], slow_share: float) -> list[SlowCollective]:
    """Return wrong values, and at the largest size that all nodes measured, bandwidths below a limit or the median.

    The median counts from FEWEST_COMPARED_NODES nodes on. Of each collective, the slowest node comes first.
    """
    found = [
        SlowCollective(host, row["collective"], row["bytes"], wrong_values_text(row), "", is_wrong=True)
        for host, own in rows.items()
        for row in own
        if not row["correct"]
    ]
    by_collective: dict[str, dict[int, dict[str, CollectiveResult]]] = {}
    for size in _complete(rows):
        row = next(iter(size.values()))
        by_collective.setdefault(row["collective"], {})[row["bytes"]] = size
    for name, sizes in by_collective.items():
        found += _slow(sizes[max(sizes)], limits.get(f"{name}{BANDWIDTH}"), slow_share)
        if name == "all_reduce" and _LATENCY in limits:
            found += _late(sizes[min(sizes)], limits[_LATENCY])
    return found


def _slow(rows: Mapping[str, CollectiveResult], minimum: float | None, slow_share: float) -> Iterator[SlowCollective]:
    """Yield the nodes that are slow in one collective at one size, the slowest one first."""
    usual = statistics.median(row["bus_bandwidth_gbps"] for row in rows.values())
    is_compared = len(rows) >= FEWEST_COMPARED_NODES
    for host, row in sorted(rows.items(), key=lambda item: item[1]["bus_bandwidth_gbps"]):
        rate = row["bus_bandwidth_gbps"]
        if minimum and rate < minimum:
            limit, is_relative = f", the site file's minimum is {minimum:g} GB/s", False
        elif is_compared and rate < slow_share * usual:
            limit, is_relative = f", the median of the nodes is {usual:.3g} GB/s", True
        else:
            continue
        text = bandwidth_text(row)
        yield SlowCollective(host, row["collective"], row["bytes"], text, limit, is_relative=is_relative)


def _late(rows: Mapping[str, CollectiveResult], maximum: float) -> Iterator[SlowCollective]:
    for host, row in sorted(rows.items(), key=lambda item: -item[1]["time_us"]):
        if row["time_us"] > maximum:
            yield SlowCollective(host, row["collective"], row["bytes"], latency_text(row["time_us"], maximum), "")


def slowest_of_nodes(rows: NodeRows) -> list[CollectiveResult]:
    """Return of each collective and size the row of the slowest node, with its name. Sizes that a node left out are left out."""
    return [
        {
            **min(size.values(), key=lambda row: row["bus_bandwidth_gbps"]),
            "correct": all(r["correct"] for r in size.values()),
        }
        for size in _complete(rows)
    ]


def with_better(rows: NodeRows, repeated: NodeRows) -> NodeRows:
    """Return the rows with the faster one of two measurements; wrong values stay wrong."""
    found = {}
    for host, own in rows.items():
        again = {(row["collective"], row["bytes"]): row for row in repeated[host]}
        found[host] = [_better(row, again.get((row["collective"], row["bytes"]), row)) for row in own]
    return found


def _better(one: CollectiveResult, other: CollectiveResult) -> CollectiveResult:
    fast = max(one, other, key=lambda row: row["bus_bandwidth_gbps"])
    return {**fast, "correct": one["correct"] and other["correct"]}


def _complete(rows: NodeRows) -> list[dict[str, CollectiveResult]]:
    """Return for each collective and size that all nodes measured: host -> row."""
    found: dict[tuple[str, int], dict[str, CollectiveResult]] = {}
    for host, own in rows.items():
        for row in own:
            found.setdefault((row["collective"], row["bytes"]), {})[host] = row
    return [size for size in found.values() if len(size) == len(rows)]


def _slow_sizes(findings: Iterable[SlowCollective]) -> list[tuple[str, int]]:
    """Return the collectives and sizes to measure again. Wrong values need no second measurement."""
    return list(dict.fromkeys((found.collective, found.bytes) for found in findings if not found.is_wrong))


def hosts_text(hosts: Sequence[str]) -> str:
    """Return the first names and the number of the others, so that a message about a thousand nodes has room for more."""
    more = len(hosts) - _NAMED_HOSTS
    return ", ".join(hosts) if more <= 0 else f"{', '.join(hosts[:_NAMED_HOSTS])} and {more} others"


def _on_rank_0(hosts: Sequence[str], ranks_per_node: int, own: list[CollectiveResult]) -> NodeRows:
    """Return on rank 0 the rows of each node, by its first rank: all ranks of a node have the same; {} on other ranks."""
    import torch.distributed as dist

    announce("results of the collectives inside the nodes", subject=COLLECTIVES_OF_RANKS)  # another node may be late
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, gathered)
    if gathered is None:
        return {}
    return {
        host: [row | {"host": host} for row in found]
        for host, found in zip(hosts, gathered[::ranks_per_node], strict=True)
    }


def _value_of_rank_0(value: Any) -> Any:
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
