"""The load of experts counts text alone, and the biases follow it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longhaul.config.stage_config import Parallel
from longhaul.train.parallel.expert_load_balancing import ExpertLoad, load_summary
from longhaul.train.parallel.parallel_dims import ParallelDims

CHOSEN_NK = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 2], [3, 2], [3, 2]])
POSITIONS = {"pack": torch.tensor([[0, 1, 2], [0, -2, -1]]), "window": torch.tensor([[0, 1, 2], [-4, -3, -2]])}
"""Positions in two sequences of three tokens; the last two tokens are padding, of a pack or of a dataset's last window."""


class Experts(torch.nn.Module):
    """Experts without weights."""

    num_experts = 4

    def forward(self, hidden: torch.Tensor, _chosen: torch.Tensor, _weights: torch.Tensor) -> torch.Tensor:
        return hidden


class Mixture(torch.nn.Module):
    """A mixture whose router always chooses CHOSEN_NK."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate = Experts(), torch.nn.Module()
        self.gate.e_score_correction_bias = torch.zeros(4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.experts(hidden, CHOSEN_NK, torch.ones(6, 2))


class Attention(torch.nn.Module):
    """Attention that is not called, of the layer with this index."""

    layer_idx = 5


class Layer(torch.nn.Module):
    """A decoder layer that is only a mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mixture()

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden)


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_padding_is_no_load_and_moves_no_bias(positions: torch.Tensor):
    layer = Layer()
    model: Any = SimpleNamespace(model=SimpleNamespace(layers=[layer]))
    stage: Any = SimpleNamespace(sequence_length=3, router_bias_update_rate=0.5)
    load = ExpertLoad(model, ParallelDims(0, 1, Parallel()), stage, device=torch.device("cpu"))
    layer(torch.zeros(6), position_ids=positions)
    loads = {layer: counts.tolist() for layer, counts in load.finish_step(torch.ones(())).items()}
    assert loads == {"5": [3, 2, 2, 1]}, "four tokens use two experts each"
    assert load_summary(loads) == {"expert_load_max": 1.5, "expert_load_min": 0.5}
    assert layer.mlp.gate.e_score_correction_bias.tolist() == [-0.5, 0.0, 0.0, 0.5]
    layer.eval()
    layer(torch.zeros(6), position_ids=positions)
    assert not any(counts.any() for counts in load.finish_step(torch.ones(())).values()), "validation counts nothing"
