"""Tells network interfaces of InfiniBand and Slingshot from those of ordinary Ethernet by their names, for a new site file."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAME = re.compile(r"ib\w*\d|hsn\d+")
"""ib0, or ibp65s0, ibs1 and so on where systemd names by slot (systemd.net-naming-scheme); hsn0. A dot marks a VLAN or child."""


def fast_interfaces(names: Iterable[str]) -> list[str]:
    """Return the InfiniBand and Slingshot interfaces of a machine; compute nodes usually have the same names."""
    return sorted(name for name in names if _NAME.fullmatch(name))
