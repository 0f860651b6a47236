"""Experts whose weights lie elsewhere in the backward pass than in the forward pass, as under ZeRO 3."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.train.free_gathered_experts import release_expert_weights
from tests.parity.parity_cases import MODELS


def build(name: str) -> Any:
    (kind, keys), *_ = MODELS[name].items()
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys), dtype=torch.float32).train()


def experts_of(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def gather_again(experts: Any) -> None:
    """Move both weights to another storage, and fill the old one with NaN, so that a read of it shows."""
    weights = list(experts.parameters())
    together = torch.cat([weight.data.flatten() for weight in weights])
    for weight in weights:
        old, place = weight.data, together[: weight.numel()]
        together = together[weight.numel() :]
        weight.data = place.view(weight.shape)
        old.fill_(float("nan"))


def gradients(model: Any, moves_weights: bool) -> dict[str, torch.Tensor]:
    loss = model(input_ids=torch.arange(2, 34).view(2, 16)).logits.logsumexp(-1).mean()
    if moves_weights:
        for experts in experts_of(model):
            gather_again(experts)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_the_backward_pass_reads_the_weights_gathered_for_it(name: str):
    expected = gradients(build(name), moves_weights=False)
    model = build(name)
    for experts in experts_of(model):
        gather_again(experts)  # as in training: both weights lie in one storage
    release_expert_weights(model)
    found = gradients(model, moves_weights=True)
    assert set(found) == set(expected) and len(found) > 20
    for parameter, gradient in expected.items():
        assert torch.equal(found[parameter], gradient), parameter


def test_autograd_alone_still_keeps_the_weights_of_the_forward_pass():
    """release_expert_weights is still needed."""
    assert not all(gradient.isfinite().all() for gradient in gradients(build("qwen3_moe"), moves_weights=True).values())
