"""The load of a mixture's experts, and DeepSeek-V3's load balancing without an auxiliary loss.

The router adds a bias to its scores. After every step the bias rises by a fixed amount for experts that got fewer tokens of
the global batch than the mean, and falls for those that got more (arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, 2.1.2).
Padding does not count.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from longhaul.compat.torch import is_in_backward_pass
from longhaul.train.parallel.padding_tokens import TextTokens
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.sliced_parameters import decoder_layers

Load = dict[str, list[int]]
"""Layer index -> tokens of the global batch for each expert."""


class ExpertLoad:
    """Counts the tokens of each expert in this rank's layers while the model trains.

    bias_rate: amount by which a bias changes in a step
    """

    def __init__(self, model: Any, dims: ParallelDims, bias_rate: float) -> None:
        self._dims, self._bias_rate = dims, bias_rate
        self._routers: dict[str, Any] = {}
        self._counts: dict[str, torch.Tensor] = {}
        for layer in decoder_layers(model):
            if hasattr(layer.mlp, "experts"):
                self._count_tokens_of(str(layer.self_attn.layer_idx), layer.mlp, TextTokens(layer))

    def _count_tokens_of(self, layer: str, mixture: Any, text: TextTokens) -> None:
        self._routers[layer] = mixture.gate
        experts = mixture.experts.num_experts

        def count(_module: Any, inputs: tuple[Any, ...]) -> None:
            # In a backward pass activation checkpointing recomputes the layer: that would count a token twice.
            if mixture.training and not is_in_backward_pass():
                chosen_NK = inputs[1]
                counts = torch.bincount(chosen_NK[text.mask(len(chosen_NK))].flatten(), minlength=experts)
                self._counts[layer] = self._counts.get(layer, 0) + counts

        mixture.experts.register_forward_pre_hook(count)

    def finish_step(self) -> Load:
        """Return the load of this rank's layers, summed over the data-parallel ranks, and update the biases."""
        loads = {}
        for layer, counts in self._counts.items():
            if self._dims.group("data") is not None:
                dist.all_reduce(counts, group=self._dims.group("data"))
            elif self._dims.world_size > 1:
                dist.all_reduce(counts)
            self._update_bias(self._routers[layer], counts)
            loads[layer] = counts.tolist()
        self._counts = {}
        return loads

    def discard_step(self) -> None:
        """Drop the counts of a bad step."""
        self._counts = {}

    def _update_bias(self, router: Any, counts: torch.Tensor) -> None:
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None and self._bias_rate:
            load = counts.float()
            bias.add_(torch.sign(load.mean() - load).to(bias.dtype), alpha=self._bias_rate)


def load_summary(loads: Load) -> dict[str, float]:
    """Return the highest and the lowest load of an expert in any layer, in multiples of the layer's mean."""
    if not loads:
        return {}
    extremes = [(max(load), min(load), sum(load) / len(load)) for load in loads.values()]
    return {
        "expert_load_max": round(max(high / mean for high, _, mean in extremes), 4),
        "expert_load_min": round(min(low / mean for _, low, mean in extremes), 4),
    }
