"""Faults of one host that the environment check must find: clock, version of torch, local disk, /dev/shm.

A host of the test cluster has its own mounts. It has no clock and no disk of its own, so tests/support/injected/sitecustomize.py
changes what its processes see of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import files
from pathlib import Path

from tests.support.virtual_hosts import VirtualHosts

Fault = Callable[[VirtualHosts], AbstractContextManager[None]]
"""A context manager in which the fault exists."""


def injected_variables(hosts: VirtualHosts) -> dict[str, str]:
    """Return the environment variables that name the files of injected faults."""
    return {fault: str(hosts.folder / fault) for fault in ("WRONG_CLOCK", "SLOW_DISK")}


def scratch_folder(hosts: VirtualHosts) -> Path:
    """Return the folder that stands for the local disk of each host."""
    return hosts.folder / "scratch"


def injected(fault: str, host: str) -> Fault:
    """Return a fault of injected_variables."""

    @contextmanager
    def inject(hosts: VirtualHosts) -> Iterator[None]:
        path = Path(injected_variables(hosts)[fault])
        path.write_text(host)
        try:
            yield
        finally:
            path.unlink()

    return inject


def other_torch(host: str, version: str = "2.12.0") -> Fault:
    """Return the fault of a host on which another version of torch is installed."""

    @contextmanager
    def inject(hosts: VirtualHosts) -> Iterator[None]:
        (metadata,) = (Path(str(file.locate())) for file in files("torch") or () if file.name == "METADATA")
        other = hosts.folder / "METADATA"
        other.write_text(re.sub(r"(?m)^Version: .*", f"Version: {version}", metadata.read_text(), count=1))
        with _mounted(hosts, host, metadata, "--bind", str(other)):
            yield

    return inject


def full_disk(host: str) -> Fault:
    """Return the fault of a host whose local disk is full."""

    @contextmanager
    def inject(hosts: VirtualHosts) -> Iterator[None]:
        scratch = scratch_folder(hosts)
        scratch.mkdir(exist_ok=True)
        with _mounted(hosts, host, scratch, "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
            hosts.run("fallocate", "--length", "1m", str(scratch / "ballast"), host=host)
            yield

    return inject


def full_shared_memory(host: str) -> Fault:
    """Return the fault of a host on which killed jobs left files in /dev/shm."""

    @contextmanager
    def inject(hosts: VirtualHosts) -> Iterator[None]:
        with _mounted(hosts, host, Path("/dev/shm"), "-t", "tmpfs", "-o", "size=32m", "tmpfs"):
            hosts.run("fallocate", "--length", "24m", "/dev/shm/left", host=host)
            yield

    return inject


@contextmanager
def _mounted(hosts: VirtualHosts, host: str, target: Path, *options: str) -> Iterator[None]:
    """Mount something at a path of one host during the block. A process of a job may use it a moment longer."""
    hosts.run("mount", *options, str(target), host=host)
    try:
        yield
    finally:
        hosts.run("umount", "--lazy", str(target), host=host)
