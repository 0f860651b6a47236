"""Names and shapes of the tensors in a model's Hugging Face folder, from its config, without torch; and their comparison.

`c` is the config as a dict, with sizes that model_size has checked. H hidden width. Experts are stored one by one.
tests/unit/config/test_hub_tensors.py compares them with the models of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.parameter_counts import (
    expert_counts,
    has_balancing_bias,
    has_latent_attention,
    head_dim,
    sparse_layers,
)
from longhaul.errors import UserError

WRONG_WEIGHTS_HINT = (
    "copy or download the whole model again: these weights do not belong to this config.json, or some are missing"
)
TWO_FILES_HINT = "remove one of the two files from the folder"
_LISTED_KEYS = 5
# Folders of older transformers releases hold these buffers. As transformers does, longhaul computes them from config.json.
_DERIVED = ".rotary_emb.inv_freq"

FP8_BLOCK = 128
"""Rows and columns of the blocks of an FP8 export; each block has one factor."""
_FP8_MATRIX = re.compile(r"model\.layers\.\d+\..*_proj(_with_mqa)?\.weight")
UNTIED_FAMILIES = frozenset({"deepseek_v2", "deepseek_v3", "qwen3_moe"})
"""Families whose official repositories never tie head and embedding, so that servers ignore tie_word_embeddings.

vLLM 0.32 ignores it for DeepSeek, SGLang 0.5.23 for Qwen3-MoE. Without a head in the files, vLLM answers with noise.
"""

Tensor = tuple[str, tuple[int, ...]]


def untied_where_servers_do_not_tie(config: HuggingFaceConfig) -> HuggingFaceConfig:
    """Return the config of the exported network: `config`, but with a head of its own in UNTIED_FAMILIES."""
    return config | ({"tie_word_embeddings": False} if config["model_type"] in UNTIED_FAMILIES else {})


def is_fp8_matrix(name: str) -> bool:
    """Return whether an FP8 export stores this tensor in FP8: all matrices of the decoder layers except routers."""
    return _FP8_MATRIX.fullmatch(name) is not None


def hub_tensors(c: HuggingFaceConfig) -> Iterator[Tensor]:
    """Yield (name, shape) of every tensor; the head of a model with tied embeddings is left out."""
    yield from outer_tensors(c)
    for layer, is_sparse in enumerate(sparse_layers(c)):
        for name, shape in layer_tensors(c, is_sparse):
            yield f"model.layers.{layer}.{name}", shape


def outer_tensors(c: HuggingFaceConfig) -> Iterator[Tensor]:
    """Yield (name, shape) of the tensors outside of the decoder layers."""
    hidden, vocabulary = c["hidden_size"], c["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    if not c.get("tie_word_embeddings"):
        yield "lm_head.weight", (vocabulary, hidden)


def layer_tensors(c: HuggingFaceConfig, is_sparse: bool) -> Iterator[Tensor]:
    """Yield (name, shape) of the tensors of one decoder layer; names begin behind `model.layers.<layer>.`"""
    yield "input_layernorm.weight", (c["hidden_size"],)
    yield "post_attention_layernorm.weight", (c["hidden_size"],)
    attention = _latent_attention(c) if has_latent_attention(c) else _grouped_attention(c)
    yield from ((f"self_attn.{name}", shape) for name, shape in attention)
    mlp = _mixture(c) if is_sparse else _mlp(c["hidden_size"], c["intermediate_size"], bool(c.get("mlp_bias")))
    yield from ((f"mlp.{name}", shape) for name, shape in mlp)


def _projection(name: str, rows: int, columns: int, has_bias: bool = False) -> Iterator[Tensor]:
    yield f"{name}.weight", (rows, columns)
    if has_bias:
        yield f"{name}.bias", (rows,)


def _grouped_attention(c: HuggingFaceConfig) -> Iterator[Tensor]:
    hidden, width, bias = c["hidden_size"], head_dim(c), bool(c.get("attention_bias"))
    is_qwen2 = c["model_type"] == "qwen2"
    yield from _projection("q_proj", c["num_attention_heads"] * width, hidden, bias or is_qwen2)
    for name in ("k_proj", "v_proj"):
        yield from _projection(name, c["num_key_value_heads"] * width, hidden, bias or is_qwen2)
    yield from _projection("o_proj", hidden, c["num_attention_heads"] * width, bias and not is_qwen2)
    if c["model_type"].startswith("qwen3"):
        yield "q_norm.weight", (width,)
        yield "k_norm.weight", (width,)


def _latent_attention(c: HuggingFaceConfig) -> Iterator[Tensor]:
    hidden, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    key_width, bias = c["qk_nope_head_dim"] + c["qk_rope_head_dim"], bool(c.get("attention_bias"))
    if query_rank := c.get("q_lora_rank"):
        yield from _projection("q_a_proj", query_rank, hidden, bias)
        yield "q_a_layernorm.weight", (query_rank,)
        yield from _projection("q_b_proj", heads * key_width, query_rank)
    else:
        yield from _projection("q_proj", heads * key_width, hidden)
    yield from _projection("kv_a_proj_with_mqa", rank + c["qk_rope_head_dim"], hidden, bias)
    yield "kv_a_layernorm.weight", (rank,)
    yield from _projection("kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), rank)
    yield from _projection("o_proj", hidden, heads * c["v_head_dim"], bias)


def _mlp(hidden: int, width: int, has_bias: bool = False) -> Iterator[Tensor]:
    yield from _projection("gate_proj", width, hidden, has_bias)
    yield from _projection("up_proj", width, hidden, has_bias)
    yield from _projection("down_proj", hidden, width, has_bias)


def _mixture(c: HuggingFaceConfig) -> Iterator[Tensor]:
    hidden, width, (routed, shared) = c["hidden_size"], c["moe_intermediate_size"], expert_counts(c)
    yield "gate.weight", (routed, hidden)
    if has_balancing_bias(c):
        yield "gate.e_score_correction_bias", (routed,)
    for expert in range(routed):
        yield from ((f"experts.{expert}.{name}", shape) for name, shape in _mlp(hidden, width))
    if shared:
        yield from ((f"shared_experts.{name}", shape) for name, shape in _mlp(hidden, shared * width))


def check_names(folder: Path, stored: Iterable[str], expected: set[str], is_tied: bool) -> None:
    """Raise UserError if a folder lacks a tensor of the model, or holds one that the model does not have.

    is_tied: the head is the embedding; a folder may hold it nevertheless
    """
    known = expected | ({"lm_head.weight"} if is_tied else set())
    found = set(stored)
    unexpected = {name for name in found if name not in known and not name.endswith(_DERIVED)}
    for kind, names in (("missing keys", expected - found), ("unexpected keys", unexpected)):
        if names:
            listed = ", ".join(sorted(names)[:_LISTED_KEYS])
            raise UserError(f"{folder}: {kind}: {listed} ({len(names)} in all)", WRONG_WEIGHTS_HINT)


def check_shape(folder: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...], vocab_size: int) -> None:
    """Raise UserError if a stored tensor does not have the shape that the model expects."""
    if found == expected:
        return
    rows = found[0] if found else 0
    if name in ("model.embed_tokens.weight", "lm_head.weight") and rows != vocab_size:
        raise UserError(
            f"{folder}: {name} has {rows} rows, but config.json's vocab_size is {vocab_size}",
            f"set vocab_size to {rows} if the tokenizer's vocabulary has that size, too; else restore the weights' own "
            "config.json",
        )
    raise UserError(f"{folder}: {name} has shape {list(found)}, the model expects {list(expected)}", WRONG_WEIGHTS_HINT)
