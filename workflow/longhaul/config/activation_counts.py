"""Counts the activations (elements per token) that a decoder layer saves for the backward pass; activation_memory.py gives bytes.

`c` is the config as a dict. All counts are elements per token, not bytes. `sparse` says for each layer whether it has routed
experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.parameter_counts import expert_counts, has_latent_attention, head_dim


def head_width(c: HuggingFaceConfig) -> int:
    """Return the elements of a query and a key of one head."""
    return c["qk_nope_head_dim"] + c["qk_rope_head_dim"] if has_latent_attention(c) else head_dim(c)


def attention_width(c: HuggingFaceConfig) -> int:
    """Return heads x (key width + value width), which determines the FLOPs of attention."""
    heads = c["num_attention_heads"]
    if has_latent_attention(c):
        return heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"] + c["v_head_dim"])
    return 2 * heads * head_dim(c)


def saved_activations(c: HuggingFaceConfig, sparse: Sequence[bool]) -> int:
    """Return the elements that one layer saves for the backward pass and that tensor parallelism splits.

    They are q, k, v, the attention output, and gate, up, activation and product of the MLP. The count follows Korthikanti et
    al. 2022 (arXiv:2205.05198, section 4), adapted to RMSNorm, SwiGLU and attention without a stored score matrix.
    """
    heads = c["num_attention_heads"]
    if has_latent_attention(c):
        attention = heads * (2 * head_width(c) + 2 * c["v_head_dim"])
    else:
        attention = 2 * (heads + c["num_key_value_heads"]) * head_dim(c)
    return attention + 4 * widest_mlp(c, sparse)


def unsplit_activations(c: HuggingFaceConfig, sparse: Sequence[bool]) -> int:
    """Return the elements that one layer saves on every tensor rank, except those inside norms.

    They are 2 norm outputs, MLA's compressions, and in a sparse layer the input and the output of each selected expert.
    """
    hidden_copies = 2 + (2 * c["num_experts_per_tok"] if any(sparse) else 0)
    return hidden_copies * c["hidden_size"] + _latents(c)


def repeated_key_values(c: HuggingFaceConfig) -> int:
    """Return the additional elements if keys and values are repeated for each query head that shares them.

    Latent attention has separate keys and values for each head, so the count is 0.
    """
    return 0 if has_latent_attention(c) else 2 * (c["num_attention_heads"] - c["num_key_value_heads"]) * head_dim(c)


def normed_elements(c: HuggingFaceConfig) -> int:
    """Return the elements that pass through norms: a layer's two norms, and those of MLA's compressions or Qwen3's q and k."""
    if has_latent_attention(c):
        return 2 * c["hidden_size"] + (c.get("q_lora_rank") or 0) + c["kv_lora_rank"]
    normed_heads = c["num_attention_heads"] + c["num_key_value_heads"] if c["model_type"].startswith("qwen3") else 0
    return 2 * c["hidden_size"] + normed_heads * head_dim(c)


def matmul_results(c: HuggingFaceConfig, sparse: Sequence[bool]) -> int:
    """Return the elements that matmuls and attention produce and that tensor parallelism splits.

    These are q, k, v, the attention output, gate and up.
    """
    heads = c["num_attention_heads"]
    if has_latent_attention(c):
        qk = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
        attention = heads * (qk + c["qk_nope_head_dim"] + 2 * c["v_head_dim"])
    else:
        attention = 2 * (heads + c["num_key_value_heads"]) * head_dim(c)
    return attention + 2 * widest_mlp(c, sparse)


def unsplit_matmul_results(c: HuggingFaceConfig, sparse: Sequence[bool]) -> int:
    """Return the elements that matmuls produce on every tensor rank, without the two that are added to the residual stream.

    They are MLA's compressions, and in a sparse layer the outputs of the selected experts, which are weighted before they are
    added.
    """
    return _latents(c) + (c["num_experts_per_tok"] * c["hidden_size"] if any(sparse) else 0)


def _latents(c: HuggingFaceConfig) -> int:
    """Return the elements of MLA's compressions of queries, keys and values."""
    if not has_latent_attention(c):
        return 0
    return (c.get("q_lora_rank") or 0) + c["kv_lora_rank"] + c["qk_rope_head_dim"]


def widest_mlp(c: HuggingFaceConfig, sparse: Sequence[bool]) -> int:
    """Return the largest inner MLP width that one token uses in a layer, summed over its experts."""
    experts = c["num_experts_per_tok"] + expert_counts(c)[1] if any(sparse) else 0
    return max(0 if all(sparse) else c["intermediate_size"], c.get("moe_intermediate_size", 0) * experts)
