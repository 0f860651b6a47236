"""Reads AMD GPUs from files of the kernel driver amdgpu: error counters per block (umc is the memory), bad pages, power limit.

Files: docs.kernel.org/gpu/amdgpu/ras.html and thermal.html. They need neither ROCm nor amdsmi.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from longhaul.checks.sysfs_files import SYS, read_text

AMD = "0x1002"
RESERVED, PENDING, UNRESERVED = "R", "P", "F"
"""Flags of a bad page: out of use, out of use after the next reset, and still in use because it cannot be reserved."""
_MICROWATT = 1e-6


@dataclass(frozen=True)
class AmdGpuFacts:
    """One GPU. Errors since the driver was loaded: block -> count, of the blocks that have some.

    is_known:  the GPU has error counters; consumer cards have none
    bad_pages: flag -> number of memory pages, over the GPU's life; None where the driver does not list them
    power_limit_w, power_limit_default_w: None where the driver does not state them
    """

    address: str
    is_known: bool
    uncorrected: dict[str, int]
    corrected: dict[str, int]
    bad_pages: Mapping[str, int] | None = field(default_factory=dict)
    power_limit_w: float | None = None
    power_limit_default_w: float | None = None


def read_amd_gpus(sys: Path = SYS) -> list[AmdGpuFacts]:
    """Return this node's AMD GPUs, in the order of their PCI addresses."""
    devices = sorted((sys / "bus" / "pci" / "drivers" / "amdgpu").glob("*:*"))
    return [_facts(device) for device in devices if read_text(device / "vendor") == AMD]


def _facts(device: Path) -> AmdGpuFacts:
    texts = {path.name.removesuffix("_err_count"): read_text(path) for path in (device / "ras").glob("*_err_count")}
    return AmdGpuFacts(
        device.name,
        bool(texts),
        _counts(texts, "ue"),
        _counts(texts, "ce"),
        _bad_pages(device / "ras" / "gpu_vram_bad_pages"),
        _watts(device, "power1_cap"),
        _watts(device, "power1_cap_default"),
    )


def _counts(texts: dict[str, str], kind: str) -> dict[str, int]:
    """Return block -> count from texts such as `ue: 0` and `ce: 3` on two lines."""
    found = {block: re.search(rf"^{kind}:\s*(\d+)", text, re.MULTILINE) for block, text in sorted(texts.items())}
    counts = {block: int(match[1]) for block, match in found.items() if match}
    return {block: count for block, count in counts.items() if count}


def _bad_pages(path: Path) -> dict[str, int] | None:
    """Return flag -> number of pages from lines such as `0x027f5d43 : 0x00001000 : R`: page, size, flag."""
    if not path.exists():
        return None
    return dict(Counter(re.findall(r":\s*([RPF])\s*$", read_text(path), re.MULTILINE)))


def _watts(device: Path, name: str) -> float | None:
    """Return a value that the driver states in microwatts; None for 0, as of a die whose card has one limit for both."""
    texts = [read_text(path) for path in sorted((device / "hwmon").glob(f"hwmon*/{name}"))]
    values = [int(text) * _MICROWATT for text in texts if text.isdecimal() and int(text)]
    return values[0] if values else None
