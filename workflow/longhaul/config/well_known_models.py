"""Sizes of well-known models, for the question how many nodes each of them needs. Values of their config.json on the hub."""

from __future__ import annotations

from typing import Any

_POSITIONS = {"max_position_embeddings": 131072, "tie_word_embeddings": False}


def _dense(family: str, *sizes: int) -> dict[str, Any]:
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    return {"model_type": family, **dict(zip(keys, sizes, strict=True)), **_POSITIONS}


REFERENCE_MODELS: dict[str, dict[str, Any]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": _dense("qwen2", 151936, 1536, 8960, 28, 12, 2),
    "DeepSeek-R1-Distill-Qwen-7B": _dense("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "DeepSeek-R1-Distill-Llama-8B": _dense("llama", 128256, 4096, 14336, 32, 32, 8),
    "DeepSeek-R1-Distill-Qwen-14B": _dense("qwen2", 152064, 5120, 13824, 48, 40, 8),
    "DeepSeek-R1-Distill-Qwen-32B": _dense("qwen2", 152064, 5120, 27648, 64, 40, 8),
    "DeepSeek-R1-Distill-Llama-70B": _dense("llama", 128256, 8192, 28672, 80, 64, 8),
    "DeepSeek-R1": {
        **_dense("deepseek_v3", 129280, 7168, 18432, 61, 128, 128),
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
}
"""Name -> Hugging Face config, from 1.5 to 671 billion parameters."""
