"""Private parts of transformers: fp32 tensors, tied weights, hub names, activation checkpointing, experts, shared heads in SDPA.
Written for transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel


def is_kept_in_fp32(model: PreTrainedModel, name: str) -> bool:
    """Return whether transformers keeps the tensor `name` in fp32 when it loads the model as bf16 or fp16.

    transformers has no public function for it. from_pretrained compares parts of the name with the
    model's private list. DeepSeek V3's list holds `e_score_correction_bias`.
    """
    return any(part in name for part in model._keep_in_fp32_modules_strict or ())


def without_tied_weights(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the entries of `state` that save_pretrained writes: of several names of one weight only the first.

    save_pretrained uses this function of modeling_utils, which is not documented.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    return remove_tied_weights_from_state_dict(dict(state), model)


def hub_tensors(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `state` with the names and shapes under which save_pretrained writes its tensors.

    save_pretrained uses this function of core_model_loading, which is not documented.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


def set_activation_checkpointing(model: PreTrainedModel, checkpoint: Callable[..., Any]) -> None:
    """Run every decoder layer's forward pass through `checkpoint(layer, hidden, …)`.

    Written for transformers 5.9 to 5.23. The public activation_checkpointing_enable accepts no function. Its `offload`, which
    the older versions do not have, always pins memory, also on a CPU. It also registers a hook that makes the embedding's
    output require a gradient, which only adapters need. Upstream: transformers issue 29648.
    """
    model._set_gradient_checkpointing(gradient_checkpointing_func=checkpoint)


def take_over_activation_checkpointing(layer: Any) -> Callable[..., Any] | None:
    """Make the forward pass of a decoder layer run without activation checkpointing. Return the function that checkpoints it.

    Written for transformers 5.9 to 5.23, whose layers call the checkpoint inside their forward pass, and torch 2.13. If
    torch.compile meets a checkpoint around a part that it must not capture, it computes the whole layer without compiled code,
    and says nothing. The caller can checkpoint the compiled layer instead.

    Returns:
        The `checkpoint` of `set_activation_checkpointing`; None if the layer has no activation checkpointing.

    Upstream: PyTorch issue 139989; pull request 193143 exchanges compiler and checkpoint in the same way, after torch 2.13.
    """
    if not layer.gradient_checkpointing:
        return None
    layer.gradient_checkpointing = False
    return layer._gradient_checkpointing_func


@contextmanager
def known_documents(have_several: bool | None) -> Iterator[None]:
    """Tell transformers whether rows of a batch hold several documents. None lets it ask the tensor of position ids.

    Written for transformers 5.9 to 5.23, which asks in each forward pass. If the tensor is on a GPU, the CPU waits until the GPU
    has computed all that is in its queue, and the GPU then waits for the CPU. This function of masking_utils is not documented,
    and no argument of a model replaces it.

    Upstream: no issue is known; a comment of transformers calls the dynamic control flow sad.
    """
    from transformers import masking_utils

    if have_several is None:
        yield
        return
    usual = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = document_numbers if have_several else lambda _position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = usual


def document_numbers(position_ids_BS: torch.Tensor) -> torch.Tensor:
    """Return the number of each token's document, counted from 0 in each row: [B, S]. Position ids restart at each document."""
    return (position_ids_BS.diff(dim=1, prepend=position_ids_BS[:, :1] - 1) != 1).cumsum(1)


def grouped_linear(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the product of each group of rows with the transposed matrix of its group, with one kernel where torch has one.

    torch's grouped_mm does not accept every precision and card. This function of
    transformers.integrations.moe, which is not documented, knows which, and falls back to a loop that torch.compile can capture.

    rows:    [S, input], sorted by group
    weights: [E, output, input]
    ends:    [E] in int32, the row behind the last one of each group
    """
    from transformers.integrations.moe import _grouped_linear

    return _grouped_linear(rows, weights, ends)


def apply_gate(experts: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
    """Return the gated activation of experts: [S, 2 · inner] -> [S, inner]. `grouped_linear` has no public form, nor has this."""
    return experts._apply_gate(gate_and_up)


def take_over_shared_experts(mixture: Any) -> torch.nn.Module | None:
    """Make the forward pass of a mixture leave out its shared experts, and return them: the routed experts must add them.

    Written for transformers 5.9 to 5.23, which computes the shared experts after the routed ones. With expert parallelism, they
    can be computed while tokens are exchanged.

    Returns:
        None, without any change, if the mixture is not that of DeepSeek V2 or V3.
    """
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    if not isinstance(mixture, DeepseekV2Moe | DeepseekV3MoE):
        return None
    mixture.forward = MethodType(_forward_without_shared_experts, mixture)
    return mixture.shared_experts


def _forward_without_shared_experts(mixture: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    _, weights, index = mixture.gate(hidden_states)
    return mixture.experts(hidden_states.flatten(0, -2), index, weights).view_as(hidden_states)


def repeat_shared_heads_in_fp32() -> None:
    """Make transformers repeat shared key and value heads on GPUs in fp32, as it does wherever there is a mask.

    Written for transformers 5.9 to 5.23 and torch 2.13. Of torch's attention kernels only flash attention reads shared heads in
    place, and it accepts half precision alone. For shared heads in fp32, torch uses the kernel that keeps S x S entries of each
    head for the backward pass: at 2,048 tokens more than all other activations of a layer. With repeated heads it uses one that
    keeps none. A second call changes nothing.

    Upstream: transformers issue 48633 is about the same choice on older GPUs; about fp32 no issue is known.
    """
    from transformers.integrations import sdpa_attention

    shares_heads = sdpa_attention.use_gqa_in_sdpa
    if hasattr(shares_heads, "__wrapped__"):
        return

    @wraps(shares_heads)
    def shares_heads_in_half_precision(
        attention_mask: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor
    ) -> bool:
        flash_is_possible = not key.is_cuda or key.dtype in (torch.float16, torch.bfloat16)
        return flash_is_possible and shares_heads(attention_mask, key, value)

    sdpa_attention.use_gqa_in_sdpa = shares_heads_in_half_precision
