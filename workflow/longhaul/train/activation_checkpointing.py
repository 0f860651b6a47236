"""What a decoder layer keeps for its backward pass, and what it computes again there (`activation_checkpointing`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_DEAR = (
    "mm",
    "addmm",
    "_grouped_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
"""Operations whose results `selective` keeps: nearly all of a layer's FLOPs. bmm is not among them: where attention is done by
it, its results are the score matrices."""


def recompute_layers(model: Any, kind: str) -> None:
    """Has every decoder layer of a Hugging Face model keep no more than `kind` says; `none` leaves it as it is."""
    if kind != "none":
        model._set_gradient_checkpointing(gradient_checkpointing_func=_KINDS[kind])


def _keep_matmuls() -> Any:
    return create_selective_checkpoint_contexts([getattr(torch.ops.aten, name).default for name in _DEAR])


def _from_cpu(layer: Callable[..., Any], hidden: torch.Tensor, *others: Any) -> Any:
    """torch's own offload takes what the checkpoint saves of a layer, and that is its input alone: mask and rotary embedding,
    which all layers share, are bound in `layer`. Copies go through pinned memory, back without waiting."""
    with save_on_cpu(pin_memory=hidden.is_cuda):
        return checkpoint(layer, hidden, *others, use_reentrant=False)


_KINDS: dict[str, Callable[..., Any]] = {
    "selective": partial(checkpoint, use_reentrant=False, context_fn=_keep_matmuls),
    "full": partial(checkpoint, use_reentrant=False),
    "offload": _from_cpu,
}
