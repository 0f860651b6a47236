"""Chooses MASTER_ADDR: the first node's name, a suffix, or the address of a network interface."""

from __future__ import annotations

import socket

import psutil

from longhaul.errors import UserError


def master_address(first_node: str, suffix: str | None, interface: str | None) -> str:
    """Return the first node's name, its name with a suffix, or the IPv4 address of one of its network interfaces.

    The supervisor calls this; it runs on the first node.

    Raises:
        UserError: the node has no such interface, or the interface has no IPv4 address.
    """
    if interface:
        return _ipv4_address(first_node, interface)
    name, dot, domain = first_node.partition(".")
    return f"{name}{suffix or ''}{dot}{domain}"


def _ipv4_address(node: str, interface: str) -> str:
    interfaces = psutil.net_if_addrs()
    addresses = [entry.address for entry in interfaces.get(interface, ()) if entry.family == socket.AF_INET]
    if not addresses:
        reason = "has no IPv4 address" if interface in interfaces else "does not exist"
        raise UserError(
            f"interconnect.master_address.interface: {interface} {reason} on {node}",
            f"name one of {', '.join(sorted(interfaces))} in the site file",
        )
    return addresses[0]
