"""Counts the parameters of each part of a decoder layer: attention, MLA, MLP, experts; model_size.py sums them.

`c` is the config as a dict. All counts are parameters, not bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longhaul.config.field_types import HuggingFaceConfig


def has_latent_attention(c: HuggingFaceConfig) -> bool:
    """Return True for multi-head latent attention (MLA), which the DeepSeek architectures use."""
    return c["model_type"].startswith("deepseek")


def head_dim(c: HuggingFaceConfig) -> int:
    """Return the width of one attention head without latent attention."""
    default = (
        128 if c["model_type"] == "qwen3" else None
    )  # of transformers' Qwen3Config, where config.json lacks the key
    return c.get("head_dim", default) or c["hidden_size"] // c["num_attention_heads"]


def key_value_heads(c: HuggingFaceConfig) -> int:
    """Return the number of key and value heads; with latent attention each query head has its own."""
    return c["num_attention_heads"] if has_latent_attention(c) else c["num_key_value_heads"]


def expert_counts(c: HuggingFaceConfig) -> tuple[int, int]:
    """Return (routed experts, shared experts) of a sparse layer."""
    if has_latent_attention(c):
        return c["n_routed_experts"], c["n_shared_experts"] or 0
    # transformers 5 writes num_local_experts, model cards write num_experts.
    return c.get("num_experts") or c.get("num_local_experts") or 0, 0


def sparse_layers(c: HuggingFaceConfig) -> tuple[bool, ...]:
    """Return for each decoder layer whether it has routed experts."""
    return tuple(_is_sparse(c, layer) for layer in range(c["num_hidden_layers"]))


def has_balancing_bias(c: HuggingFaceConfig) -> bool:
    """Return whether the routers add a bias to the scores of experts, by which the load can be balanced."""
    return c["model_type"] == "deepseek_v3"


def _is_sparse(c: HuggingFaceConfig, layer: int) -> bool:
    if has_latent_attention(c):
        return layer >= c["first_k_dense_replace"]
    if c["model_type"] == "qwen3_moe":
        return layer not in (c.get("mlp_only_layers") or ()) and (layer + 1) % c.get("decoder_sparse_step", 1) == 0
    return False


def attention_parameters(c: HuggingFaceConfig) -> int:
    """Return the parameters of one layer's attention, without the layer's two norms."""
    return _latent_attention(c) if has_latent_attention(c) else _grouped_attention(c)


def _grouped_attention(c: HuggingFaceConfig) -> int:
    """Grouped-query attention: the q, k, v and o projections with their biases, and Qwen3's norms of q and k."""
    hidden, d = c["hidden_size"], head_dim(c)
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    qkv_bias = c["model_type"] == "qwen2" or c.get("attention_bias", False)
    o_bias = c["model_type"] != "qwen2" and c.get("attention_bias", False)
    norms = 2 * d if c["model_type"].startswith("qwen3") else 0
    return hidden * (2 * q + 2 * kv) + (q + 2 * kv if qkv_bias else 0) + (hidden if o_bias else 0) + norms


def _latent_attention(c: HuggingFaceConfig) -> int:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""
    hidden, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    qk = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    bias = c.get("attention_bias", False)
    q_rank = c.get("q_lora_rank")
    query = hidden * q_rank + q_rank + q_rank * heads * qk + (q_rank if bias else 0) if q_rank else hidden * heads * qk
    down = hidden * (rank + c["qk_rope_head_dim"]) + (rank + c["qk_rope_head_dim"] if bias else 0) + rank
    up = rank * heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
    return query + down + up + heads * c["v_head_dim"] * hidden + (hidden if bias else 0)


def latent_compression_parameters(c: HuggingFaceConfig) -> int:
    """Return the parameters of MLA's projections to the low ranks and of their norms; 0 without latent attention."""
    if not has_latent_attention(c):
        return 0
    ranks = (c.get("q_lora_rank") or 0) + c["kv_lora_rank"]
    return c["hidden_size"] * (ranks + c["qk_rope_head_dim"]) + ranks


def dense_mlp_parameters(c: HuggingFaceConfig) -> int:
    """Return the parameters of a dense layer's MLP: gate, up and down projections."""
    hidden, width = c["hidden_size"], c["intermediate_size"]
    return 3 * hidden * width + (2 * width + hidden if c.get("mlp_bias") else 0)


@dataclass(frozen=True)
class ExpertParameters:
    """Parameters of a sparse layer's MLP. All are 0 in a model without experts.

    routed:   all routed experts
    shared:   all shared experts, which every token uses
    selected: the routed experts that one token uses
    router:   the router
    """

    routed: int
    shared: int
    selected: int
    router: int

    @property
    def total(self) -> int:
        """Parameters of the whole MLP."""
        return self.routed + self.shared + self.router

    @property
    def active(self) -> int:
        """Parameters that one token passes through."""
        return self.selected + self.shared + self.router


def expert_parameters(c: HuggingFaceConfig) -> ExpertParameters:
    """Return the parameters of a sparse layer's MLP."""
    routed, shared = expert_counts(c)
    if not routed:
        return ExpertParameters(0, 0, 0, 0)
    one = 3 * c["hidden_size"] * c["moe_intermediate_size"]
    return ExpertParameters(routed * one, shared * one, c["num_experts_per_tok"] * one, routed * c["hidden_size"])


def large_tensors(c: HuggingFaceConfig) -> Iterator[int]:
    """Yield the sizes of a layer's large tensors, in elements. A layer's routed experts are two tensors."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    yield hidden * c["intermediate_size"]
    yield expert_counts(c)[0] * 2 * hidden * (c.get("moe_intermediate_size") or 0)
    if has_latent_attention(c):
        yield (c.get("q_lora_rank") or hidden) * heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        yield c["kv_lora_rank"] * heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
        yield hidden * heads * c["v_head_dim"]
    else:
        yield hidden * heads * head_dim(c)
