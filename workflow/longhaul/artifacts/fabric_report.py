"""Fields of fabric.json: the measured speed of pairs of nodes and of collectives, slow nodes and slow links."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NotRequired

from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import CheckReport
from longhaul.artifacts.nccl_tests_report import NcclTestsResult


class CollectiveResult(TypedDict):
    """The measured speed of one collective at one size, on the slowest rank. Bandwidths are in GB/s.

    scope:     all: between all ranks; node: between the ranks of each node, and of the slowest node
    host:      the slowest node; only where the scope is node
    time_us:   mean of rounds in a row, from which the bandwidths follow
    median_us: of rounds that were timed one by one, as are the percentiles p95_us and p99_us, and min_us and max_us;
               earlier releases have no p99_us, min_us and max_us
    """

    collective: str
    scope: str
    bytes: int
    world_size: int
    rounds: int
    time_us: float
    median_us: float
    p95_us: float
    p99_us: NotRequired[float]
    min_us: NotRequired[float]
    max_us: NotRequired[float]
    algorithm_bandwidth_gbps: float
    bus_bandwidth_gbps: float
    correct: bool
    host: NotRequired[str]


class PairResult(TypedDict):
    """The exchange between two nodes on their slowest rail: GB/s in each direction, and the time of an exchange of 8 bytes.

    resent: share of the TCP segments that the worse of the two nodes sent again
    """

    hosts: list[str]
    rail: int
    bandwidth_gbps: float
    latency_us: float
    resent: NotRequired[float]


class SlowNode(TypedDict):
    """A node that is slow with most other nodes, or that loses packets with them.

    rails:                on which it is slow
    bandwidth_gbps:       median of its pairs on its slowest rail
    usual_bandwidth_gbps: that of a typical node on this rail
    resent:               median over its pairs of the share of TCP segments that were sent again
    """

    host: str
    rails: list[int]
    bandwidth_gbps: float
    usual_bandwidth_gbps: float
    resent: NotRequired[float]


@dataclass(frozen=True)
class FabricReport(CheckReport):
    """`results/<run>/fabric.json`: measured speed of pairs of nodes, and of collectives.

    hosts:        the name of each node
    results:      empty before a training, and where the pairs had slow parts that are not accepted, or wrong values
    pairs:        empty for a single node; of more than 200 nodes, the slowest 20,000
    not_compared: one line per measurement that passes at any speed, with the remedy
    accepted:     one line per slow node or link that checks.bad_hardware accepts, and per slow link before a training
    warnings:     one line per link with new errors after the collectives, per rate below the baseline that is no problem, and per
                  collective that is slower than published figures of such hardware, with the remedy
    grown_errors: node -> error counter of its ports and interfaces -> growth during the pair tournament, of those that grew
    nccl_tests:   rows of nccl-tests' programs, where the site names them
    """

    schema_version: ClassVar[int] = 2

    backend: str
    world_size: int
    hosts: list[str]
    results: list[CollectiveResult]
    limits: dict[str, float]
    pairs: list[PairResult] = field(default_factory=list)
    slow_nodes: list[SlowNode] = field(default_factory=list)
    node_limits: dict[str, float] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)
    grown_errors: dict[str, dict[str, int]] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    nccl_tests: list[NcclTestsResult] = field(default_factory=list)

    def own_bandwidths(self) -> dict[tuple[str, int], float]:
        """Return collective and size -> bus bandwidth that the check itself measured between all ranks, in GB/s."""
        rows = (row for row in self.results if row["scope"] == "all")
        return {(row["collective"], row["bytes"]): row["bus_bandwidth_gbps"] for row in rows}
