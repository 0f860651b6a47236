"""Sorts kernels of CUDA and ROCm and operators of CPUs by name: GEMM, attention, elementwise, communication."""

from __future__ import annotations

import re

MATRIX, ATTENTION, ELEMENTWISE, COPY, COMMUNICATION, OTHER = (
    "matrix products",
    "attention",
    "elementwise and reductions",
    "copies",
    "communication",
    "other kernels",
)
CLASSES = (MATRIX, ATTENTION, ELEMENTWISE, OTHER, COPY, COMMUNICATION)
"""Classes in order of priority: time in which several classes run at once counts for the first one, and communication is last."""

_KERNELS = (
    (COMMUNICATION, r"nccl|rccl|mscclpp|nvshmem|deep_ep|symm_mem|one_shot_all|two_shot_all|multimem"),
    (COPY, r"^mem(cpy|set)\b|rocclr_(copy|fill)buffer"),
    # A fused kernel of torch.compile has the names of all its operators, also of the attention before it.
    (ATTENTION, r"^triton_tem_\w*attention"),
    (MATRIX, r"^triton_(tem|mm)_|^triton_\w*_grouped_mm"),
    (ELEMENTWISE, r"^triton_(poi|red|per|for)_"),
    (ATTENTION, r"flash|fmha|sdpa|attention|\battn|_attn_|bwd_kernel_(dk|dq|fuse)|\bmha_"),
    (MATRIX, r"gemm|gemv|nvjet|cutlass|xmma|cijk_|splitk|wgmma|_mm_kernel|matmul|tensorop"),
    (
        ELEMENTWISE,
        r"elementwise|reduce|softmax|norm|sigmoid|silu|swiglu|gelu|rope|rotary|multi_tensor|foreach|adam|batchedcopy|index|"
        r"gather|scatter|embedding|fill|copy|cross_entropy|nll|dropout|transpose|permut|sort|scan|topk|histogram|cub::|rocprim|"
        r"arange|compute_grad_weight|triton_",
    ),
)
_OPERATORS = (
    (COMMUNICATION, r"^(c10d|gloo|mpi|nccl|_c10d_functional)\b|record_param_comms"),
    (ATTENTION, r"attention"),
    (MATRIX, r"^aten::(mm|addmm|bmm|baddbmm|matmul|linear|addmv|mv|dot|_grouped_mm|mkldnn_linear|einsum)\b"),
    (COPY, r"^aten::(copy_|_to_copy|to|clone|contiguous)\b"),
    (ELEMENTWISE, r"^aten::"),
)


def kernel_class(name: str) -> str:
    """Return the class of a CUDA or ROCm kernel."""
    return _first_match(_KERNELS, name)


def operator_class(name: str) -> str:
    """Return the class of an operator of PyTorch, such as aten::mm."""
    return _first_match(_OPERATORS, name)


def _first_match(table: tuple[tuple[str, str], ...], name: str) -> str:
    return next((found for found, pattern in table if re.search(pattern, name, re.IGNORECASE)), OTHER)
