"""Sizes of models, compared with transformers, with published numbers and with numbers computed by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longhaul.config.architectures import Model
from longhaul.config.load_config import load_config
from longhaul.config.model_size import model_size
from longhaul.planning import build_plan
from tests.support.pipeline_run import REPOSITORY
from tests.support.tiny_model_sizes import TINY_QWEN3_MOE, tiny_size

SHARED = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LATENT = {
    **SHARED,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SHARED, "mlp_bias": True, "attention_bias": True},
    "qwen2": {**SHARED, "tie_word_embeddings": True},
    "qwen3": {**SHARED, "head_dim": 16},
    "qwen3_moe": {
        **SHARED,
        "head_dim": 24,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0],
    },
    "deepseek_v2": {**LATENT, "q_lora_rank": None},
    "deepseek_v3": {**LATENT, "q_lora_rank": 24, "n_group": 2, "topk_group": 1},
}


def hugging_face_config(architecture: str, sizes: dict[str, Any]) -> dict[str, Any]:
    return Model.model_validate_json(json.dumps({architecture: sizes})).config_dict()


@pytest.mark.parametrize("architecture", MODELS)
def test_parameter_counts_equal_those_of_transformers(architecture: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = hugging_face_config(architecture, MODELS[architecture])
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert (model_size(config).total, model_size(config).largest_tensor) == (sum(sizes), max(sizes))


@pytest.mark.parametrize("architecture", MODELS)
def test_keys_and_defaults_equal_those_of_transformers(architecture: str):
    """A config from a model card must be accepted, and must mean the same."""
    from transformers import AutoConfig

    sizes = {key: value for key, value in MODELS[architecture].items() if key not in ("mlp_bias", "attention_bias")}
    ours = hugging_face_config(architecture, sizes)
    theirs = AutoConfig.for_model(architecture, **sizes).to_dict()
    # Qwen3-MoE's attention reads head_dim, which its config class does not list. The number of experts has two names.
    theirs.setdefault("head_dim", ours.get("head_dim"))
    theirs.setdefault("num_experts", theirs.get("num_local_experts"))
    assert {key: theirs.get(key, "no key of transformers") for key in ours} == ours


def test_deepseek_v3_has_the_published_size():
    """671 B parameters, 37 B active: arXiv:2412.19437, section 4.2."""
    plan = build_plan(load_config(REPOSITORY / "config" / "examples" / "deepseek-v3-671b.yaml"))
    sizes = model_size(plan.config.model.config_dict())
    assert sizes.total == pytest.approx(671e9, rel=1e-3)
    assert sizes.active == pytest.approx(37e9, rel=2e-2)


def test_sizes_of_a_tiny_dense_model_equal_hand_computed_numbers():
    sizes = tiny_size()
    assert (sizes.total, sizes.active, sizes.embedding, sizes.outside_layers) == (1352, 80 + 8 + 2 * 592, 80, 168)
    assert (sizes.dense_layer, sizes.largest_layer, sizes.unsplit_per_layer, sizes.largest_tensor) == (
        592,
        592,
        16,
        128,
    )
    assert (sizes.routed_experts, sizes.is_sparse, sizes.positions) == (0, (False, False), 64)
    assert (sizes.saved_activations, sizes.unsplit_activations, sizes.repeated_key_values) == (24 + 4 * 16, 2 * 8, 8)
    assert (sizes.normed_elements, sizes.matmul_results, sizes.attention_width) == (16, 24 + 32, 16)
    assert sizes.flops_per_token(sequence_length=10) == 6 * 1272 + 6 * 2 * 16 * 5.5


def test_flops_equal_a_hand_count_of_all_matrices():
    """A token takes 6 FLOPs per element of each matrix and norm it passes, a pair 6 per layer and attention width."""
    head, norms = 8 * 10, 2 * 2 * 8 + 8
    mlp, grouped, all_heads = 3 * 8 * 16, 2 * 8 * 8 + 2 * 8 * 4, 4 * 8 * 8
    expected = 6 * (2 * (grouped + mlp) + head + norms) * 100 + 6 * 2 * (2 * 2 * 4) * 700
    assert tiny_size().training_flops(tokens=100, attention_pairs=700) == expected
    expected = 6 * (2 * (all_heads + mlp) + head + norms) * 100 + 6 * 2 * (2 * 2 * 4) * 700
    assert tiny_size(num_key_value_heads=2).training_flops(100, 700) == expected
    # Two of four experts of width 4, the router, and norms of q and k of head width 4.
    experts = 8 * 4 + 2 * 3 * 8 * 4
    expected = 6 * (2 * (grouped + 2 * 4 + experts) + head + norms) * 100 + 6 * 2 * (2 * 2 * 4) * 700
    assert model_size(TINY_QWEN3_MOE).training_flops(100, 700) == expected


def test_flops_of_latent_attention_equal_a_hand_count():
    """Three layers of width 64 with four heads of 16 + 8 for keys and 16 for values; the first one is dense."""
    queries = 64 * 24 + 24 * 4 * (16 + 8)
    keys_and_values = 64 * (16 + 8) + 16 * 4 * (16 + 16)
    attention = queries + keys_and_values + 4 * 16 * 64 + (24 + 16)  # with the norms of both compressions
    sparse = 64 * 8 + (2 + 1) * 3 * 64 * 32  # router, two routed experts and the shared one
    active = 400 * 64 + 64 + 3 * (attention + 2 * 64) + 3 * 64 * 96 + 2 * sparse
    expected = 6 * active * 10 + 6 * 3 * 4 * (16 + 8 + 16) * 55
    sizes = model_size(hugging_face_config("deepseek_v3", MODELS["deepseek_v3"]))
    assert sizes.training_flops(10, 55) == expected
    # The compressions of queries, of keys and values, and its rotary part; outputs of two experts.
    assert sizes.unsplit_matmul_results == (24 + 16 + 8) + 2 * 64


def test_sizes_of_a_tiny_mixture_equal_hand_computed_numbers():
    sizes = model_size(TINY_QWEN3_MOE)
    assert (sizes.total, sizes.active) == (168 + 2 * (248 + 384), 88 + 2 * (248 + 384 // 2))
    assert (sizes.routed_experts, sizes.routed_experts_per_layer, sizes.sparse_layer) == (768, 384, 248)
    assert (sizes.largest_layer, sizes.unsplit_per_layer, sizes.is_sparse) == (632, 16 + 32, (True, True))
    # attention 24, norm outputs and the inputs and outputs of two experts (2 + 4)·8, two experts of width 4
    assert (sizes.saved_activations, sizes.unsplit_activations) == (24 + 4 * 8, 6 * 8)
    assert (sizes.matmul_results, sizes.unsplit_matmul_results, sizes.mlp_width) == (24 + 2 * 8, 2 * 8, 8)
    assert sizes.normed_elements == 2 * 8 + 3 * 4
