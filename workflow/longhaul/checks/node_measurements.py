"""Measures one node under load: each GPU's products and copies, pairs of GPUs, memory bandwidth, local disk, run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from longhaul.checks.burn_in import burn_in, read_while_busy
from longhaul.checks.disk_speed import direct_speed, safe_write
from longhaul.checks.gpu_pair_copies import copy_between_gpus
from longhaul.checks.matrix_products import matrix_tflops
from longhaul.checks.measurement_types import NodeMeasurements
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


def measure_node(folder: Path, scratch: str | None, burn_in_s: float) -> NodeMeasurements:
    """Measure this node, which takes `burn_in_s` and some seconds more; without GPUs about a second.

    folder:    the run folder, on the shared file system
    scratch:   folder on the local disk; None: $TMPDIR, else /tmp
    burn_in_s: seconds in which all GPUs are busy
    """
    gpus = _gpus()
    sizes = _GPU_NODE if gpus else _CPU_NODE
    return NodeMeasurements(
        devices=burn_in(gpus or [torch.device("cpu")], burn_in_s if gpus else 0, sizes.matrix, sizes.copy),
        memory_gb_per_s=triad_gb_per_s(sizes.memory),
        local_disk=direct_speed(Path(scratch or tempfile.gettempdir()), sizes.disk, _DISK_LIMIT_S),
        run_folder=safe_write(folder, sizes.file),
        gpu_pairs=copy_between_gpus(gpus, sizes.pair),
    )


def measure_gpus(burn_in_s: float) -> NodeMeasurements:
    """Keep all GPUs of this node busy for `burn_in_s` seconds, and verify products and copies: what a start has time for."""
    gpus = _gpus()
    return NodeMeasurements(
        devices=burn_in(gpus, burn_in_s, _GPU_NODE.matrix, _GPU_NODE.copy),
        gpu_pairs=copy_between_gpus(gpus, _GPU_NODE.pair),
    )


def matrix_rates() -> list[float]:
    """Return the rate of matrix products of each GPU by itself, in TFLOP/s: the reference of a training's efficiency."""
    return [round(matrix_tflops(device), 1) for device in _gpus()]


def read_under_load(read: Callable[[], T]) -> T:
    """Return what `read` returns while all GPUs multiply matrices."""
    return read_while_busy(_gpus(), _GPU_NODE.matrix, read)


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
