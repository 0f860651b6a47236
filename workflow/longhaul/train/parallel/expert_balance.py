"""How evenly a mixture's experts are used, and DeepSeek-V3's balancing without an auxiliary loss.

After every step the bias that is added to the routing scores rises for experts that got fewer tokens of the global batch
than the mean and falls for those that got more, by a fixed amount (arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, 2.1.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.tensor_slices import decoder_layers

Load = dict[str, list[int]]


class ExpertLoad:
    """Counts the tokens that each expert of this rank's layers gets while the model trains."""

    def __init__(self, model: Any, dims: ParallelDims, bias_rate: float) -> None:
        self._grid, self._bias_rate = dims, bias_rate
        self._routers: dict[str, Any] = {}
        self._counts: dict[str, torch.Tensor] = {}
        for layer in decoder_layers(model):
            if hasattr(layer.mlp, "experts"):
                self._watch(str(layer.self_attn.layer_idx), layer.mlp)

    def _watch(self, layer: str, mixture: Any) -> None:
        self._routers[layer] = mixture.gate
        experts = mixture.experts.num_experts

        def count(_module: Any, inputs: tuple[Any, ...]) -> None:
            # Recomputation inside a backward pass would count a token twice.
            if mixture.training and torch._C._current_graph_task_id() == -1:
                found = torch.bincount(inputs[1].flatten(), minlength=experts)
                self._counts[layer] = self._counts.get(layer, 0) + found

        mixture.experts.register_forward_pre_hook(count)

    def finish_step(self) -> Load:
        """Tokens per expert of the global batch, layer -> counts, for this rank's layers; moves the biases."""
        loads = {}
        for layer, counts in self._counts.items():
            if self._grid.group("data") is not None:
                dist.all_reduce(counts, group=self._grid.group("data"))
            elif self._grid.world_size > 1:
                dist.all_reduce(counts)
            self._balance(self._routers[layer], counts)
            loads[layer] = counts.tolist()
        self._counts = {}
        return loads

    def discard_step(self) -> None:
        """Forgets the counts of a step that was refused."""
        self._counts = {}

    def _balance(self, router: Any, counts: torch.Tensor) -> None:
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None and self._bias_rate:
            load = counts.float()
            bias.add_(torch.sign(load.mean() - load).to(bias.dtype), alpha=self._bias_rate)


def load_summary(loads: Load) -> dict[str, float]:
    """The busiest and the idlest expert of any layer, as multiples of the mean load."""
    if not loads:
        return {}
    shares = [(max(load), min(load), sum(load) / len(load)) for load in loads.values()]
    return {
        "expert_load_max": round(max(high / mean for high, _, mean in shares), 4),
        "expert_load_min": round(min(low / mean for _, low, mean in shares), 4),
    }
