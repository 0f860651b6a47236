"""The experts that train on GPUs, compared with transformers' grouped experts, compiled, with kernels of the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.train.compile_layers import compile_layers
from longhaul.train.experts_on_gpus import use_experts_for_gpus
from tests.gpu.runs_on_gpus import GPUS
from tests.parity.parity_cases import MODELS

pytestmark = pytest.mark.skipif(not GPUS, reason="needs a GPU")
BOUNDS = {torch.float32: 2e-4, torch.bfloat16: 0.2}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_gradients_are_those_of_transformers(name: str, dtype: torch.dtype):
    expected, found = gradients(name, dtype, is_own=False), gradients(name, dtype, is_own=True)
    again = gradients(name, dtype, is_own=True)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.equal(found[key], again[key]), "no sum depends on the order of threads"
        differs = (found[key] - gradient).norm() / gradient.norm()
        assert differs <= BOUNDS[dtype], (key, differs)


def gradients(name: str, dtype: torch.dtype, is_own: bool) -> dict[str, torch.Tensor]:
    (kind, keys), *_ = MODELS[name].items()
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **keys, use_cache=False)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to("cuda", dtype).train()
    if is_own:
        use_experts_for_gpus(model)
        compile_layers(model)
    ids = torch.randint(config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(2)).cuda()
    model(input_ids=ids).logits.float().logsumexp(-1).mean().backward()
    return {key: parameter.grad.float() for key, parameter in model.named_parameters() if parameter.grad is not None}
