"""Bytes of a served model, against counts by hand: dense, grouped-query and latent attention, experts, FP8, pipeline ranks."""

from __future__ import annotations

import math

import pytest

from longhaul.config.hub_tensors import hub_tensors
from longhaul.config.well_known_models import REFERENCE_MODELS
from longhaul.planning.serving_memory import ServedModel, ServingLayout, ServingMemory, _layer_ranges
from tests.support.small_configs import DEEPSEEK, LLAMA

SMALL_LLAMA = {"model_type": "llama", **LLAMA}
SMALL_DEEPSEEK = {"model_type": "deepseek_v3", **DEEPSEEK}
R1 = REFERENCE_MODELS["DeepSeek-R1"]


def _memory(config: dict[str, object], dtype: str, tensor: int = 1, pipeline: int = 1) -> ServingMemory:
    layout = ServingLayout(nodes=1, gpus_per_node=tensor * pipeline, tensor=tensor, pipeline=pipeline)
    return ServedModel(config, dtype).memory(layout)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("tensor", "elements"),
    [
        # Embedding and head 2 x 25600; per layer q, o 2 x 4096, k, v 2 x 2048, MLP 3 x 8192; 5 norms of 64.
        (1, 51200 + 2 * (8192 + 4096 + 24576) + 320),
        (2, (51200 + 2 * (8192 + 24576)) // 2 + 2 * 4096 // 2 + 320),
        # 2 key and value heads: 4 ranks hold them twice.
        (4, (51200 + 2 * (8192 + 24576)) // 4 + 2 * 4096 // 2 + 320),
    ],
)
def test_tensor_ranks_of_a_dense_model_share_matrices_and_keep_vectors(tensor: int, elements: int):
    assert _memory(SMALL_LLAMA, "bf16", tensor).weights == 2 * elements
    assert _memory(SMALL_LLAMA, "fp32", tensor).weights == 4 * elements


def test_the_last_pipeline_rank_has_the_head_and_the_last_norm():
    layer = 8192 + 4096 + 24576 + 2 * 64
    assert _memory(SMALL_LLAMA, "bf16", pipeline=2).weights == 2 * (25600 + layer + 64)


def test_a_tied_head_counts_once_on_one_rank_and_as_a_copy_on_another_one():
    tied = {**SMALL_LLAMA, "tie_word_embeddings": True}
    assert _memory(SMALL_LLAMA, "bf16").weights - _memory(tied, "bf16").weights == 2 * 25600
    assert _memory(tied, "bf16", pipeline=2).weights == _memory(SMALL_LLAMA, "bf16", pipeline=2).weights


def test_fp8_takes_a_byte_per_element_of_layer_matrices_and_4_per_block():
    config = SMALL_LLAMA | {
        "vocab_size": 500,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    matrices = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 384 * 256
    blocks = 2 * 2 * 2 + 2 * 1 * 2 + 3 * 3 * 2
    in_bf16 = 2 * 500 * 256 + 3 * 256
    assert _memory(config, "fp8").weights == matrices + 4 * blocks + 2 * in_bf16


def test_experts_are_shared_and_latent_projections_and_routers_are_not():
    """One dense and one sparse layer: 4 routed experts and a shared one, q without compression."""
    outer, norms = 2 * 400 * 64, 64 + 2 * (2 * 64 + 32)
    attention = 4 * 24 * 64 + 4 * 32 * 32 + 64 * 64  # q, kv_b, o
    whole = 2 * (32 + 8) * 64 + 4 * 64 + 4 + norms  # kv_a of both layers, router and its bias
    shared = outer + 2 * attention + 3 * 128 * 64 + 5 * 3 * 32 * 64
    assert _memory(SMALL_DEEPSEEK, "bf16").weights == 2 * (shared + whole)
    assert _memory(SMALL_DEEPSEEK, "bf16", tensor=4).weights == 2 * (shared // 4 + whole)


@pytest.mark.parametrize(("tensor", "heads"), [(1, 2), (2, 1), (4, 1)])
def test_the_kv_cache_of_grouped_query_attention_is_shared_up_to_one_head_per_rank(tensor: int, heads: int):
    layers, bf16 = 2, 2
    assert _memory(SMALL_LLAMA, "bf16", tensor).token == layers * bf16 * 2 * heads * 16
    assert _memory(SMALL_LLAMA, "fp8", tensor).token == layers * bf16 * 2 * heads * 16, "the cache is in bf16"


@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_latent_attention_caches_one_vector_on_each_tensor_rank(tensor: int):
    assert _memory(R1, "fp8", tensor).token == 61 * 2 * (512 + 64)


def test_pipeline_ranks_share_the_kv_cache():
    assert _memory(R1, "fp8", tensor=8, pipeline=2).token == 31 * 2 * (512 + 64)


@pytest.mark.parametrize("name", list(REFERENCE_MODELS))
def test_one_gpu_holds_all_tensors(name: str):
    elements = sum(math.prod(shape) for _, shape in hub_tensors(REFERENCE_MODELS[name]))
    assert _memory(REFERENCE_MODELS[name], "bf16").weights == 2 * elements


def test_layers_that_do_not_divide_are_split_as_in_vllm_and_as_in_sglang():
    sizes = [len(layers) for layers in _layer_ranges(61, 4)]
    assert sizes == [15, 15, 16, 15, 15, 15, 15, 16]
    assert [len(layers) for layers in _layer_ranges(62, 4)] == [15, 16, 16, 15, 15, 15, 16, 16]
    assert list(_layer_ranges(4, 2)) == [range(0, 2), range(2, 4)]


def test_the_kv_cache_gets_what_weights_leave_of_80_percent():
    assert ServingMemory(weights=500, token=10).tokens_that_fit(1000) == 30
    assert ServingMemory(weights=900, token=10).tokens_that_fit(1000) < 1
