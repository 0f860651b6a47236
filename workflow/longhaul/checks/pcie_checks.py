"""Compares PCIe links of adapters, disks and GPUs without NVML with those of the other nodes and with their own maximum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from longhaul.artifacts.node_check_row import CheckRow, Result
from longhaul.checks.build_check_rows import Component
from longhaul.checks.hardware_facts import HardwareFacts
from longhaul.checks.pcie_links import PcieLink

_RESEAT = "let the admins reseat the card, and look for PCIe errors in the kernel log"


def pcie_rows(hardware: Mapping[str, HardwareFacts]) -> Iterator[CheckRow]:
    """Yield one row per link. hardware: node -> its facts.

    A link of a GPU or an RDMA adapter that is better on another node fails. If it is below its maximum on all nodes, the nodes
    may be built like that: some adapters divide 16 lanes between two sockets.
    """
    links = {node: [link for link in facts.pcie_links if _is_judged(link, facts)] for node, facts in hardware.items()}
    best: dict[str, PcieLink] = {}
    for link in (link for found in links.values() for link in found):
        best[link.address] = max(best.get(link.address, link), link, key=_rate)
    for node, found in links.items():
        rdma = {port.pci_address for port in hardware[node].ports}
        for link in found:
            is_vital = link.kind == "GPU" or link.address in rdma
            yield _row(Component(node, f"{link.kind} {link.address}"), link, best[link.address], is_vital)


def _is_judged(link: PcieLink, facts: HardwareFacts) -> bool:
    return link.kind != "GPU" or not facts.gpus.gpus


def _rate(link: PcieLink) -> tuple[int, float]:
    """Return what is compared: the width, and the speed of devices that do not lower it when they are idle, as GPUs do."""
    return link.width, 0.0 if link.kind == "GPU" else link.speed


def _row(component: Component, link: PcieLink, best: PcieLink, is_vital: bool) -> CheckRow:
    maximum = link.max_width, 0.0 if link.kind == "GPU" else link.max_speed
    result: Result = "ok"
    expected = f"{link.max_speed:g} GT/s x{link.max_width}"
    if _rate(link) < _rate(best):
        result = "fail" if is_vital else "warn"
        expected = f"{best.speed:g} GT/s x{best.width}, as on another node"
    elif _rate(link) < maximum:
        result = "warn"
    return component.row("PCIe link", f"{link.speed:g} GT/s x{link.width}", expected, result, _RESEAT)
