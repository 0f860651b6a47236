"""Chooses MASTER_ADDR: the first node's name, a suffix, or the address of a network interface."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress

import psutil

from longhaul.errors import UserError
from longhaul.scheduling import slurm_client


def master_address(first_node: str, suffix: str | None, interface: str | None) -> str:
    """Return the first node's name, its name with a suffix, or the IPv4 address of one of its network interfaces.

    The supervisor calls this; it runs on the first node. /etc/hosts of Debian and Ubuntu maps a host's own name to 127.0.1.1. A
    server that listens there is reached by no other host. Then the address is that by which the node reaches slurmctld.

    Raises:
        UserError: the node has no such interface, or the interface has no IPv4 address.
    """
    if interface:
        return _ipv4_address(first_node, interface)
    name, dot, domain = first_node.partition(".")
    name = f"{name}{suffix or ''}{dot}{domain}"
    return (_address_towards_slurmctld() or name) if _is_loopback_here(name) else name


def _is_loopback_here(name: str) -> bool:
    with suppress(OSError, UnicodeError):  # the rendezvous says that a name is unknown
        return ipaddress.ip_address(socket.gethostbyname(name)).is_loopback
    return False


def _address_towards_slurmctld() -> str | None:
    """Return the private address of this node's interface to slurmctld's host.

    None: slurmctld runs on this node, Slurm does not answer, or the address is public: servers do not listen there.
    """
    for host in slurm_client.controller_hosts():
        with suppress(OSError, UnicodeError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 1))  # sends nothing: the kernel chooses the interface
            address = ipaddress.ip_address(probe.getsockname()[0])
            if not (address.is_loopback or address.is_global):
                return str(address)
    return None


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
