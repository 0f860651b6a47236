"""Reads AMD GPUs from files of the kernel driver amdgpu: error counters per block, bad pages, power limit.

Files: docs.kernel.org/gpu/amdgpu/ras.html and thermal.html. They need neither ROCm nor amdsmi.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from longhaul.checks.amd_gpu_facts import Answers
from longhaul.checks.sysfs_files import read_text

AMD = "0x1002"
_MICROWATT = 1e-6


def read_gpu_files(sys: Path) -> dict[str, Answers]:
    """Return PCI address -> what the driver's files say, of this node's AMD GPUs."""
    devices = sorted((sys / "bus" / "pci" / "drivers" / "amdgpu").glob("*:*"))
    return {device.name: _answers(device) for device in devices if read_text(device / "vendor") == AMD}


def _answers(device: Path) -> Answers:
    texts = {path.name.removesuffix("_err_count"): read_text(path) for path in (device / "ras").glob("*_err_count")}
    answers = Answers()
    if texts:
        kinds = {"uncorrected": "ue", "corrected": "ce", "deferred": "de"}
        answers.values |= {fact: _counts(texts, kind) for fact, kind in kinds.items()}
    else:
        answers.unavailable["uncorrected"] = "the driver amdgpu has no counters"  # consumer cards have none
    pages = device / "ras" / "gpu_vram_bad_pages"
    if pages.exists():
        answers.values["bad_pages"] = _bad_pages(read_text(pages))
    else:
        answers.unavailable["bad_pages"] = "the driver amdgpu does not list them"
    for fact, name in (("power_limit_w", "power1_cap"), ("power_limit_default_w", "power1_cap_default")):
        limits = _watts(device, name)
        if limits:
            answers.values[fact] = limits[0]
        else:
            answers.unavailable[fact] = "the driver amdgpu does not state it"
    return answers


def _counts(texts: dict[str, str], kind: str) -> dict[str, int]:
    """Return block -> count from texts such as `ue: 0` and `ce: 3` on two lines."""
    found = {block: re.search(rf"^{kind}:\s*(\d+)", text, re.MULTILINE) for block, text in sorted(texts.items())}
    counts = {block: int(match[1]) for block, match in found.items() if match}
    return {block: count for block, count in counts.items() if count}


def _bad_pages(text: str) -> dict[str, int]:
    """Return flag -> number of pages from lines such as `0x027f5d43 : 0x00001000 : R`: page, size, flag."""
    return dict(Counter(re.findall(r":\s*([RPF])\s*$", text, re.MULTILINE)))


def _watts(device: Path, name: str) -> list[float]:
    """Return the values that the driver states in microwatts."""
    texts = [read_text(path) for path in sorted((device / "hwmon").glob(f"hwmon*/{name}"))]
    return [int(text) * _MICROWATT for text in texts if text.isdecimal()]
