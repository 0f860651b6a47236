"""Parses what the driver amdgpu wrote to the kernel log since boot: hardware errors, and resets of GPUs.

Forms: drivers/gpu/drm/amd/amdgpu of Linux, amdgpu_ras.c and amdgpu_device.c. Counts of memory errors are read from the driver's
files, and not from here. A program can cause a reset, too, so only a GPU whose last reset failed is bad.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

FAILED_RESET = "failed GPU reset"
_EVENTS = {
    # amdgpu 0000:e3:00.0: amdgpu: uncorrectable hardware error(ERREVENT_ATHUB_INTERRUPT) detected!
    "hardware error": re.compile(r"uncorrectable hardware error\(", re.IGNORECASE),
    # amdgpu 0000:e3:00.0: amdgpu: GPU reset begin!. Source:  3
    "GPU reset": re.compile(r"GPU reset begin"),
    # amdgpu 0000:e3:00.0: amdgpu: GPU reset(1) failed
    FAILED_RESET: re.compile(r"GPU reset\(\d+\) failed"),
}
_SUCCEEDED = re.compile(r"GPU reset\(\d+\) succeeded")
_LINE = re.compile(r"amdgpu ([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]): (.*)")


@dataclass(frozen=True)
class AmdKernelError:
    """One kind of event of one GPU. event: of _EVENTS; count: how often; text: the newest message"""

    event: str
    address: str
    count: int
    text: str


def amd_kernel_errors(lines: Iterable[str]) -> list[AmdKernelError]:
    """Return the events in lines of the kernel log, one entry per GPU and kind. A reset that succeeded ends earlier failures."""
    found: dict[tuple[str, str], AmdKernelError] = {}
    for address, text in (match.groups() for line in lines if (match := _LINE.search(line))):
        if _SUCCEEDED.search(text):
            found.pop((FAILED_RESET, address), None)
        for event in (event for event, pattern in _EVENTS.items() if pattern.search(text)):
            count = found[event, address].count + 1 if (event, address) in found else 1
            found[event, address] = AmdKernelError(event, address, count, text[:200])
    return list(found.values())


def is_of(error: AmdKernelError, addresses: Collection[str]) -> bool:
    """Return whether an event is of one of these GPUs. Partitions of a GPU differ in the last digit of the address."""
    return error.address.rpartition(".")[0] in {address.rpartition(".")[0] for address in addresses}
