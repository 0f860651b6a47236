"""Keys in one rank's `*_optim_states.pt`: where DeepSpeed keeps master weights, exp_avg, exp_avg_sq and the step count.

DeepSpeed writes a different tree for each ZeRO stage. ZeRO 1 and 2: runtime/zero/stage_1_and_2.py, `state_dict`.
ZeRO 3: runtime/zero/stage3.py, `_rigid_state_dict`.
"""

from __future__ import annotations

from typing import Any

from longhaul.checkpoint_io.lazy_tensors import lazy_stored_tensor
from longhaul.checkpoint_io.torch_archive import StoredTensor

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")


def flat_partition(state: dict[str, Any], group: int, key: str) -> StoredTensor:
    """Return the rank's partition of parameter group (ZeRO 3: sub-group) `group`.

    key: MASTER for the master weights, or one of MOMENTS.
    """
    if key != MASTER:
        return _adam_state(state)["state"][group][key]
    return state["fp32_flat_groups" if is_zero3(state) else "single_partition_of_fp32_groups"][group]


def is_zero3(state: dict[str, Any]) -> bool:
    """Return True for ZeRO 3, which partitions each parameter; ZeRO 1 and 2 partition one flat vector for each group."""
    return "fp32_flat_groups" in state


def partition_count(state: dict[str, Any], group: int) -> int:
    """Return the number of data-parallel ranks among which a group is partitioned.

    ZeRO 3 states it for each group if the model has experts on different ranks.
    """
    counts = state["partition_count"]
    if isinstance(counts, list):
        return counts[group]
    groups = state.get("ds_zero_partition_groups")
    return groups[group]["partition_count"] if groups else counts


def optimizer_steps(state: dict[str, Any]) -> int:
    """Return the number of optimizer steps: Adam's own count, which omits skipped steps; 0 before the first step."""
    first = next(iter(_adam_state(state)["state"].values()), None)
    if first is None:
        return 0
    step = first["step"]
    return int(lazy_stored_tensor(step).read()) if isinstance(step, StoredTensor) else int(step)


def _adam_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return Adam's own state dict: inside that of ZeRO 3, inside that of ZeRO 1 and 2, or `state` itself."""
    return state.get("optimizer_state_dict") or state.get("base_optimizer_state") or state
