"""Computes the experts of a mixture on GPUs: sorts tokens by expert and sums their outputs without atomic additions.

transformers' grouped experts compute the same, but their backward pass sorts the rows again (parallel/token_dispatch.py).

N tokens, K experts for each token, S = N · K rows, sorted by expert, E experts of this rank, H hidden width.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from longhaul.compat.transformers import apply_gate, grouped_linear
from longhaul.train.parallel.sliced_parameters import decoder_layers
from longhaul.train.parallel.token_dispatch import count_choices, read_rows, sort_by_choice, sum_weighted_rows

_SUPPORTED = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}
"""Attributes of transformers' experts modules. Other experts, for example of remote code, keep their own forward pass."""


def use_experts_for_gpus(model: Any) -> None:
    """Replace the forward pass of all experts of a Hugging Face causal LM, before layers are compiled.

    Expert parallelism sorts the rows that it computes, and sums them, itself.
    """
    for layer in decoder_layers(model):
        experts: Any = getattr(layer.mlp, "experts", None)
        computing = getattr(experts, "local", experts)
        if computing is None or any(getattr(computing, key, None) is not value for key, value in _SUPPORTED.items()):
            continue
        computing.forward = MethodType(_forward if experts is computing else _forward_of_sorted_rows, computing)
        if experts is not computing:
            experts.can_compile_experts = True


def _forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the experts: hidden_states [N, H], index and weights [N, K] -> [N, H]."""
    places = sort_by_choice(top_k_index, experts.num_experts)
    rows_E = count_choices(top_k_index, experts.num_experts)
    outputs_SH = _compute_sorted_rows(experts, read_rows(hidden_states, places), rows_E)
    return sum_weighted_rows(outputs_SH, top_k_weights, places).to(hidden_states.dtype)


def _forward_of_sorted_rows(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute rows that are sorted by expert, and have one expert each with the weight 1: rows [S, H], index [S, 1] -> [S, H]."""
    return _compute_sorted_rows(experts, hidden_states, count_choices(top_k_index, experts.num_experts))


def _compute_sorted_rows(experts: Any, rows_SH: torch.Tensor, rows_E: torch.Tensor) -> torch.Tensor:
    """Return the outputs of the experts [S, H] for rows that are sorted by expert; `rows_E` counts those of each expert."""
    ends_E = rows_E.cumsum(0, dtype=torch.int32)
    gated = apply_gate(experts, grouped_linear(rows_SH, experts.gate_up_proj, ends_E))
    return grouped_linear(gated, experts.down_proj, ends_E)
