"""Fields of nccl_tests.json: what the programs of nccl-tests measured between all ranks, and what went wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field

from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import CheckReport


class NcclTestsTiming(TypedDict):
    """One half of a row: with separate buffers, or in place. Bandwidths are in GB/s.

    wrong: number of wrong values; None where the program does not check them (N/A)
    """

    time_us: float
    algorithm_bandwidth_gbps: float
    bus_bandwidth_gbps: float
    wrong: float | None


class NcclTestsResult(TypedDict):
    """A row of a program's table. in_place: None where the program has no such column."""

    collective: str
    bytes: int
    world_size: int
    out_of_place: NcclTestsTiming
    in_place: NcclTestsTiming | None


@dataclass(frozen=True)
class NcclTestsReport(CheckReport):
    """`jobs/fabric/nccl_tests.json`: the rows of all programs.

    warnings: one line per program whose larger sizes did not fit into its time
    """

    results: list[NcclTestsResult] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
