"""Reads AMD GPUs from files of the kernel driver amdgpu: error counters per block, bad pages, power limit.

Files: docs.kernel.org/gpu/amdgpu/ras.html and thermal.html. They need neither ROCm nor amdsmi.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
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
    answers = Answers()
    texts = {path.name: _text(path) for path in sorted((device / "ras").glob("*_err_count"))}
    for fact, kind in (("uncorrected", "ue"), ("corrected", "ce"), ("deferred", "de")):
        answers.ask((fact,), partial(_error_counts, texts, kind))
    pages = device / "ras" / "gpu_vram_bad_pages"
    if pages.exists():
        answers.ask(("bad_pages",), lambda: [_bad_pages(_text(pages))])
    else:
        answers.unavailable["bad_pages"] = "the driver amdgpu does not list them"
    for fact, name in (("power_limit_w", "power1_cap"), ("power_limit_default_w", "power1_cap_default")):
        limits = _watts(device, name)
        if limits:
            answers.values[fact] = limits[0]
        else:
            answers.unavailable[fact] = "the driver amdgpu does not state it"
    return answers


def _text(path: Path) -> str:
    """Return a file's text, or why it cannot be read: that has no counts, and is then the reason."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return error.strerror or str(error)


def _error_counts(texts: Mapping[str, str], kind: str) -> list[dict[str, int]]:
    """Return block -> count, of the blocks that have some, from texts such as `ue: 0` and `ce: 3` on two lines.

    texts: file `<block>_err_count` -> its text

    Raises:
        ValueError: no errors are known, and a block has no counts, such as after "Query currently inaccessible".
    """
    if not texts:
        raise ValueError("the driver amdgpu has no counters")  # consumer cards have none
    counts = {file.removesuffix("_err_count"): _count(text, kind) for file, text in texts.items()}
    unread = [f"{file}: {text or 'it is empty'}" for file, text in texts.items() if _count(text, "ue") is None]
    found = {block: count for block, count in counts.items() if count}
    if unread and not found:
        raise ValueError(unread[0])
    if set(counts.values()) == {None}:
        raise ValueError("the driver amdgpu does not count them")  # earlier ones have no deferred errors
    return [found]


def _count(text: str, kind: str) -> int | None:
    found = re.search(rf"^{kind}:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None


def _bad_pages(text: str) -> dict[str, int]:
    """Return flag -> number of pages from lines such as `0x027f5d43 : 0x00001000 : R`: page, size, flag.

    Raises:
        ValueError: the text is another one.
    """
    pages = dict(Counter(re.findall(r":\s*([RPF])\s*$", text, re.MULTILINE)))
    if text and not pages:
        raise ValueError(f"gpu_vram_bad_pages: {text.splitlines()[0]}")
    return pages


def _watts(device: Path, name: str) -> list[float]:
    """Return the values that the driver states in microwatts."""
    texts = [read_text(path) for path in sorted((device / "hwmon").glob(f"hwmon*/{name}"))]
    return [int(text) * _MICROWATT for text in texts if text.isdecimal()]
