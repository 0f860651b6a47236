"""Which of torch's attention kernels a GPU takes for heads that share keys and values."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.integrations import sdpa_attention


def repeat_shared_heads_in_fp32() -> None:
    """Has transformers repeat shared key and value heads on GPUs in fp32, as it does wherever there is a mask.

    Of torch's kernels only flash attention reads shared heads where they are, and it takes half precision alone. Asked for
    that in fp32, torch falls back to the kernel that keeps S x S entries of each head for the backward pass: at 2,048 tokens
    more than all other activations of a layer. With the heads repeated it has one that keeps none.
    """
    shares_heads = sdpa_attention.use_gqa_in_sdpa
    if hasattr(shares_heads, "__wrapped__"):
        return

    @functools.wraps(shares_heads)
    def shares_heads_in_half_precision(attention_mask: Any, key: torch.Tensor, value: torch.Tensor) -> bool:
        is_flash = not key.is_cuda or key.dtype in (torch.float16, torch.bfloat16)
        return is_flash and shares_heads(attention_mask, key, value)

    sdpa_attention.use_gqa_in_sdpa = shares_heads_in_half_precision
