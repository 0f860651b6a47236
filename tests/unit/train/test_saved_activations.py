"""The planned activations of a layer, compared with what autograd saves: with torch.compile's partitioner, and without it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.config.model_size import model_size
from longhaul.config.stage_config import Parallel
from longhaul.planning.activation_memory import activation_bytes
from longhaul.train.compile_layers import compile_layers
from longhaul.train.experts_on_gpus import use_experts_for_gpus
from longhaul.train.fp8_products import use_fp8_products
from longhaul.train.parallel.expert_parallel import apply_expert_parallel
from longhaul.train.parallel.parallel_dims import ParallelDims
from tests.support.tiny_model_sizes import tiny_stage

pytestmark = pytest.mark.usefixtures("dynamo")

TOKENS = 256
KEYS: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": TOKENS,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 64},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 8,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
}
PARTITIONED = "aot_eager_decomp_partition"
"""The backend that divides forward and backward pass as inductor does, and compiles nothing."""


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_planned_activations_are_within_3_percent_of_what_a_layer_saves(kind: str, compiled: bool):
    """Attention also saves a sum in fp32 for each head, and a norm one for each token, which the plan leaves out."""
    stage = tiny_stage(micro_batch_size=1, sequence_length=TOKENS, compile="auto" if compiled else "off")
    sizes = replace(model_size({"model_type": kind, **KEYS, "rms_norm_eps": 1e-6}), layers=1)
    planned, _ = activation_bytes(stage, sizes)
    assert planned == pytest.approx(saved_bytes(kind, compiled), rel=0.03)


@pytest.mark.parametrize(("kind", "mlp_width"), [("llama", 512), ("qwen2", 512), ("qwen3", 512), ("llama", 520)])
def test_planned_activations_in_fp8_are_within_3_percent_of_what_a_layer_saves(kind: str, mlp_width: int):
    """Matrices of 520 columns are multiplied in bf16."""
    stage = tiny_stage(micro_batch_size=1, sequence_length=TOKENS, precision="fp8")
    keys = {"intermediate_size": mlp_width}
    sizes = replace(model_size({"model_type": kind, **KEYS, **keys, "rms_norm_eps": 1e-6}), layers=1)
    planned, _ = activation_bytes(stage, sizes)
    assert planned == pytest.approx(saved_bytes(kind, compiled=True, in_fp8=True, keys=keys), rel=0.03)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", MIXTURES)
def test_expert_parallelism_saves_what_undivided_experts_save(kind: str, compiled: bool, one_rank: None):
    """One rank exchanges rows with itself, so it receives as many as each of several ranks does with even choices.

    More than the 4 experts of a token are 4 places of its rows, in int64 and in both directions, and 4 weights.
    """
    undivided = saved_bytes(kind, compiled, is_divided=False)
    divided = saved_bytes(kind, compiled, is_divided=True)
    assert -16 * TOKENS <= divided - undivided <= 4 * (3 * 8 + 4) * TOKENS


def saved_bytes(
    kind: str, compiled: bool, is_divided: bool = False, in_fp8: bool = False, keys: dict[str, int] | None = None
) -> int:
    """Return the bytes that one layer saves for its backward pass, without weights and rotary embeddings."""
    config = AutoConfig.for_model(kind, **{**KEYS, **MIXTURES.get(kind, {}), **(keys or {})})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if is_divided:
        apply_expert_parallel(model, ParallelDims(0, 1, Parallel()))
    if in_fp8:
        use_fp8_products(model)
    if compiled:
        use_experts_for_gpus(model)
        compile_layers(model.train(), PARTITIONED)
    positions = torch.arange(TOKENS)[None]
    hidden = torch.randn(1, TOKENS, KEYS["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    rotary = model.model.rotary_emb(hidden, positions)
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *rotary)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer = model.model.layers[0]
        output = layer(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions)
    assert output.requires_grad
    return sum(size for place, size in saved.items() if place not in shared)
