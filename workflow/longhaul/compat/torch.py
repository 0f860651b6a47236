"""Private parts of torch: ATen ops for selective checkpointing, limit and errors of torch.compile, build locks, fused AdamW.
Written for torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def matmul_and_attention_ops() -> list[Any]:
    """Return the ATen operators that compute matrix products and attention, as torch's selective checkpointing wants them.

    torch documents no stable names of ATen operators; those with a leading underscore are private to its dispatcher.
    FlexAttention is an operator of a kind of its own, whose module is private.
    """
    from torch._higher_order_ops.flex_attention import flex_attention

    names = (
        "mm",
        "addmm",
        "_grouped_mm",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    return [*(getattr(torch.ops.aten, name).default for name in names), flex_attention]


def multiply_fp8(
    rows: torch.Tensor,
    rows_scale: torch.Tensor,
    columns: torch.Tensor,
    columns_scale: torch.Tensor,
    dtype: torch.dtype,
    fast: bool = False,
) -> torch.Tensor:
    """Return the product of two matrices in FP8, the first stored by rows and the second by columns.

    torch's public scaled_mm cannot be captured by torch.compile before torch 2.13.

    rows_scale, columns_scale: fp32 scalars with which the matrices must be multiplied
    fast: the GPU adds with fewer bits (Hopper), which the output of a layer tolerates
    """
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rows, columns, scale_a=rows_scale, scale_b=columns_scale, out_dtype=dtype, use_fast_accum=fast
    )


def is_in_backward_pass() -> bool:
    """Return True while autograd runs a backward pass on this thread, e.g. while activation checkpointing recomputes a layer.

    torch has no public function for it; its own checkpointing calls the same private one.

    Upstream: PyTorch issue 144928 asks for a function that detects activation checkpointing.
    """
    return torch._C._current_graph_task_id() != -1


def extension_build_locks(folder: Path) -> list[Path]:
    """Return the lock files of torch's extension builds below `folder` ($TORCH_EXTENSIONS_DIR), in order of the names.

    torch.utils.cpp_extension locks <folder>/<op> with a file named `lock` (torch.utils.file_baton). Neither the name nor the
    waiting is documented, and a process waits without limit for a lock whose owner was killed.

    Upstream: PyTorch issue 189245; pull request 190543 uses a lock that ends with its process, after torch 2.13.
    """
    return sorted(folder.glob("*/lock"))


@dataclass(frozen=True)
class CompileErrorReason:
    """Text of a compiler's error, in one line. `is_capture`: Dynamo could not capture the function, so nothing has run yet."""

    text: str
    is_capture: bool


def compile_error_reason(error: Exception) -> CompileErrorReason | None:
    """Return why torch.compile failed; None for an error of the compiled function itself.

    torch has no public base class of these errors.
    """
    from torch._dynamo.exc import TorchDynamoException, Unsupported, UserError

    if not isinstance(error, TorchDynamoException):
        return None
    text = " ".join(str(error).split())
    return CompileErrorReason(text, isinstance(error, (Unsupported, UserError)))


def allow_graphs(graphs: int) -> None:
    """Let torch.compile keep this many graphs of one function; it gives up after eight.

    Releases before torch.compile's argument `recompile_limit` (PyTorch pull request 177936) have no public setting.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, graphs)


def can_skip_update_on_device(optimizer: Any) -> bool:
    """Return whether `set_update_scale` works with this optimizer: torch's own, fused, on GPUs."""
    is_fused = isinstance(optimizer, torch.optim.Adam) and all(group["fused"] for group in optimizer.param_groups)
    return is_fused and all(p.is_cuda for group in optimizer.param_groups for p in group["params"])


def set_update_scale(optimizer: Any, divisor: torch.Tensor | None, is_bad: torch.Tensor) -> None:
    """Let the next step of a fused optimizer divide gradients by a number on the device, or leave everything as it is.

    torch.amp.GradScaler sets the same two attributes. They are documented only there.

    divisor: scalar in fp32; None divides by nothing
    is_bad:  scalar in fp32; 1 leaves weights, moments and the number of steps unchanged
    """
    optimizer.grad_scale, optimizer.found_inf = divisor, is_bad
