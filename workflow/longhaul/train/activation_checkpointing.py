"""Sets which activations a decoder layer keeps or recomputes: none, selective, full, offload."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from longhaul.compat.torch import matmul_and_attention_ops
from longhaul.compat.transformers import set_activation_checkpointing


def apply_activation_checkpointing(model: PreTrainedModel, kind: str) -> None:
    """Set what every decoder layer of a Hugging Face model keeps.

    kind: a value of the config key `activation_checkpointing`. `none` leaves the model as it is, `selective` keeps the results of
    matrix products and attention, `full` only the layer's input, `offload` the same in CPU memory.
    """
    if kind != "none":
        set_activation_checkpointing(model, _CHECKPOINT_FUNCTIONS[kind])


def _keep_expensive_results() -> Any:
    """Keep the results of nearly all of a layer's FLOPs.

    bmm is not among them: where attention runs through bmm, its results are the S x S score matrices.
    """
    return create_selective_checkpoint_contexts(matmul_and_attention_ops())


def _checkpoint_on_cpu(layer: Callable[..., object], hidden: torch.Tensor, *others: object) -> object:
    """Run a layer and keep its input in CPU memory.

    `save_on_cpu` moves what the checkpoint saves of a layer, which is its input alone: mask and rotary embedding, which all
    layers share, are bound in `layer`. Copies go through pinned memory; the copies back do not block.
    """
    with save_on_cpu(pin_memory=hidden.is_cuda):
        return checkpoint(layer, hidden, *others, use_reentrant=False)


_CHECKPOINT_FUNCTIONS: dict[str, Callable[..., object]] = {
    "selective": partial(checkpoint, use_reentrant=False, context_fn=_keep_expensive_results),
    "full": partial(checkpoint, use_reentrant=False),
    "offload": _checkpoint_on_cpu,
}
