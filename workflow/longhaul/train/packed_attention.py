"""Attention inside packs on GPUs: compiled layers compute only the blocks of tokens in which a document attends to itself.

A pack has several documents in one sample, and its mask has S x S entries. torch's kernels with such a mask compute all of them.
FlexAttention (Dong et al., arXiv:2412.05496) skips blocks of 128 x 128 tokens without a pair, and keeps no mask.

It is compiled with the layer. Passes that are not compiled (validation, reference values), and samples that are one document,
use torch's own kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface

from longhaul.config.model_size import ModelSize
from longhaul.config.stage_config import Stage
from longhaul.planning.choose_packed_attention import skips_pairs_on_gpus

ATTENTION = "longhaul_packs"


def can_skip_pairs(stage: Stage, sizes: ModelSize, model: Any) -> bool:
    """Return whether FlexAttention computes this model's attention inside packs; else a mask separates documents.

    Models of remote code may compute attention in a way of their own.
    """
    return skips_pairs_on_gpus(stage, sizes) and type(model).__module__.startswith("transformers.")


def use_packed_attention(model: Any) -> None:
    """Let a Hugging Face causal LM with compiled layers skip pairs of tokens of different documents."""
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, _build_mask)
    model.set_attn_implementation(ATTENTION)


def _build_mask(*, allow_is_causal_skip: bool = True, **shape: Any) -> object:
    """Return a BlockMask for packs in passes with gradients, else what `sdpa` gets.

    allow_is_causal_skip: transformers sets it to False where a sample has several documents
    """
    masks = AttentionMaskInterface()
    if torch.is_grad_enabled() and not allow_is_causal_skip:
        return masks["flex_attention"](**shape)
    return masks["sdpa"](allow_is_causal_skip=allow_is_causal_skip, **shape)


def _attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **options: Any
) -> Any:
    """Compute attention of query, key and value [B, heads, S, D] with the kernel for this mask."""
    kind = "flex_attention" if isinstance(mask, BlockMask) else "sdpa"
    return AttentionInterface()[kind](module, query, key, value, mask, **options)
