"""Sizes of a network, counted from its Hugging Face config without building it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longhaul.config.architectures import MAX_LAYERS, MAX_SIZE
from longhaul.errors import UserError

# What is counted with; architectures built here have been through their models, a config.json has not.
_SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "decoder_sparse_step",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
}
_SIZES_OR_NONE = {
    "head_dim",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "first_k_dense_replace",
    "q_lora_rank",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3")


@dataclass(frozen=True)
class ModelSize:
    """Counts of parameters (weights), not bytes.

    total:     all parameters, a tied embedding counted once
    active:    parameters one token passes through, as in 6·N FLOPs per token
    embedding: parameters of the input embedding
    ends:      parameters outside the decoder layers: embedding, head unless tied, final norm
    experts:   parameters of the routed experts of all layers, without routers
    layer_experts: of one layer that has them
    layer_dense, layer_sparse: parameters of a layer without and of one with routed experts, these left out
    layer_whole: parameters of a layer that tensor parallelism does not split: norms, router, MLA's compressions
    layer_max: parameters of the largest decoder layer
    tensor_max: parameters of the largest tensor; experts of a layer lie in two
    vocab_size, hidden, layers, heads, positions: as in the config
    sparse: of each layer, whether it has routed experts
    attention_width: heads x (key width + value width) of a layer, for the attention's FLOPs
    saved_per_token: activation elements one layer keeps for the backward pass, per token, beside those inside its norms
    repeated_per_token: what is kept more where a layer's keys and values are repeated for every query head that shares them
    normed_per_token: elements that go through a layer's norms, per token
    matmuls_per_token: of one layer, those that its matmuls and its attention give, without the two that are added to its input
    """

    total: int
    active: int
    embedding: int
    ends: int
    experts: int
    layer_experts: int
    layer_dense: int
    layer_sparse: int
    layer_whole: int
    layer_max: int
    tensor_max: int
    vocab_size: int
    hidden: int
    layers: int
    sparse: tuple[bool, ...]
    positions: int
    attention_width: int
    saved_per_token: int
    repeated_per_token: int
    normed_per_token: int
    matmuls_per_token: int

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs per token: 6·N_active plus causal attention (PaLM, arXiv:2204.02311, appendix B, halved)."""
        return 6.0 * self.active + 3.0 * self.layers * self.attention_width * sequence_length


def stage_layers(layers: int, stages: int) -> list[range]:
    """Which decoder layers each stage of a pipeline holds: consecutive, as even as can be, the earlier stages longer."""
    share, more = divmod(layers, stages)
    starts = [stage * share + min(stage, more) for stage in range(stages + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def sparse_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Of each decoder layer, whether it is a mixture of routed experts."""
    return tuple(_is_sparse(config, layer) for layer in range(config["num_hidden_layers"]))


def geometry(config: Mapping[str, Any]) -> ModelSize:
    """Counts a supported architecture; UserError for any other, or when the config lacks a size."""
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise UserError(f"model_type {architecture!r} is not supported", f"use one of {', '.join(ARCHITECTURES)}")
    try:
        _check_sizes(config)
        return _count(config)
    except KeyError as error:
        raise UserError(f"the {architecture} config lacks {error.args[0]}", "complete its config.json") from None


def _check_sizes(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key not in _SIZES | _SIZES_OR_NONE or (key in _SIZES_OR_NONE and not value):
            continue
        most = MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(
                f"{key} of the {config['model_type']} config is {value!r}, not a whole number from 1 to {most}",
                "mend its config.json",
            )


def _count(c: Mapping[str, Any]) -> ModelSize:
    hidden, layers = c["hidden_size"], c["num_hidden_layers"]
    attention = _attention(c) + 2 * hidden
    sparse = sparse_layers(c)
    dense_mlp = _mlp(c, c["intermediate_size"])
    routed, shared, chosen = _experts(c)
    embedding = c["vocab_size"] * hidden
    head = 0 if c.get("tie_word_embeddings") else embedding
    layer_experts = routed - _expert_counts(c)[0] * hidden if routed else 0
    sparse_total, sparse_active = routed + shared, chosen + shared
    mlps = sum(sparse_total if s else dense_mlp for s in sparse)
    active_mlps = sum(sparse_active if s else dense_mlp for s in sparse)
    return ModelSize(
        total=embedding + head + hidden + layers * attention + mlps,
        active=embedding + hidden + layers * attention + active_mlps,
        embedding=embedding,
        ends=embedding + head + hidden,
        experts=sum(sparse) * layer_experts,
        layer_experts=layer_experts,
        layer_dense=attention + dense_mlp,
        layer_sparse=attention + sparse_total - layer_experts,
        layer_whole=_compressions(c) + 2 * hidden + routed - layer_experts,
        layer_max=attention + (sparse_total if any(sparse) else dense_mlp),
        tensor_max=max(embedding, *_large_tensors(c)),
        vocab_size=c["vocab_size"],
        hidden=hidden,
        layers=layers,
        sparse=sparse,
        positions=c["max_position_embeddings"],
        attention_width=_attention_width(c),
        saved_per_token=_saved_per_token(c, sparse),
        repeated_per_token=_repeated_per_token(c),
        normed_per_token=_normed_per_token(c),
        matmuls_per_token=_matmuls_per_token(c, sparse),
    )


def _head_dim(c: Mapping[str, Any]) -> int:
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def _is_latent(c: Mapping[str, Any]) -> bool:
    return c["model_type"].startswith("deepseek")


def _attention(c: Mapping[str, Any]) -> int:
    return _latent_attention(c) if _is_latent(c) else _grouped_attention(c)


def _grouped_attention(c: Mapping[str, Any]) -> int:
    """Grouped-query attention: q, k, v, o projections, their biases, and Qwen3's norms of q and k."""
    hidden, d = c["hidden_size"], _head_dim(c)
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    qkv_bias = c["model_type"] == "qwen2" or c.get("attention_bias", False)
    o_bias = c["model_type"] != "qwen2" and c.get("attention_bias", False)
    norms = 2 * d if c["model_type"].startswith("qwen3") else 0
    return hidden * (2 * q + 2 * kv) + (q + 2 * kv if qkv_bias else 0) + (hidden if o_bias else 0) + norms


def _latent_attention(c: Mapping[str, Any]) -> int:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""
    hidden, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    qk = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    bias = c.get("attention_bias", False)
    q_rank = c.get("q_lora_rank")
    query = hidden * q_rank + q_rank + q_rank * heads * qk + (q_rank if bias else 0) if q_rank else hidden * heads * qk
    down = hidden * (rank + c["qk_rope_head_dim"]) + (rank + c["qk_rope_head_dim"] if bias else 0) + rank
    up = rank * heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
    return query + down + up + heads * c["v_head_dim"] * hidden + (hidden if bias else 0)


def _compressions(c: Mapping[str, Any]) -> int:
    """MLA's projections to the low ranks, and their norms."""
    if not _is_latent(c):
        return 0
    ranks = (c.get("q_lora_rank") or 0) + c["kv_lora_rank"]
    return c["hidden_size"] * (ranks + c["qk_rope_head_dim"]) + ranks


def _large_tensors(c: Mapping[str, Any]) -> Iterator[int]:
    """Sizes of a layer's tensors, the small ones left out."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    yield hidden * c["intermediate_size"]
    yield _expert_counts(c)[0] * 2 * hidden * (c.get("moe_intermediate_size") or 0)
    if _is_latent(c):
        yield (c.get("q_lora_rank") or hidden) * heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        yield c["kv_lora_rank"] * heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
        yield hidden * heads * c["v_head_dim"]
    else:
        yield hidden * heads * _head_dim(c)


def _mlp(c: Mapping[str, Any], width: int) -> int:
    biases = 2 * width + c["hidden_size"] if c.get("mlp_bias") else 0
    return 3 * c["hidden_size"] * width + biases


def _is_sparse(c: Mapping[str, Any], layer: int) -> bool:
    if _is_latent(c):
        return layer >= c["first_k_dense_replace"]
    if c["model_type"] == "qwen3_moe":
        return layer not in (c.get("mlp_only_layers") or ()) and (layer + 1) % c.get("decoder_sparse_step", 1) == 0
    return False


def _expert_counts(c: Mapping[str, Any]) -> tuple[int, int]:
    """(routed experts, shared experts) of a sparse layer."""
    if _is_latent(c):
        return c["n_routed_experts"], c["n_shared_experts"] or 0
    # transformers 5 writes num_local_experts, model cards write num_experts.
    return c.get("num_experts") or c.get("num_local_experts") or 0, 0


def _experts(c: Mapping[str, Any]) -> tuple[int, int, int]:
    """Parameters of a sparse layer: (all routed experts + router, shared experts, the chosen experts + router)."""
    routed, shared = _expert_counts(c)
    if not routed:
        return 0, 0, 0
    width = c["moe_intermediate_size"]
    one, router = 3 * c["hidden_size"] * width, routed * c["hidden_size"]
    return routed * one + router, 3 * c["hidden_size"] * width * shared, c["num_experts_per_tok"] * one + router


def _attention_width(c: Mapping[str, Any]) -> int:
    heads = c["num_attention_heads"]
    if _is_latent(c):
        return heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"] + c["v_head_dim"])
    return 2 * heads * _head_dim(c)


def _saved_per_token(c: Mapping[str, Any], sparse: Sequence[bool]) -> int:
    """Activation elements of one layer per token, without recomputation: inputs of every matmul, products and attention.

    Counted as in Korthikanti et al. 2022 (arXiv:2205.05198, section 4) for RMSNorm, SwiGLU and an attention that keeps
    no score matrix: 2 norm outputs, q, k, v, the attention's output, and gate, up, activation, product; of experts, what
    each gets and gives, too. What the norms keep inside is counted apart.
    """
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    if _is_latent(c):
        qk = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
        latents = (c.get("q_lora_rank") or 0) + c["kv_lora_rank"] + c["qk_rope_head_dim"]
        attention = heads * (2 * qk + 2 * c["v_head_dim"]) + latents
    else:
        attention = 2 * (heads + c["num_key_value_heads"]) * _head_dim(c)
    hidden_copies = 2 + (2 * c["num_experts_per_tok"] if any(sparse) else 0)
    return hidden_copies * hidden + attention + 4 * _widest_mlp(c, sparse)


def _repeated_per_token(c: Mapping[str, Any]) -> int:
    """Latent attention has keys and values for each head anyhow."""
    return 0 if _is_latent(c) else 2 * (c["num_attention_heads"] - c["num_key_value_heads"]) * _head_dim(c)


def _normed_per_token(c: Mapping[str, Any]) -> int:
    """A layer's two norms, and those of MLA's compressions or of Qwen3's q and k."""
    if _is_latent(c):
        return 2 * c["hidden_size"] + (c.get("q_lora_rank") or 0) + c["kv_lora_rank"]
    normed_heads = c["num_attention_heads"] + c["num_key_value_heads"] if c["model_type"].startswith("qwen3") else 0
    return 2 * c["hidden_size"] + normed_heads * _head_dim(c)


def _matmuls_per_token(c: Mapping[str, Any], sparse: Sequence[bool]) -> int:
    """Results of a layer's matmuls and attention per token: q, k, v, MLA's compressions, the attention's, gate and up; and of
    experts, whose results are weighted before they are added, those too."""
    heads = c["num_attention_heads"]
    if _is_latent(c):
        qk = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
        ranks = (c.get("q_lora_rank") or 0) + c["kv_lora_rank"] + c["qk_rope_head_dim"]
        attention = ranks + heads * (qk + c["qk_nope_head_dim"] + 2 * c["v_head_dim"])
    else:
        attention = 2 * (heads + c["num_key_value_heads"]) * _head_dim(c)
    experts = c["num_experts_per_tok"] * c["hidden_size"] if any(sparse) else 0
    return attention + 2 * _widest_mlp(c, sparse) + experts


def _widest_mlp(c: Mapping[str, Any], sparse: Sequence[bool]) -> int:
    """Inner width that a token sees in the widest layer, over all experts it visits there."""
    visits = c["num_experts_per_tok"] + _expert_counts(c)[1] if any(sparse) else 0
    return max(0 if all(sparse) else c["intermediate_size"], c.get("moe_intermediate_size", 0) * visits)
