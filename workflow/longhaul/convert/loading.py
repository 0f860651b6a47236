"""Loads an export the way its users will, and takes transformers' warnings for errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from longhaul.errors import UserError

# Beside the weights, loading holds the experts of a layer twice while it fuses them, and the forward pass its activations.
MEMORY_PER_WEIGHT_BYTE = 1.3


def fits_memory(weights_bytes: int) -> bool:
    """Whether a model with this many bytes of weights can be loaded whole by this process."""
    return weights_bytes * MEMORY_PER_WEIGHT_BYTE <= available_bytes()


def available_bytes() -> int:
    """Free memory of this machine, or what this process' control groups leave of it, whichever is less."""
    return min([psutil.virtual_memory().available, *_cgroup_rests(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _cgroup_rests(membership: Path, root: Path) -> list[int]:
    """Limit minus use of every version 2 control group above this process. Kernel: admin-guide/cgroup-v2.rst."""
    if not membership.exists():
        return []
    lines = [line.partition("::")[2] for line in membership.read_text().splitlines() if line.startswith("0::")]
    own = root / lines[0].lstrip("/") if lines else root
    rests = []
    for folder in [own, *own.parents]:
        limit, use = folder / "memory.max", folder / "memory.current"
        if folder.is_relative_to(root) and limit.exists() and limit.read_text().strip() != "max":
            rests.append(int(limit.read_text()) - int(use.read_text()))
    return rests


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The exported model in evaluation mode.

    Raises:
        UserError: transformers found a key missing, unexpected or of another shape (it would only warn and go on).
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, info[kind])):
            raise UserError(
                f"from_pretrained on the export: {kind.replace('_', ' ')}: {', '.join(found[:3])} ({len(found)} in all)",
                "this transformers release reads another layout than it writes: use the tested version",
            )
    return model.eval()
