"""Fields of fabric.json: the measured speed of pairs of nodes and of collectives, slow nodes and slow links."""

from __future__ import annotations

from dataclasses import dataclass, field

from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import CheckReport


class CollectiveResult(TypedDict):
    """The measured speed of one collective at one size. Bandwidths are in GB/s."""

    collective: str
    bytes: int
    world_size: int
    rounds: int
    time_us: float
    algorithm_bandwidth_gbps: float
    bus_bandwidth_gbps: float
    correct: bool


class PairResult(TypedDict):
    """The exchange between two nodes on their slowest rail: GB/s in each direction, and the time of an exchange of 8 bytes."""

    hosts: list[str]
    rail: int
    bandwidth_gbps: float
    latency_us: float


class SlowNode(TypedDict):
    """A node that is slow with most other nodes.

    rails:                on which it is slow
    bandwidth_gbps:       median of its pairs on its slowest rail
    usual_bandwidth_gbps: that of a typical node on this rail
    """

    host: str
    rails: list[int]
    bandwidth_gbps: float
    usual_bandwidth_gbps: float


@dataclass(frozen=True)
class FabricReport(CheckReport):
    """`results/<run>/fabric.json`: measured speed of pairs of nodes, and of collectives.

    hosts:      the name of each node
    results:    empty where a node is slow, because it makes every collective slow
    pairs:      empty for a single node, and in files of earlier releases
    """

    backend: str
    world_size: int
    hosts: list[str]
    results: list[CollectiveResult]
    limits: dict[str, float]
    pairs: list[PairResult] = field(default_factory=list)
    slow_nodes: list[SlowNode] = field(default_factory=list)
