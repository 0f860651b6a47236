"""How Hugging Face folders store weights that a model holds otherwise: what their config.json says, and experts one by one.

transformers keeps the experts of a layer in one tensor; the hub, and every reader of it, has one per expert:
    mlp.experts.gate_up_proj [E, 2I, H] -> mlp.experts.<e>.gate_proj.weight [I, H] and mlp.experts.<e>.up_proj.weight [I, H]
    mlp.experts.down_proj    [E, H, I]  -> mlp.experts.<e>.down_proj.weight [H, I]
with E experts of inner width I and hidden width H. Each is one contiguous range of the whole.

DeepSeek's official folders hold matrices as float8_e4m3fn with one fp32 factor for each block of 128 x 128 elements, and
behind the last decoder layer those that predict further tokens (https://github.com/deepseek-ai/DeepSeek-V3,
README_WEIGHTS.md). Training starts from the dequantised weights of the decoder layers.

A safetensors file is 8 bytes little-endian header length, a JSON header, and the data
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from longhaul.errors import UserError

_FUSED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_CUT_SHORT = "the file was cut short or altered: copy it again"
FP8 = {"quant_method": "fp8", "fmt": "e4m3"}


def expert_keys(name: str, shape: tuple[int, ...]) -> list[str]:
    """The hub's keys of a tensor of fused experts [E, rows, columns], in the order in which they lie in it; of others none."""
    match = _FUSED_EXPERTS.fullmatch(name)
    if not match:
        return []
    return [f"{match[1]}.{expert}.{part}.weight" for expert in range(shape[0]) for part in _PROJECTIONS[match[2]]]


def fp8_block(config: dict[str, Any], where: str) -> tuple[int, int] | None:
    """Rows and columns that share a factor; None where the weights are stored as plain numbers.

    Raises:
        UserError: they are quantised in any other way.
    """
    stored = config.get("quantization_config")
    if not stored:
        return None
    block = stored.get("weight_block_size")
    other = {key: stored.get(key) for key, value in FP8.items() if stored.get(key, value) != value}
    if other or "quant_method" not in stored or not _is_block(block):
        found = ", ".join(f"{key} {stored.get(key)!r}" for key in (*FP8, "weight_block_size"))
        raise UserError(
            f"{where}: quantization_config has {found}; only DeepSeek's block-scaled FP8 can be trained from "
            "(quant_method 'fp8', fmt 'e4m3', weight_block_size [rows, columns])",
            "name the model's bf16 or fp32 weights",
        )
    return block[0], block[1]


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


def further_layers(config: dict[str, Any]) -> tuple[str, ...]:
    """Beginnings of the names of the tensors that predict further tokens."""
    first = config.get("num_hidden_layers") or 0
    return tuple(f"model.layers.{first + index}." for index in range(config.get("num_nextn_predict_layers") or 0))


def as_trained(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the model that is trained and exported."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return kept | ({"num_nextn_predict_layers": 0} if further_layers(config) else {})


def notes(config: dict[str, Any]) -> tuple[str, ...]:
    """In words, for the plan, the log and the card: how the first weights differ from those in the folder."""
    found = []
    if block := fp8_block(config, "config.json"):
        found.append(f"Its FP8 weights, scaled in blocks of {block[0]} x {block[1]}, were dequantised to fp32.")
    if layers := further_layers(config):
        named = ", ".join(f"`{layer}*`" for layer in layers)
        found.append(f"Its layers that predict further tokens ({named}) were left out.")
    return tuple(found)


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the byte at which its data begin; UserError for one that is not whole."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
        if length > size - 8:
            raise UserError(f"{path} has {size} bytes and no whole safetensors header", _CUT_SHORT)
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_without_doubles)
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            end = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} has no readable safetensors header: {error}", _CUT_SHORT) from None
    if end != size:
        raise UserError(f"{path} has {size} bytes, and its header speaks of {end}", _CUT_SHORT)
    return header, 8 + length


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands in it twice")
    return found
