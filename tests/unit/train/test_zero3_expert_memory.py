"""Experts whose weights are somewhere else in the backward pass than they were in the forward pass, as ZeRO-3 has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.train.zero3_expert_memory import release_expert_weights
from tests.parity.parity_cases import MODELS


def twin(name: str) -> Any:
    (kind, keys), *_ = MODELS[name].items()
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys), dtype=torch.float32).train()


def experts_of(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def gather_anew(experts: Any) -> None:
    """Both weights in another storage; nothing that is read where they were can go unseen."""
    weights = list(experts.parameters())
    together = torch.cat([weight.data.flatten() for weight in weights])
    for weight in weights:
        old, place = weight.data, together[: weight.numel()]
        together = together[weight.numel() :]
        weight.data = place.view(weight.shape)
        old.fill_(float("nan"))


def gradients(model: Any, moves: bool) -> dict[str, torch.Tensor]:
    loss = model(input_ids=torch.arange(2, 34).view(2, 16)).logits.logsumexp(-1).mean()
    if moves:
        for experts in experts_of(model):
            gather_anew(experts)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_the_backward_pass_reads_the_weights_that_were_gathered_for_it(name: str):
    wanted = gradients(twin(name), moves=False)
    model = twin(name)
    for experts in experts_of(model):
        gather_anew(experts)  # as in training: both lie in one storage
    release_expert_weights(model)
    found = gradients(model, moves=True)
    assert set(found) == set(wanted) and len(found) > 20
    for parameter, gradient in wanted.items():
        assert torch.equal(found[parameter], gradient), parameter


def test_autograd_alone_would_hold_them():
    assert not all(gradient.isfinite().all() for gradient in gradients(twin("qwen3_moe"), moves=True).values())
