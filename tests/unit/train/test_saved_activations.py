"""The planned activations of a layer, compared with what autograd saves: with torch.compile's partitioner, and without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.config.model_size import model_size
from longhaul.planning.activation_memory import activation_bytes
from longhaul.train.compile_layers import compile_layers
from tests.support.tiny_sizes import tiny_stage

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


def saved_bytes(kind: str, compiled: bool) -> int:
    """Return the bytes that one layer saves for its backward pass, without weights and rotary embeddings."""
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KEYS), dtype=torch.bfloat16)
    if compiled:
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
