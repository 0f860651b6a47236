"""Estimates a stage's GPU-hours from the MFU of similar trainings, ours and published ones in measured_speeds.json.

docs/reference/speeds.md lists the measurements with their sources. The estimate counts training steps alone; start-up,
validation and repeated steps are not included.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from longhaul.config.model_size import ModelSize
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage

_LONG_SEQUENCE = 16_384
_TITLES: dict[str, Callable[[Any], str]] = {
    "precision": lambda precision: f"precision {precision}",
    "several_gpus": lambda several: "several GPUs" if several else "one GPU",
    "offload": lambda _: "offload",
    "axes": lambda axes: f"the parallel axes {', '.join(axes)}" if axes else "data parallelism alone",
    "zero_3": lambda is_zero_3: "ZeRO stage 3" if is_zero_3 else "ZeRO stages below 3",
    "long": lambda is_long: f"sequences {'longer' if is_long else 'shorter'} than {_LONG_SEQUENCE:,} tokens",
    "network": lambda network: f"{network} between nodes" if network != "none" else "one node",
    "compiled": lambda compiled: f"layers {'with' if compiled else 'without'} torch.compile",
    "full_recompute": lambda is_full: f"{'full' if is_full else 'no full'} recomputation",
}
"""Feature -> how the plan names its value. The order is the one in which features select measurements."""


@dataclass(frozen=True)
class HoursEstimate:
    """Lowest and highest number of GPU-hours; basis, unmeasured: as in MfuEstimate."""

    low: float
    high: float
    basis: tuple[str, ...]
    unmeasured: tuple[str, ...] = ()


@dataclass(frozen=True)
class MfuEstimate:
    """Lowest and highest MFU of the measurements that are most like a stage.

    basis:      the measurements' names
    unmeasured: what no measurement of the model's family has in common with the stage
    """

    low: float
    high: float
    basis: tuple[str, ...]
    unmeasured: tuple[str, ...] = ()

    def gpu_hours(self, flops: float, peak_tflops: float) -> HoursEstimate:
        """Return the GPU-hours that `flops` take at the highest and at the lowest MFU of GPUs with this peak."""
        hours = [flops / (peak_tflops * 1e12 * mfu) / 3600 for mfu in (self.high, self.low)]
        return HoursEstimate(round(hours[0], 1), round(hours[1], 1), self.basis, self.unmeasured)


def estimate_mfu(stage: Stage, sizes: ModelSize, site: Site) -> MfuEstimate:
    """Return the MFU that trainings like this stage reached.

    Of the measurements of the same family of models (dense, mixture of experts), each feature in turn leaves those that agree
    with the stage; a feature that no measurement shares is listed and leaves them all. For a stage in FP8, measurements in bf16
    count if they share more features; their MFU is multiplied by the gain of FP8 on one GPU.
    """
    wanted = stage_features(stage, sizes, site)
    found = _most_alike(wanted)
    if wanted["precision"] == "fp8":
        in_bf16 = _most_alike({**wanted, "precision": "bf16"})
        if len(in_bf16.unmeasured) < len(found.unmeasured):
            gain = _fp8_gain(wanted["family"])
            basis = (*in_bf16.basis, f"{gain:.2f} times as fast in FP8 (longhaul)")
            return replace(in_bf16, low=gain * in_bf16.low, high=gain * in_bf16.high, basis=basis)
    return found


def _most_alike(wanted: dict[str, Any]) -> MfuEstimate:
    """Return the MFU of the measurements that share the most important of these features."""
    rows = [row for row in measured_speeds() if row["features"]["family"] == wanted["family"]]
    unmeasured = []
    for feature, title in _TITLES.items():
        alike = [row for row in rows if _features_of(row)[feature] in (wanted[feature], None)]
        if alike:
            rows = alike
        else:
            unmeasured.append(title(wanted[feature]))
    mfus = [row["mfu"] for row in rows]
    return MfuEstimate(min(mfus), max(mfus), tuple(map(_name, rows)), tuple(unmeasured))


def _fp8_gain(family: str) -> float:
    """Return how many times as fast longhaul trained a model of this family on one GPU in FP8 as in bf16."""
    rows = [row for row in measured_speeds() if row["features"]["family"] == family and row["gpus"] == 1]
    mfu = {row["precision"]: row["mfu"] for row in rows}
    return mfu["fp8"] / mfu["bf16"]


def stage_features(stage: Stage, sizes: ModelSize, site: Site) -> dict[str, Any]:
    """Return what a stage's speed depends on, apart from its GPUs."""
    zero, ranks = stage.zero, stage.nodes * stage.gpus_per_node
    network = {"infiniband": "rdma", "roce": "rdma"}.get(site.interconnect.kind, site.interconnect.kind)
    offloads = (zero.offload_optimizer, zero.offload_param) != ("none", "none")
    return {
        "family": "mixture of experts" if any(sizes.is_sparse) else "dense",
        "precision": "bf16" if stage.precision == "fp16" else stage.precision,  # the same peak
        "several_gpus": ranks > 1,
        "offload": offloads or stage.activation_checkpointing == "offload",
        "axes": sorted(axis for axis, size in stage.parallel if size > 1),
        "zero_3": zero.stage == 3,
        "long": stage.sequence_length > _LONG_SEQUENCE,
        "network": "none" if stage.nodes == 1 else network,
        "compiled": stage.compiles_layers_on_gpus(any(sizes.is_sparse)),
        "full_recompute": stage.activation_checkpointing in ("full", "offload"),
    }


@cache
def measured_speeds() -> tuple[dict[str, Any], ...]:
    """Return the measurements.

    features.full_recompute: null where the source does not say
    features.compiled: null where other fused kernels take the place of torch.compile, or the source does not say
    mfu: of the card's peak in bf16, 989 TFLOP/s, with the FLOPs of ModelSize.training_flops; as published where tokens/s are not
    """
    return tuple(json.loads(Path(__file__).with_name("measured_speeds.json").read_text(encoding="utf-8")))


def _features_of(row: dict[str, Any]) -> dict[str, Any]:
    features = row["features"]
    return {**features, "precision": row["precision"], "long": features["sequence_length"] > _LONG_SEQUENCE}


def _name(row: dict[str, Any]) -> str:
    return f"{row['name']} on {row['gpus']:,} {row['card']} ({row['source'].split(',')[0]})"
