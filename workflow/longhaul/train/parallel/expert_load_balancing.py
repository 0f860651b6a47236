"""Counts tokens per expert, and moves the router's bias after each step (router_bias_update_rate, no auxiliary loss).

The router adds a bias to its scores. After every step the bias rises by a fixed amount for experts that got fewer tokens of
the global batch than the mean, and falls for those that got more (arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, 2.1.2).
Padding does not count.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from longhaul.config.stage_config import Stage
from longhaul.train.parallel.count_once_per_forward_pass import record_in_forward_pass
from longhaul.train.parallel.padding_tokens import TextTokens
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.sliced_parameters import decoder_layers

Load = dict[str, list[int]]
"""Layer index -> tokens of the global batch for each expert."""


class ExpertLoad:
    """Counts the tokens of each expert in this rank's layers while the model trains.

    stage:  its sequence length, and the amount by which a bias changes in a step
    device: of the counts
    """

    def __init__(self, model: Any, dims: ParallelDims, stage: Stage, device: torch.device) -> None:
        self._dims, self._bias_rate, self._device = dims, stage.router_bias_update_rate, device
        self._routers: dict[str, torch.nn.Module] = {}
        self._counts: dict[str, torch.Tensor] = {}
        for layer in decoder_layers(model):
            if hasattr(layer.mlp, "experts"):
                self._count_tokens_of(
                    str(layer.self_attn.layer_idx), layer.mlp, TextTokens(layer, stage.sequence_length)
                )

    def _count_tokens_of(self, layer: str, mixture: Any, text: TextTokens) -> None:
        self._routers[layer] = mixture.gate
        counts_E = torch.zeros(mixture.experts.num_experts, dtype=torch.int64, device=self._device)
        self._counts[layer] = counts_E

        def count(experts: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            hidden, chosen_NK, weights = inputs
            if not experts.training:
                return None
            is_text_NK = text.mask(len(chosen_NK))[:, None].expand_as(chosen_NK)
            amount_E = torch.zeros_like(counts_E).scatter_add(0, chosen_NK.flatten(), is_text_NK.flatten().long())
            return hidden, record_in_forward_pass(chosen_NK, amount_E, counts_E), weights

        mixture.experts.register_forward_pre_hook(count)

    def finish_step(self, is_good: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the load of this rank's layers, summed over the data-parallel ranks, and update the biases.

        is_good: 0 where the step was bad, which leaves the biases as they are, else 1; a scalar that need not be on the CPU
        """
        loads = {}
        for layer, counts in self._counts.items():
            load = counts.clone()
            counts.zero_()
            if self._dims.group("data") is not None:
                dist.all_reduce(load, group=self._dims.group("data"))
            elif self._dims.world_size > 1:
                dist.all_reduce(load)
            self._update_bias(self._routers[layer], load, is_good)
            loads[layer] = load
        return loads

    def _update_bias(self, router: torch.nn.Module, counts: torch.Tensor, is_good: torch.Tensor) -> None:
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is None or not self._bias_rate:
            return
        load = counts.float()
        direction = torch.sign(load.mean() - load)
        bias.add_((direction * is_good).to(bias.dtype), alpha=self._bias_rate)


def load_summary(loads: Load) -> dict[str, float]:
    """Return the highest and the lowest load of an expert in any layer, in multiples of the layer's mean."""
    if not loads:
        return {}
    extremes = [(max(load), min(load), sum(load) / len(load)) for load in loads.values()]
    return {
        "expert_load_max": round(max(high / mean for high, _, mean in extremes), 4),
        "expert_load_min": round(min(low / mean for _, low, mean in extremes), 4),
    }
