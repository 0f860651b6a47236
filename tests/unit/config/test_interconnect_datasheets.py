"""Each GPU has the figures of its own links, and the table of the documentation is that of the catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from longhaul.checks.collective_benchmarks import COLLECTIVES
from longhaul.config.interconnect_datasheets import GPU_LINKS, NETWORKS, RATE_OF, Figure, gpu_links, network_share

CHECKS_PAGE = Path(__file__).parents[3] / "docs" / "reference" / "checks.md"


@pytest.mark.parametrize(
    ("gpu", "collective", "ranks", "has_multicast", "value", "is_derived"),
    [
        ("NVIDIA H100 80GB HBM3", "all_reduce", 8, True, 480, False),
        ("NVIDIA H100 80GB HBM3", "all_reduce", 8, False, 367.2, False),
        ("NVIDIA H100 80GB HBM3", "all_gather", 8, True, 361.4, False),
        ("NVIDIA H100 80GB HBM3", "send_recv", 8, True, 370, True),
        ("NVIDIA H200", "all_reduce", 4, True, 367.2, True),
        ("NVIDIA GH200 120GB", "all_reduce", 4, True, 367.2, True),
        ("NVIDIA B200", "all_reduce", 8, True, 838, False),
        ("NVIDIA GB200", "all_reduce", 4, True, 682.2, True),
        ("NVIDIA A100-SXM4-80GB", "all_reduce", 8, True, 234.9, False),
        ("AMD Instinct MI300X", "all_reduce", 8, True, 312.9, False),
        ("AMD Instinct MI250X", "all_gather", 8, True, 90.8, True),
    ],
)
def test_figure_is_that_of_gpu_collective_and_algorithm(
    gpu: str, collective: str, ranks: int, has_multicast: bool, value: float, is_derived: bool
):
    links = gpu_links(gpu)
    figure = links.figure(collective, ranks, has_multicast) if links else None
    assert figure and (figure.value, figure.is_derived) == (value, is_derived)


@pytest.mark.parametrize(
    "gpu",
    [
        "Tesla V100-SXM2-32GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA H100 PCIe",
        "NVIDIA H200 NVL",
        "AMD Instinct MI300A",
        "",
    ],
)
def test_gpus_without_published_figures_are_unknown(gpu: str):
    assert gpu_links(gpu) is None


@pytest.mark.parametrize(
    ("gpu", "collective", "ranks"),
    [
        ("NVIDIA H200", "all_reduce", 2),  # of a server with direct links, two GPUs have a third of their links
        ("NVIDIA H200", "send_recv", 4),
        ("NVIDIA H200", "all_reduce", 16),
        ("AMD Instinct MI300X", "all_reduce", 4),
        ("AMD Instinct MI300X", "all_to_all", 8),
    ],
)
def test_shapes_that_nobody_measured_have_no_figure(gpu: str, collective: str, ranks: int):
    links = gpu_links(gpu)
    assert links and links.figure(collective, ranks, has_multicast=True) is None


def test_all_collectives_are_those_of_the_fabric_check():
    names = {collective.name for collective in COLLECTIVES}
    assert set(RATE_OF) == names
    assert {name for links in GPU_LINKS for name in links.figures} | {
        n for net in NETWORKS for n in net.shares
    } <= names
    assert network_share("InfiniBand", "all_reduce") and network_share("Ethernet", "all_reduce") is None


def table_rows() -> Iterator[str]:
    """Yield the rows of both tables in docs/reference/checks.md. A star marks what is derived."""
    for links in GPU_LINKS:
        known = {name: _cell(links.figures.get(name), "") for name in RATE_OF}
        if links.nvls:
            known["all_reduce"] += f"; {links.nvls.value:g} with NVLS"
        name = links.name.replace("|", ", ").replace("(?! NVL)", "")
        figures = [links.nvls, *links.figures.values()] if links.nvls else [*links.figures.values()]
        yield f"| {name} | {links.links} | {links.ranks} | {' | '.join(known.values())} | {_sources(figures)} |"
    for network in NETWORKS:
        shares = [_cell(network.shares.get(name), " %") for name in RATE_OF]
        yield f"| {network.name} | {' | '.join(shares)} | {_sources([*network.shares.values()])} |"


def _sources(figures: list[Figure]) -> str:
    return "; ".join(dict.fromkeys(figure.source for figure in figures))


def _cell(figure: Figure | None, unit: str) -> str:
    if not figure:
        return ""
    value = 100 * figure.value if unit else figure.value
    return f"{value:.4g}{unit}{'*' if figure.is_derived else ''}"


def test_documentation_shows_the_catalogue():
    page, rows = CHECKS_PAGE.read_text(encoding="utf-8").splitlines(), list(table_rows())
    missing = [row for row in rows if row not in page]
    assert not missing, "docs/reference/checks.md needs these rows:\n" + "\n".join(missing)
