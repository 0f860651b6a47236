"""Uses of torch that its documented interface does not cover. Written for torch 2.13."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def matmul_and_attention_ops() -> list[Any]:
    """Return the ATen operators that compute matrix products and attention, as torch's selective checkpointing wants them.

    torch documents no stable names of ATen operators; those with a leading underscore are private to its dispatcher.
    """
    names = (
        "mm",
        "addmm",
        "_grouped_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    return [getattr(torch.ops.aten, name).default for name in names]


def is_in_backward_pass() -> bool:
    """Return True while autograd runs a backward pass on this thread, e.g. while activation checkpointing recomputes a layer.

    torch has no public function for it; its own checkpointing asks the same private one.
    """
    return torch._C._current_graph_task_id() != -1


def extension_build_locks(folder: Path) -> list[Path]:
    """Return the lock files of torch's extension builds below `folder` ($TORCH_EXTENSIONS_DIR), in order of the names.

    torch.utils.cpp_extension locks <folder>/<op> with a file named `lock` (torch.utils.file_baton). Neither the name nor the
    waiting is documented, and a process waits without limit for a lock whose owner was killed.
    """
    return sorted(folder.glob("*/lock"))
