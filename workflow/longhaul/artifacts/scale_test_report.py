"""Schema of scale_test/<nodes>.json: the speed of a stage's first steps on this number of nodes, and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from longhaul.artifacts.artifact_schemas import CheckReport


@dataclass(frozen=True)
class ScaleTestReport(CheckReport):
    """`results/<run>/scale_test/<nodes>.json`: the speed of a stage's first steps on this number of nodes. Shares are of 1.

    steps:                 number of measured steps
    step_time_s:           median
    step_time_spread:      config.acceptance_limits.step_time_spread; None for a few steps
    tokens_per_s_per_rank: median; padding does not count, and waiting for data does
    efficiency:            tokens_per_s_per_rank by that on `smallest_nodes` nodes; None on the fewest nodes
    gpu_utilisation, gpu_memory_share, communication_efficiency: None without GPUs
    limits:                keys of the config's scale_test -> value
    """

    stage: str
    nodes: int
    gpus_per_node: int
    steps: int
    step_time_s: float
    step_time_spread: float | None
    tokens_per_s_per_rank: float
    efficiency: float | None
    smallest_nodes: int | None
    gpu_utilisation: float | None
    gpu_memory_share: float | None
    hosts: list[str]
    limits: dict[str, float]
    communication_efficiency: float | None = None
