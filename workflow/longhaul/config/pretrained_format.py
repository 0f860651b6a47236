"""Describes how Hub folders store a model: one tensor per expert, FP8 blocks, layers for multi-token prediction.

Experts: transformers keeps all experts of a layer in one tensor. A folder on the Hugging Face Hub has one tensor per expert:
    mlp.experts.gate_up_proj [E, 2I, H] -> mlp.experts.<e>.gate_proj.weight [I, H] and mlp.experts.<e>.up_proj.weight [I, H]
    mlp.experts.down_proj    [E, H, I]  -> mlp.experts.<e>.down_proj.weight [H, I]
with E experts, inner width I and hidden width H. Each expert is one contiguous range of the fused tensor.

FP8: DeepSeek's official folders store matrices as float8_e4m3fn, with one fp32 scale per block of 128 x 128 elements. They also
hold multi-token prediction layers after the last decoder layer (https://github.com/deepseek-ai/DeepSeek-V3,
README_WEIGHTS.md). Training starts from the dequantized weights of the decoder layers alone.
"""

from __future__ import annotations

import re
from typing import Any

from longhaul.config.architectures import MAX_LAYERS
from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.validation_messages import shortened
from longhaul.errors import UserError

_FUSED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_LEFT_OUT = {
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
}
"""Keys of config.json that are not for the trained model: its weights are not quantized, and longhaul chooses the functions."""
DAMAGED_PRETRAINED_HINT = "restore the file, or download the pretrained model again"
FP8 = {"quant_method": "fp8", "fmt": "e4m3"}


def expert_keys(name: str, shape: tuple[int, ...]) -> list[str]:
    """Return the Hub's names for a fused expert tensor [E, rows, columns], in storage order; [] for any other tensor."""
    match = _FUSED_EXPERTS.fullmatch(name)
    if not match:
        return []
    return [f"{match[1]}.{expert}.{part}.weight" for expert in range(shape[0]) for part in _PROJECTIONS[match[2]]]


def fp8_block_shape(config: HuggingFaceConfig, where: str) -> tuple[int, int] | None:
    """Return (rows, columns) of the FP8 blocks that share a scale; None if the weights are not quantized.

    Raises:
        UserError: the weights are quantized in another way.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    if not isinstance(quantization, dict):
        raise UserError(
            f"{where}: quantization_config is {shortened(quantization)}; it must hold keys and values",
            "correct the model's config.json",
        )
    block: Any = quantization.get("weight_block_size")
    other = {key: quantization.get(key) for key, value in FP8.items() if quantization.get(key, value) != value}
    if other or "quant_method" not in quantization or not _is_block_shape(block):
        found = ", ".join(f"{key} {quantization.get(key)!r}" for key in (*FP8, "weight_block_size"))
        raise UserError(
            f"{where}: quantization_config has {found}; training can start only from DeepSeek's block-scaled FP8 "
            "(quant_method 'fp8', fmt 'e4m3', weight_block_size [rows, columns])",
            "use the model's bf16 or fp32 weights",
        )
    return block[0], block[1]


def _is_block_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


def mtp_prefixes(config: HuggingFaceConfig) -> tuple[str, ...]:
    """Return the name prefixes of the multi-token prediction layers' tensors."""
    first, count = config.get("num_hidden_layers") or 0, config.get("num_nextn_predict_layers") or 0
    if type(count) is not int or not 0 <= count <= MAX_LAYERS:
        raise UserError(
            f"config.json: num_nextn_predict_layers is {shortened(count)}; it must be an integer up to {MAX_LAYERS}",
            "correct the model's config.json",
        )
    return tuple(f"model.layers.{first + index}." for index in range(count))


def trained_config(config: HuggingFaceConfig) -> HuggingFaceConfig:
    """Return the config of the trained and exported model: not quantized, without multi-token prediction layers.

    Keys that choose functions of transformers are left out, too: flash_attention_2 needs a package that may be missing here.
    """
    kept = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    return kept | ({"num_nextn_predict_layers": 0} if mtp_prefixes(config) else {})


def pretrained_changes(config: HuggingFaceConfig) -> tuple[str, ...]:
    """Return sentences for the plan, the log and the model card: changes between the folder's weights and the start weights."""
    changes = []
    if block := fp8_block_shape(config, "config.json"):
        changes.append(f"FP8 weights with scales for blocks of {block[0]} x {block[1]} were dequantized to fp32.")
    if prefixes := mtp_prefixes(config):
        named = ", ".join(f"`{prefix}*`" for prefix in prefixes)
        changes.append(f"Multi-token prediction layers ({named}) were left out.")
    return tuple(changes)
