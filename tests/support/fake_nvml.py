"""Compiles fake_nvml.c as libnvidia-ml.so.1, and states the facts of healthy A100, H100 and H200 nodes in its form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("fake_nvml.c")
READ = """
import dataclasses, json, sys
from longhaul.checks.nvidia_gpu_facts import read_gpus
print(json.dumps(dataclasses.asdict(read_gpus(sys.argv[1:], is_loaded=True))))
"""
MODELS: dict[str, dict[str, Any]] = {
    "A100": {"name": "NVIDIA A100-SXM4-80GB", "nvlinks": 12, "pcie": 4, "power_mw": 400_000, "clock_max": 1410},
    "H100": {"name": "NVIDIA H100 80GB HBM3", "nvlinks": 18, "pcie": 5, "power_mw": 700_000, "clock_max": 1980},
    "H200": {"name": "NVIDIA H200", "nvlinks": 18, "pcie": 5, "power_mw": 700_000, "clock_max": 1980},
}


def build_fake_nvml(folder: Path) -> Path:
    """Compile the library into a folder, and return the folder for LD_LIBRARY_PATH."""
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE)]
    subprocess.run(command, check=True)
    return folder


def healthy_gpu(model: str, index: int) -> dict[str, Any]:
    """Return the facts of a healthy GPU."""
    shape = MODELS[model]
    return {
        "name": shape["name"],
        "uuid": f"GPU-0000000{index}-aaaa-bbbb-cccc-000000000000",
        "pci": f"00000000:{0x1B + 0x10 * index:02X}:00.0",
        "ecc": 1,
        "corrected": 0,
        "uncorrected": 0,
        "uncorrected_ever": 0,
        "remap_pending": 0,
        "remap_failed": 0,
        "reasons": 0x4,
        "clock": shape["clock_max"],
        "clock_max": shape["clock_max"],
        "power_mw": shape["power_mw"],
        "power_default_mw": shape["power_mw"],
        "persistence": 1,
        "mig": 0,
        "pcie": shape["pcie"],
        "pcie_max": shape["pcie"],
        "width": 16,
        "width_max": 16,
        **{f"nvlink{link}": 1 for link in range(shape["nvlinks"])},
        **{f"path{other}": 40 if other // 4 == index // 4 else 50 for other in range(8)},
    }


def read_fake_gpus(
    library: Path, gpus: Sequence[Mapping[str, Any]], uuids: tuple[str, ...] = (), **node: Any
) -> dict[str, Any]:
    """Return what read_gpus finds, in a process that loads the fake library.

    node: init and count, the codes of nvmlInit and nvmlDeviceGetCount
    """
    lines = [f"0 {key} {value}" for key, value in {"gpus": len(gpus), **node}.items()]
    lines += [f"{index} {key} {value}" for index, gpu in enumerate(gpus) for key, value in gpu.items()]
    facts = library / "facts.txt"
    facts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "FAKE_NVML": str(facts)}
    command = [sys.executable, "-c", READ, *uuids]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
