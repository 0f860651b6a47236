"""Where a rank's optimizer file has its share of the flat masters, and where the state of the Adam that ZeRO wraps."""

from __future__ import annotations

from typing import Any

from longhaul.checkpoint_io.lazy_tensors import lazy, whole
from longhaul.checkpoint_io.torch_archive import StoredTensor

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")


def flat_share(state: dict[str, Any], group: int, key: str) -> StoredTensor:
    """The share of the masters (key MASTER) or of a moment that a rank has of parameter group or sub-group `group`."""
    if key != MASTER:
        return _wrapped(state)["state"][group][key]
    return state["fp32_flat_groups" if is_zero3(state) else "single_partition_of_fp32_groups"][group]


def is_zero3(state: dict[str, Any]) -> bool:
    """Whether parameters are partitioned one by one; else a group of them is one flat vector."""
    return "fp32_flat_groups" in state


def sharing_ranks(state: dict[str, Any], group: int) -> int:
    """Over how many data-parallel ranks a group is partitioned; ZeRO 3 says it of every group where some are experts."""
    counts = state["partition_count"]
    if isinstance(counts, list):
        return counts[group]
    groups = state.get("ds_zero_partition_groups")
    return groups[group]["partition_count"] if groups else counts


def step_of(state: dict[str, Any]) -> int:
    """Optimizer steps done: Adam's own count, which leaves skipped steps out; 0 before the first."""
    first = next(iter(_wrapped(state)["state"].values()), None)
    if first is None:
        return 0
    step = first["step"]
    return int(lazy(step.shape, (whole(step),)).read()) if isinstance(step, StoredTensor) else int(step)


def _wrapped(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict of Adam itself: inside ZeRO 3's, inside that of ZeRO 1 and 2, or the state alone."""
    return state.get("optimizer_state_dict") or state.get("base_optimizer_state") or state
