"""Measures one node under load: each GPU's products and copies, pairs of GPUs, memory bandwidth, local disk, run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from longhaul.checks.burn_in import announce_on, burn_in, read_while_busy
from longhaul.checks.disk_speed import direct_speed, safe_write
from longhaul.checks.gpu_pair_copies import copy_between_gpus
from longhaul.checks.matrix_products import matrix_tflops
from longhaul.checks.measurement_types import BurnIn, DiskSpeed, GpuPair, SafeWrite
from longhaul.checks.memory_bandwidth import triad_gb_per_s

T = TypeVar("T")
MIB = 2**20
_DISK_LIMIT_S = 3.0


@dataclass(frozen=True)
class _Sizes:
    """Sizes of matrices and of data in bytes. Those of GPU nodes exceed the caches; those of a CPU keep its check short."""

    matrix: int
    copy: int
    pair: int
    memory: int
    disk: int
    file: int


_GPU_NODE = _Sizes(matrix=8192, copy=256 * MIB, pair=64 * MIB, memory=256 * MIB, disk=1024 * MIB, file=64 * MIB)
_CPU_NODE = _Sizes(matrix=256, copy=4 * MIB, pair=MIB, memory=32 * MIB, disk=32 * MIB, file=MIB)


def load_devices(burn_in_s: float) -> list[BurnIn]:
    """Keep all GPUs of this node busy for `burn_in_s` seconds, and verify products; without GPUs, the CPU for a moment."""
    gpus = _gpus()
    sizes = _sizes(bool(gpus))
    return burn_in(gpus or [torch.device("cpu")], burn_in_s if gpus else 0, sizes.matrix, sizes.copy)


def copy_between_all_gpus() -> list[GpuPair]:
    return copy_between_gpus(_gpus(), _GPU_NODE.pair)


def memory_rate(has_gpus: bool) -> float:
    return triad_gb_per_s(_sizes(has_gpus).memory)


def local_disk_speed(scratch: str | None, has_gpus: bool) -> DiskSpeed:
    """Measure the local disk. scratch: folder on it; None: $TMPDIR, else /tmp"""
    return direct_speed(Path(scratch or tempfile.gettempdir()), _sizes(has_gpus).disk, _DISK_LIMIT_S)


def write_to_run_folder(folder: Path, has_gpus: bool) -> SafeWrite:
    """Measure a safe write. folder: the run folder, on the shared file system"""
    return safe_write(folder, _sizes(has_gpus).file)


def matrix_rates() -> list[float]:
    """Return the rate of matrix products of each GPU by itself, in TFLOP/s: the reference of a training's efficiency."""
    rates = []
    for device in _gpus():
        announce_on("matrix products", device)
        rates.append(round(matrix_tflops(device), 1))
    return rates


def read_under_load(read: Callable[[], T]) -> T:
    """Return what `read` returns while all GPUs multiply matrices."""
    return read_while_busy(_gpus(), _GPU_NODE.matrix, read)


def _sizes(has_gpus: bool) -> _Sizes:
    return _GPU_NODE if has_gpus else _CPU_NODE


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
