"""Bus bandwidths that healthy hardware reaches, as published: collectives inside a node by GPU, and between nodes by network.

One share of the peak for all collectives would be wrong: on eight H200, all_reduce with NVLS reaches 107 % of NVLink's rate,
and all_gather 80 %. Sizes and formulas are those of nccl-tests. docs/reference/checks.md shows these tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Figure:
    """Bandwidth of a healthy machine with large messages.

    value:      GB/s inside a node; between nodes, a share of the line rate
    source:     who published it
    is_derived: follows from a published figure of other ranks, GPUs or collectives over the same links
    """

    value: float
    source: str
    is_derived: bool = False

    def derived(self) -> Figure:
        return Figure(self.value, self.source, is_derived=True)


@dataclass(frozen=True)
class GpuLinks:
    """The links between the GPUs of a node.

    name:      pattern of the name that nvidia-smi, amd-smi or rocm-smi prints
    links:     for people
    ranks:     number of GPUs that the figures were measured between
    figures:   collective -> GB/s
    nvls:      all_reduce with NVLink multicast between as many GPUs
    any_ranks: from FEWEST_RANKS GPUs on, each has its full rate whatever their number
    """

    name: str
    links: str
    ranks: int
    figures: Mapping[str, Figure]
    nvls: Figure | None = None
    any_ranks: bool = False

    def figure(self, collective: str, ranks: int, has_multicast: bool) -> Figure | None:
        """Return what a collective between this number of GPUs reaches; None where nothing is known."""
        found = self.figures.get(collective)
        if ranks == self.ranks:
            return self.nvls if self.nvls and has_multicast and collective == "all_reduce" else found
        # With direct links in place of a switch, one pair of GPUs has a third of a GPU's links.
        if not self.any_ranks or not FEWEST_RANKS <= ranks < self.ranks or collective == "send_recv":
            return None
        return found.derived() if found else None


@dataclass(frozen=True)
class NetworkLinks:
    """The network between nodes. shares: collective -> share of the line rate that RATE_OF names."""

    name: str
    shares: Mapping[str, Figure] = field(default_factory=dict)


FEWEST_RANKS = 4
"""Servers of four GPUs may connect them directly: between all four, each uses all of its links, as with a switch."""
NODE, RANK, PORT = "the node's ports", "the node's ports, divided by its ranks", "one port"
RATE_OF = {
    "all_reduce": NODE,
    "all_gather": NODE,
    "reduce_scatter": NODE,
    "broadcast": NODE,
    # NVIDIA: alltoall cannot aggregate adapters (nccl-tests/issues/267). Of two nodes, half of the traffic stays inside a
    # node, and up to twice the rate is healthy (nccl-tests/issues/130).
    "all_to_all": RANK,
    "send_recv": PORT,  # in a ring of ranks, one of a node sends to the next node
}
"""Collective -> the line rate that its share is of."""

_NCCL_TESTS = "github.com/NVIDIA/nccl-tests/issues"
_BEKMAN = "github.com/stas00/ml-engineering, network/README.md"
_AMD_XGMI = "rocm.blogs.amd.com, mi300x-rccl-xgmi: usable rate of a link"
_AMD_CVS = "github.com/ROCm/cvs, rccl_config.json: 8 GiB, two nodes"
_LUMI = "github.com/Lumi-supercomputer/lumi-reframe-tests"
_LUMI_REDUCE = f"{_LUMI}, rccl_test.py: two nodes"
_LUMI_GATHER = f"{_LUMI}, torch_comm_coll.py: two nodes"  # 775 Gbit/s of data x 15/16, of 800 Gbit/s


def _all(names: str, figure: Figure) -> dict[str, Figure]:
    return dict.fromkeys(names.split(), figure)


# NVIDIA (nccl-tests/issues/212): 450 GB/s are the line rate of NVLink 4, and all but all_reduce with NVLS show 370 GB/s.
_OF_NVLINK_4 = Figure(370, f"{_NCCL_TESTS}/212", is_derived=True)
_NVLINK_4 = {
    "all_reduce": Figure(367.2, _BEKMAN),
    "all_gather": Figure(361.4, _BEKMAN),
    "reduce_scatter": Figure(362.9, _BEKMAN),
    **_all("all_to_all broadcast send_recv", _OF_NVLINK_4),
}
_OTHERS = "all_gather reduce_scatter all_to_all broadcast send_recv"

# The first match counts.
GPU_LINKS = (
    # Four GPUs, each pair with 6 of NVLink 4's 18 links. The figures are those of H200 over as many links.
    GpuLinks(
        r"GH200",
        "NVLink 4, direct",
        4,
        {name: _NVLINK_4[name].derived() for name in ("all_reduce", "all_gather", "reduce_scatter")},
    ),
    # Azure's health checks demand 460 GB/s of all_reduce with NVLS on H100, and 431 on H200.
    GpuLinks(
        r"H100 80GB HBM3|H200(?! NVL)",
        "NVLink 4",
        8,
        _NVLINK_4,
        nvls=Figure(480, f"{_NCCL_TESTS}/212"),
        any_ranks=True,
    ),
    GpuLinks(
        r"B200",
        "NVLink 5",
        8,
        {"all_reduce": Figure(682.2, _BEKMAN), **_all(_OTHERS, Figure(682.2, _BEKMAN, is_derived=True))},
        nvls=Figure(838.0, _BEKMAN),
        any_ranks=True,
    ),
    # Azure's health check demands 228 GB/s.
    GpuLinks(
        r"A100-SXM",
        "NVLink 3",
        8,
        {"all_reduce": Figure(234.9, _BEKMAN), **_all(_OTHERS, Figure(234.9, _BEKMAN, is_derived=True))},
        any_ranks=True,
    ),
    # A node carries at least what two nodes reach. Azure's health check demands 314 GB/s of all_reduce.
    GpuLinks(
        r"MI300X",
        "Infinity Fabric, direct",
        8,
        {
            "all_reduce": Figure(312.9, _BEKMAN),
            "all_gather": Figure(330, _AMD_CVS, is_derived=True),
            "reduce_scatter": Figure(340, _AMD_CVS, is_derived=True),
            "send_recv": Figure(48, _AMD_XGMI),
        },
    ),
    # Eight dies. A node carries at least what two nodes reach.
    GpuLinks(
        r"MI250X",
        "Infinity Fabric, direct",
        8,
        {
            "all_reduce": Figure(85, _LUMI_REDUCE, is_derived=True),
            **_all("all_gather reduce_scatter", Figure(90.8, _LUMI_GATHER, is_derived=True)),
        },
    ),
)
# Rings of all_gather, reduce_scatter and broadcast load the network as those of all_reduce do (nccl-tests, PERFORMANCE.md).
# 365.8 of 400 GB/s between four nodes; /290: 46 to 48 GB/s of 50 for a port; /119: 24 of 25, 12 of 12.5.
_INFINIBAND_RING = Figure(0.914, f"{_NCCL_TESTS}/309")
NETWORKS = (
    NetworkLinks(
        "InfiniBand",
        {
            "all_reduce": _INFINIBAND_RING,
            **_all("all_gather reduce_scatter broadcast send_recv", _INFINIBAND_RING.derived()),
            "all_to_all": Figure(0.96, f"{_NCCL_TESTS}/267"),
        },
    ),
    NetworkLinks(
        "RoCE",  # 8 x 400 Gbit/s
        {
            "all_reduce": Figure(0.825, _AMD_CVS),
            "all_gather": Figure(0.825, _AMD_CVS),
            "reduce_scatter": Figure(0.85, _AMD_CVS),
            "broadcast": Figure(0.775, _AMD_CVS),
            "all_to_all": Figure(0.9, _AMD_CVS),
            "send_recv": Figure(0.94, _AMD_CVS),
        },
    ),
    # CSCS (cscs-reframe-tests, pytorch_allreduce.py) expects 91 of 100 GB/s of all_reduce between eight nodes.
    NetworkLinks(
        "Slingshot",  # 4 x 200 Gbit/s
        {
            "all_reduce": Figure(0.85, _LUMI_REDUCE),
            "all_gather": Figure(0.9, _LUMI_GATHER),
            "reduce_scatter": Figure(0.9, _LUMI_GATHER, is_derived=True),
        },
    ),
)


def gpu_links(gpu_name: str) -> GpuLinks | None:
    """Return the links between GPUs of this name; None for GPUs that are not listed."""
    return next((links for links in GPU_LINKS if re.search(links.name, gpu_name, re.IGNORECASE)), None)


def network_share(network: str, collective: str) -> Figure | None:
    """Return the share of the line rate that a collective reaches; None where nothing is known."""
    return next((links.shares.get(collective) for links in NETWORKS if links.name == network), None)
