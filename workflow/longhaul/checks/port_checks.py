"""Compares RDMA ports and network interfaces with those of the same name on the other nodes: state, rate and errors."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from longhaul.artifacts.node_check_row import CheckRow, Result
from longhaul.checks.build_check_rows import Component
from longhaul.checks.infiniband_ports import PortFacts
from longhaul.checks.network_interfaces import InterfaceFacts

_CABLE = "let the admins check cable, transceiver and switch port (ibstat, mlxlink; on Slingshot cxi_stat)"
_OTHER_RATE = (
    f"{_CABLE}; if this card or its switch is built for a lower rate, set node_minimums.port_gbit_per_s "
    "of the site file to it"
)
_ADAPTERS = {
    "MT4115": ("ConnectX-4", 100.0),
    "MT4119": ("ConnectX-5", 100.0),
    "MT4121": ("ConnectX-5 Ex", 100.0),
    "MT4123": ("ConnectX-6", 200.0),
    "MT4129": ("ConnectX-7", 400.0),
    "MT4131": ("ConnectX-8", 800.0),
    "MT41682": ("BlueField", 100.0),
    "MT41692": ("BlueField-3", 400.0),
    "17db:0501": ("Cassini (Slingshot 11)", 200.0),
    "1590:0371": ("Cassini 2 (Slingshot 400)", 400.0),
}
"""Model -> name, and highest rate of a port in Gbit/s. A model is hca_type, MT and the PCI device ID in decimal digits, or
the IDs of vendor and device. Cards of a model may be slower, such as those of ConnectX-7 and BlueField-3 with two ports. Models
whose usual cards are slower are left out, as the warning would be wrong more often than right: ConnectX-4 Lx, 6 Dx and 6 Lx, and
BlueField-2.

NVIDIA's: IDs by Linux (mlx5_core_pci_table in drivers/net/ethernet/mellanox/mlx5/core/main.c); rates by the user manuals
(docs.nvidia.com/networking), for BlueField by the table of uplink speeds in its "Linux Kernel Upstream Release Notes v5.17", for
BlueField-3 (NDR) by the one in "DOCA Release Notes" (docs.nvidia.com/doca). Slingshot's: IDs
by HPE's driver (github.com/HewlettPackard/shs-cxi-driver), rates by HPE's manual of "200Gbps NIC" and "400Gbps NIC"
(github.com/HewlettPackard/shs-docs) and LLNL's glossary ("the HPE 200G Slingshot NIC", flux-framework.readthedocs.io). Slingshot
10 has ConnectX-5 (glennklockwood.com/garden/slingshot, and "Slingshot-10 (100Gbps) NICs" in GASNet's notes on HPE Cray EX)."""

Port = PortFacts | InterfaceFacts
Ports = Mapping[str, Sequence[Port]]
"""Node -> its ports, or its interfaces."""


def port_rows(ports: Ports, min_rate: float | None) -> Iterator[CheckRow]:
    """Yield the rows of all ports that are in use: a port that is down on most nodes is not.

    min_rate: Gbit/s, from the site file; None: the usual rate of the port, and the highest one of the adapter's model
    """
    usual = _usual_rates(ports)
    for node, found in ports.items():
        own = {port.name: port for port in found}
        for name in usual:
            if name in own:
                yield from _rows_of_port(Component(node, name), own[name], min_rate, usual[name])
            else:
                yield _state_row(Component(node, name), "missing")


def _usual_rates(ports: Ports) -> dict[str, float | None]:
    """Return name of a port -> its median rate in Gbit/s, of the ports that are active on half of the nodes or more."""
    active: dict[str, list[Port]] = {}
    for port in (port for found in ports.values() for port in found if port.is_active):
        active.setdefault(port.name, []).append(port)
    used = {name: found for name, found in active.items() if 2 * len(found) >= len(ports)}
    rates = {name: [port.rate_gbit_per_s for port in found if port.rate_gbit_per_s] for name, found in used.items()}
    return {name: statistics.median(known) if known else None for name, known in rates.items()}


def _rows_of_port(component: Component, port: Port, min_rate: float | None, usual: float | None) -> Iterator[CheckRow]:
    yield _state_row(component, port.state or "unknown")
    if port.is_active:
        yield _rate_row(component, port, min_rate, usual)
    errors = ", ".join(f"{name} {count}" for name, count in port.errors.items()) or "0"
    yield component.row("port errors", errors, "0", "warn" if port.errors else "ok", f"if they grow: {_CABLE}")


def _state_row(component: Component, state: str) -> CheckRow:
    result: Result = "ok" if state == "ACTIVE" else "fail"
    return component.row("port state", state, "ACTIVE, as on the other nodes", result, _CABLE)


def _rate_row(component: Component, port: Port, min_rate: float | None, usual: float | None) -> CheckRow:
    rate, expected = port.rate_gbit_per_s, min_rate or usual
    if rate is None or expected is None:
        reason = port.unavailable.get("rate_gbit_per_s", "no port states a rate")
        return component.unknown("port rate", reason, "a rate")
    name, highest = _ADAPTERS.get(port.adapter, ("", 0.0))
    if not min_rate and expected <= rate < highest:
        text = f"{highest:g} Gbit/s, the highest rate of a {name}"
        return component.row("port rate", f"{rate:g} Gbit/s", text, "warn", _OTHER_RATE)
    origin = "node_minimums of the site file" if min_rate else "as on the other nodes"
    result: Result = "fail" if rate < expected else "ok"
    return component.row("port rate", f"{rate:g} Gbit/s", f"{expected:g} Gbit/s, {origin}", result, _CABLE)
