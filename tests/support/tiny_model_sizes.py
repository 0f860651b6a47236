"""Two tiny models and a stage whose sizes can be computed by hand."""

from __future__ import annotations

from typing import Any

from longhaul.config.model_size import ModelSize, model_size
from longhaul.config.stage_config import Stage

TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
"""Head width 4. Embedding 10·8 = 80. Attention 8·(8+4+4) + 8·8 = 192, two norms 16, MLP 3·8·16 = 384: 592 per layer.
All: 80 + 80 (head) + 8 (final norm) + 2·592 = 1352. The largest tensor is a projection of the MLP with 8·16 = 128."""

TINY_QWEN3_MOE: dict[str, Any] = {
    **TINY_LLAMA,
    "model_type": "qwen3_moe",
    "head_dim": 4,
    "moe_intermediate_size": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
"""Attention 192 and norms of q and k 8, two norms 16, router 4·8 = 32: 248 per layer without routed experts.
Routed experts 4·3·8·4 = 384 per layer. All: 168 + 2·(248+384) = 1432."""


def tiny_size(**changes: Any) -> ModelSize:
    """Return the sizes of TINY_LLAMA with these config keys changed."""
    return model_size({**TINY_LLAMA, **changes})


def tiny_stage(**changes: Any) -> Stage:
    """Return a bf16 stage with 2 x 16 tokens per micro batch and ZeRO stage 1."""
    keys: dict[str, Any] = {
        "name": "base",
        "kind": "pretrain",
        "dataset": "prose",
        "steps": 1,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "sequence_length": 16,
        **changes,
    }
    return Stage(**keys)
