"""Reads CPU model, NUMA nodes, frequency governor, transparent huge pages and memory errors (EDAC) of this node."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from longhaul.checks.sysfs_files import SYS, read_text

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class CpuAndMemoryFacts:
    """CPUs and memory of a node.

    governors:          frequency governor -> number of cores
    modules_mib:        size of each memory module in MiB, in the order of the slots that the kernel knows
    memory_uncorrected: memory errors since boot that ECC could not correct
    """

    model: str | None
    numa_nodes: int | None
    governors: dict[str, int] | None
    huge_pages: str | None
    modules_mib: list[int] | None
    memory_uncorrected: int | None
    memory_corrected: int | None
    unavailable: dict[str, str] = field(default_factory=dict)


def read_cpu_and_memory(sys: Path = SYS, cpuinfo: Path = CPUINFO) -> CpuAndMemoryFacts:
    """Return the facts of this node."""
    controllers = sys / "devices" / "system" / "edac" / "mc"
    facts = {
        "model": _cpu_model(cpuinfo),
        "numa_nodes": len(list((sys / "devices" / "system" / "node").glob("node[0-9]*"))) or None,
        "governors": _governors(sys / "devices" / "system" / "cpu"),
        "huge_pages": _huge_pages(sys / "kernel" / "mm" / "transparent_hugepage" / "enabled"),
        "modules_mib": _numbers(controllers, "mc*/dimm*/size") or None,
        "memory_uncorrected": _sum(controllers, "ue_count"),
        "memory_corrected": _sum(controllers, "ce_count"),
    }
    reasons = {
        "model": f"{cpuinfo} names no model",
        "numa_nodes": "the kernel shows no NUMA nodes",
        "governors": "the kernel does not set the frequency (no cpufreq, as in a virtual machine)",
        "huge_pages": "the kernel has no transparent huge pages",
        **dict.fromkeys(("modules_mib", "memory_uncorrected", "memory_corrected"), _no_counters(controllers)),
    }
    unavailable = {name: reasons[name] for name, value in facts.items() if value is None}
    return CpuAndMemoryFacts(**facts, unavailable=unavailable)  # type: ignore[arg-type]


def _no_counters(controllers: Path) -> str:
    is_loaded = any(controllers.glob("mc*"))
    return f"the files in {controllers} cannot be read" if is_loaded else "no EDAC driver is loaded"


def _cpu_model(cpuinfo: Path) -> str | None:
    """Return the model; on Arm the codes of implementer and part."""
    values = dict(re.findall(r"^([\w ]+?)\s*:\s*(.+)$", read_text(cpuinfo), re.MULTILINE))
    arm = f"Arm implementer {values.get('CPU implementer')}, part {values.get('CPU part')}"
    return values.get("model name") or (arm if "CPU part" in values else None)


def _governors(cpus: Path) -> dict[str, int] | None:
    found = Counter(read_text(path) for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_governor"))
    return dict(found) or None


def _huge_pages(path: Path) -> str | None:
    """Return the chosen word of `always [madvise] never`."""
    chosen = re.search(r"\[(\w+)\]", read_text(path))
    return chosen[1] if chosen else None


def _sum(controllers: Path, name: str) -> int | None:
    counts = _numbers(controllers, f"mc*/{name}")
    return sum(counts) if counts else None


def _numbers(controllers: Path, pattern: str) -> list[int]:
    """Return the numbers in these files; one that cannot be read has none."""
    texts = (read_text(path) for path in sorted(controllers.glob(pattern)))
    return [int(text) for text in texts if text.isdecimal()]
