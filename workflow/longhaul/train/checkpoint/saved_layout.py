"""Describes the layout of a checkpoint (ranks, ZeRO stage, offload, parallel axes) for manifest.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longhaul.jobs.kinds.train_job import TrainSpec

Layout = dict[str, Any]
_KEYS = ("world_size", "zero_stage", "offload_optimizer", "parallel")


def planned_layout(job: TrainSpec) -> Layout:
    """Return the layout of this job."""
    zero = job.stage.zero
    return {
        "world_size": job.world_size,
        "zero_stage": zero.stage,
        "offload_optimizer": zero.offload_optimizer,
        "parallel": job.stage.parallel.model_dump(),
    }


def layout_of(manifest: Mapping[str, Any]) -> Layout:
    """Return the layout that a checkpoint's manifest records."""
    return {key: manifest[key] for key in _KEYS}


def describe_layout(layout: Layout) -> str:
    """Return the layout for a log, such as "4 ranks, ZeRO 1, tensor 2"."""
    axes = [f"{axis} {size}" for axis, size in layout["parallel"].items() if size > 1]
    return ", ".join([f"{layout['world_size']} ranks", f"ZeRO {layout['zero_stage']}", *axes])
