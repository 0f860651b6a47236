"""The experts that train on GPUs, computed on a CPU: values, gradients and graphs equal those of transformers' experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.train.activation_checkpointing import apply_activation_checkpointing
from longhaul.train.compile_layers import compile_layers
from longhaul.train.experts_on_gpus import use_experts_for_gpus
from longhaul.train.free_gathered_experts import release_expert_weights
from tests.parity.parity_cases import MODELS

pytestmark = pytest.mark.usefixtures("dynamo")


def build(name: str) -> Any:
    (kind, keys), *_ = MODELS[name].items()
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys, use_cache=False), dtype=torch.float32)


def mixtures_of(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()(input_ids=torch.arange(2, 34).view(2, 16)).logits.logsumexp(-1).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_the_gradients_are_those_of_transformers_and_layers_are_captured(name: str, checkpointing: str, dynamo: Any):
    plain, captured = build(name), build(name)
    expected = gradients(plain)
    apply_activation_checkpointing(captured, checkpointing)
    use_experts_for_gpus(captured)
    compile_layers(captured, "aot_eager")
    found = gradients(captured)
    assert found.keys() == expected.keys() and any("experts.down_proj" in key for key in found)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=key)
    assert dynamo["stats"]["unique_graphs"] == (2 if name == "deepseek_v3" else 1)


def test_each_expert_may_get_all_rows_or_none():
    mixture, expected_mixture = (mixtures_of(build("qwen3_moe"))[0] for _ in range(2))
    use_experts_for_gpus(_ModelOf(mixture))
    hidden_NH = torch.randn(5, mixture.experts.hidden_dim)
    for chosen in ([[2]] * 5, [[3], [0], [3], [0], [3]], [[0, 3], [1, 2], [3, 0], [0, 3], [0, 1]]):
        chosen_NK = torch.tensor(chosen)
        results = []
        for experts in (mixture.experts, expected_mixture.experts):
            inputs = (hidden_NH.clone().requires_grad_(), torch.rand(chosen_NK.shape).mul(0).add(0.3).requires_grad_())
            output = experts(inputs[0], chosen_NK, inputs[1])
            output.square().sum().backward()
            results.append([output, inputs[0].grad, inputs[1].grad])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_experts_have_one_graph_for_any_number_of_rows(dynamo: Any):
    """Expert parallelism receives another number in each step, and sorts them by expert."""
    experts = mixtures_of(build("qwen3_moe"))[0].experts
    parallel: Any = torch.nn.Module()
    parallel.local = experts
    use_experts_for_gpus(_ModelOf(_mixture_with(parallel)))
    captured = torch.compile(experts.forward, backend="aot_eager", dynamic=True)
    for rows in (7, 52, 2):
        hidden_NH, chosen_N1 = (
            torch.randn(rows, experts.hidden_dim),
            (torch.arange(rows) % experts.num_experts).sort().values[:, None],
        )
        inputs: list[Any] = [hidden_NH.clone().requires_grad_() for _ in range(2)]
        for compute, input_NH in zip((captured, experts.forward), inputs, strict=True):
            compute(input_NH, chosen_N1, torch.ones(rows, 1)).square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad) and inputs[0].grad.any()
    assert dynamo["stats"]["unique_graphs"] == 1 and not dynamo["graph_break"]
    assert parallel.can_compile_experts


def test_zero_3_keeps_no_view_of_the_weights():
    expected, found = build("qwen3_moe"), build("qwen3_moe")
    for model in (expected, found):
        use_experts_for_gpus(model)
    release_expert_weights(found)
    expected_gradients, found_gradients = gradients(expected), gradients(found)
    assert all(torch.equal(found_gradients[key], gradient) for key, gradient in expected_gradients.items())


def test_other_experts_keep_their_forward_pass():
    model = build("qwen3_moe")
    for mixture in mixtures_of(model):
        mixture.experts.has_bias = True
    use_experts_for_gpus(model)
    use_experts_for_gpus(build("llama"))
    assert not any("forward" in vars(mixture.experts) for mixture in mixtures_of(model))


def _mixture_with(experts: torch.nn.Module) -> torch.nn.Module:
    mixture = torch.nn.Module()
    mixture.experts = experts
    return mixture


class _ModelOf(torch.nn.Module):
    """A model of one layer, whose feed-forward part is `mixture`."""

    def __init__(self, mixture: Any) -> None:
        super().__init__()
        layer = torch.nn.Module()
        layer.mlp = mixture
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([layer])
