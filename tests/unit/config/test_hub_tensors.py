"""Names and shapes of stored tensors, compared with the models of transformers."""

from __future__ import annotations

from typing import Any

import pytest

from longhaul.config.hub_tensors import hub_tensors
from longhaul.config.pretrained_format import expert_keys
from tests.unit.config.test_model_size import MODELS, hugging_face_config

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in MODELS},
    "llama without biases": ("llama", {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "deepseek_v3 with biases": ("deepseek_v3", {"attention_bias": True}),
    "deepseek_v2 with a query rank": ("deepseek_v2", {"q_lora_rank": 24, "n_shared_experts": 2}),
    "qwen3_moe, every second layer": ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_tensors_equal_those_of_transformers(name: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, changes = VARIANTS[name]
    config = hugging_face_config(architecture, {**MODELS[architecture], **changes})
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
    expected: dict[str, tuple[int, ...]] = {}
    for key, tensor in model.state_dict().items():
        if keys := expert_keys(key, tuple(tensor.shape)):
            expected |= {one: _shape_of_one(one, tuple(tensor.shape)) for one in keys}
        elif not (key == "lm_head.weight" and config["tie_word_embeddings"]):
            expected[key] = tuple(tensor.shape)
    assert dict(hub_tensors(config)) == expected


def _shape_of_one(name: str, fused: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of one expert's matrix in a fused tensor [experts, rows, columns]; gate and up share their rows."""
    _, rows, columns = fused
    return (rows, columns) if name.endswith("down_proj.weight") else (rows // 2, columns)
