"""Reads the error counters of AMD GPUs that the kernel driver amdgpu keeps per block of the GPU, such as umc, the memory.

Files: docs.kernel.org/gpu/amdgpu/ras.html. They need neither ROCm nor amdsmi.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from longhaul.checks.sysfs_files import SYS, read_text

AMD = "0x1002"


@dataclass(frozen=True)
class AmdGpuErrors:
    """Errors of one GPU since the driver was loaded: block -> count, of the blocks that have some.

    is_known: the GPU has counters; consumer cards have none
    """

    address: str
    is_known: bool
    uncorrected: dict[str, int]
    corrected: dict[str, int]


def read_amd_gpu_errors(sys: Path = SYS) -> list[AmdGpuErrors]:
    """Return the counters of this node's AMD GPUs, in the order of their PCI addresses."""
    devices = sorted((sys / "bus" / "pci" / "drivers" / "amdgpu").glob("*:*"))
    return [_errors(device) for device in devices if read_text(device / "vendor") == AMD]


def _errors(device: Path) -> AmdGpuErrors:
    texts = {path.name.removesuffix("_err_count"): read_text(path) for path in (device / "ras").glob("*_err_count")}
    return AmdGpuErrors(device.name, bool(texts), _counts(texts, "ue"), _counts(texts, "ce"))


def _counts(texts: dict[str, str], kind: str) -> dict[str, int]:
    """Return block -> count from texts such as `ue: 0` and `ce: 3` on two lines."""
    found = {block: re.search(rf"^{kind}:\s*(\d+)", text, re.MULTILINE) for block, text in sorted(texts.items())}
    counts = {block: int(match[1]) for block, match in found.items() if match}
    return {block: count for block, count in counts.items() if count}
