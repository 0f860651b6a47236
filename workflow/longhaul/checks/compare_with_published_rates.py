"""Compares collectives with what healthy hardware of this kind reaches by published figures; a slow one is a warning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from longhaul.artifacts.fabric_report import CollectiveResult, FabricReport
from longhaul.checks.fabric_limits import BANDWIDTH, SCOPES, bandwidth_text
from longhaul.checks.network_ports_for_nccl import NodeNetwork
from longhaul.config.interconnect_datasheets import (
    NODE,
    PORT,
    RANK,
    RATE_OF,
    Figure,
    GpuLinks,
    gpu_links,
    network_share,
)

SLOW_SHARE, SLOW_SHARE_OF_DERIVED = 0.8, 0.6
"""Shares of a published and of a derived figure below which a collective is slow."""
_MIB = 2**20
REACHED_SHARES = {64 * _MIB: 1.0, 8 * _MIB: 1 / 2, _MIB // 2: 1 / 16}
"""Bytes per rank -> share of its figure that a healthy network reaches with messages of this size or more. Between 32 ranks, 229
of 382 GB/s at 256 MiB, and 64 at 16 MiB (github.com/stas00/ml-engineering, network/README.md); between 256 ranks, 200 of about
370 GB/s at 2 GiB (github.com/NVIDIA/nccl/issues/1218). Larger messages over a very slow network do not fit into the check's time.
"""


@dataclass(frozen=True)
class FabricHardware:
    """Hardware on which a fabric check ran.

    gpu:           name of the GPUs; "" without GPUs
    network:       of the slowest node; None if it is not known
    has_multicast: NCCL may use NVLink multicast (NVLS)
    """

    gpu: str = ""
    network: NodeNetwork | None = None
    has_multicast: bool = True


@dataclass(frozen=True)
class ComparedRow:
    """A row with the figure for it, in GB/s. hardware: what the figure is of"""

    row: CollectiveResult
    figure: Figure
    hardware: str
    needs_multicast: bool = False

    @property
    def is_slow(self) -> bool:
        return self.row["bus_bandwidth_gbps"] < _reached_share(self.row) * _least(self.figure)

    @property
    def text(self) -> str:
        """Return what was measured and expected, with the source and the remedy."""
        where, key = SCOPES[self.row["scope"]]
        kind = "derived from" if self.figure.is_derived else "source:"
        with_multicast = ", with NVLink multicast (NVLS)" if self.needs_multicast else ""
        off = "if the site has no NVLS, set interconnect.nvlink_multicast: off; " if self.needs_multicast else ""
        return (
            f"{where}, {bandwidth_text(self.row)}; expected {self.figure.value:.3g} GB/s of healthy {self.hardware}"
            f"{with_multicast} ({kind} {self.figure.source}); {off}if this rate is usual at the site, set interconnect.{key} in "
            "the site file, or store the run: longhaul baseline"
        )


def compare_with_catalogue(
    report: FabricReport, rows: Iterable[CollectiveResult], hardware: FabricHardware
) -> list[ComparedRow]:
    """Return the rows that the catalogue has a figure for, and the site file no limit. gloo runs have none.

    rows: one per collective and scope
    """
    if report.backend != "nccl":
        return []
    limits = {"all": report.limits, "node": report.node_limits}
    ranks_per_node = report.world_size // len(report.hosts)
    found = (
        _compared(row, len(report.hosts), ranks_per_node, hardware)
        for row in rows
        if not _has_limit(row, limits) and _reached_share(row)
    )
    return [compared for compared in found if compared]


def slow_lines(compared: Iterable[ComparedRow]) -> Iterator[str]:
    """Yield a line per row that is slow."""
    return (one.text for one in compared if one.is_slow)


def _has_limit(row: CollectiveResult, limits: Mapping[str, Mapping[str, float]]) -> bool:
    return f"{row['collective']}{BANDWIDTH}" in limits[row["scope"]]


def _reached_share(row: CollectiveResult) -> float:
    """Return the share of the figure that is reached at this size; 0.0 for messages that are too small to be compared."""
    per_rank = row["bytes"] / row["world_size"]
    return next((share for size, share in REACHED_SHARES.items() if per_rank >= size), 0.0)


def _compared(row: CollectiveResult, nodes: int, ranks_per_node: int, hardware: FabricHardware) -> ComparedRow | None:
    links = gpu_links(hardware.gpu)
    if not links:
        return None
    if row["scope"] == "all" and nodes > 1:
        return _between_nodes(row, ranks_per_node, hardware, links)
    figure = links.figure(row["collective"], ranks_per_node, hardware.has_multicast)
    return ComparedRow(row, figure, _gpu_text(hardware, links), figure is links.nvls) if figure else None


def _between_nodes(
    row: CollectiveResult, ranks_per_node: int, hardware: FabricHardware, links: GpuLinks
) -> ComparedRow | None:
    """Compare with the network, or with the links inside a node if they are slower: a ring of all ranks passes both."""
    network, name = hardware.network, row["collective"]
    share = network_share(network.name, name) if network else None
    if not network or not share:
        return None
    rates = {NODE: network.gb_per_s, RANK: network.gb_per_s / ranks_per_node, PORT: network.port_gb_per_s}
    between = Figure(share.value * rates[RATE_OF[name]], share.source, share.is_derived)
    inside = links.figure(name, ranks_per_node, has_multicast=False)
    figure = _slower(between, inside) if inside else between
    return ComparedRow(row, figure, f"{_gpu_text(hardware, links)} over {network}")


def _slower(one: Figure, other: Figure) -> Figure:
    """Return the smaller figure. It is derived from both if the larger one is derived, and may be the smaller one in truth.

    It is not where both are from one source: a node carries what was measured between nodes.
    """
    smaller, larger = sorted((one, other), key=lambda figure: figure.value)
    if _least(larger) >= _least(smaller) or larger.source == smaller.source:
        return smaller
    return Figure(smaller.value, f"{smaller.source}; {larger.source}", is_derived=True)


def _least(figure: Figure) -> float:
    """Return the rate in GB/s below which a collective is slow."""
    return figure.value * (SLOW_SHARE_OF_DERIVED if figure.is_derived else SLOW_SHARE)


def _gpu_text(hardware: FabricHardware, links: GpuLinks) -> str:
    return f"{hardware.gpu} ({links.links})"
