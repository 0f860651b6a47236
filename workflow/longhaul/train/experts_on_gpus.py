"""Computes the experts of a mixture on GPUs: sorts tokens by expert and sums their outputs without atomic additions.

transformers' grouped experts compute the same. But autograd turns the reading of rows there into additions at indices, for which
torch sorts the indices again. Here each row has one place, so the backward pass reads rows as well, and the compiler fuses the
reading with the arithmetic around it. No sum depends on the order of threads.

N tokens, K experts for each token, S = N · K rows, sorted by expert, E experts of this rank, H hidden width.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from longhaul.compat.transformers import apply_gate, grouped_linear
from longhaul.train.parallel.sliced_parameters import decoder_layers

_SUPPORTED = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}
"""Attributes of transformers' experts modules. Other experts, for example of remote code, keep their own forward pass."""


def use_experts_for_gpus(model: Any) -> None:
    """Replace the forward pass of all experts of a Hugging Face causal LM, before layers are compiled.

    With expert parallelism, a rank sorts its rows and sums the outputs in the same way.
    """
    for layer in decoder_layers(model):
        experts: Any = getattr(layer.mlp, "experts", None)
        computing = getattr(experts, "local", experts)
        if computing is None or any(getattr(computing, key, None) is not value for key, value in _SUPPORTED.items()):
            continue
        computing.forward = MethodType(_forward, computing)
        if experts is not computing:
            experts.sort_rows, experts.sum_outputs, experts.can_compile_parts = _sort_rows, _sum_outputs, True


def _forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the experts: hidden_states [N, H], index and weights [N, K] -> [N, H]."""
    rows_SH, rows_E, places = _sort_rows(hidden_states, top_k_index, experts.num_experts)
    ends_E = rows_E.cumsum(0, dtype=torch.int32)
    gated = apply_gate(experts, grouped_linear(rows_SH, experts.gate_up_proj, ends_E))
    outputs_SH = grouped_linear(gated, experts.down_proj, ends_E)
    return _sum_outputs(outputs_SH, top_k_weights, places).to(hidden_states.dtype)


_Places = tuple[torch.Tensor, torch.Tensor]
"""(index into the flattened [N, K] of every sorted row [S], row of every token and choice [N, K])."""


def _sort_rows(
    hidden_NH: torch.Tensor, chosen_NK: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, _Places]:
    """Return (rows [S, H], rows of each expert [E], places of the rows)."""
    order_S, place_NK = _sort_by_expert(chosen_NK, experts)
    rows_SH: Any = _ReadTokens.apply(hidden_NH, order_S, place_NK)
    return rows_SH, _rows_of_experts(chosen_NK, experts), (order_S, place_NK)


def _sum_outputs(outputs_SH: torch.Tensor, weights_NK: torch.Tensor, places: _Places) -> torch.Tensor:
    """Return the weighted sum of the experts' outputs for each token [N, H]."""
    summed_NH: Any = _SumOfExperts.apply(outputs_SH, weights_NK, *places)
    return summed_NH


def _sort_by_expert(chosen_NK: torch.Tensor, experts: int) -> _Places:
    # A sort takes time for each byte of its keys.
    keys_S = chosen_NK.flatten().to(torch.uint8 if experts <= 256 else torch.int64)
    order_S = keys_S.argsort(stable=True)
    place_S = torch.zeros_like(order_S).scatter(0, order_S, torch.arange(len(order_S), device=order_S.device))
    return order_S, place_S.view_as(chosen_NK)


def _rows_of_experts(chosen_NK: torch.Tensor, experts: int) -> torch.Tensor:
    """Return the number of rows of every expert [E]."""
    return (chosen_NK.flatten()[:, None] == torch.arange(experts, device=chosen_NK.device)).sum(0)


class _ReadTokens(torch.autograd.Function):
    """rows[s] = hidden[order[s] // K]; hidden [N, H] -> rows [S, H]."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor, order_S: torch.Tensor, place_NK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_NK)
        return hidden_NH[order_S // place_NK.shape[1]]

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        (place_NK,) = ctx.saved_tensors
        return slopes[0][place_NK].sum(1, dtype=torch.float32).to(slopes[0].dtype), None, None


class _SumOfExperts(torch.autograd.Function):
    """summed[n] = sum over k of weights[n, k] · outputs[place[n, k]]; outputs [S, H], weights [N, K] -> summed [N, H]."""

    @staticmethod
    def forward(
        ctx: Any, outputs_SH: torch.Tensor, weights_NK: torch.Tensor, order_S: torch.Tensor, place_NK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(outputs_SH, weights_NK, order_S, place_NK)
        return (outputs_SH[place_NK] * weights_NK[..., None]).sum(1)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        outputs_SH, weights_NK, order_S, place_NK = ctx.saved_tensors
        slopes_SH = slopes[0][order_S // place_NK.shape[1]]
        outputs_slopes_SH = slopes_SH * weights_NK.flatten()[order_S, None]
        weights_slopes_S = (slopes_SH.float() * outputs_SH.float()).sum(-1)
        weights_slopes_NK = weights_slopes_S[place_NK].to(weights_NK.dtype)
        return outputs_slopes_SH.to(outputs_SH.dtype), weights_slopes_NK, None, None
