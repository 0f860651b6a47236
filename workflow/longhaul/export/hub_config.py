"""Writes the export's config.json with the keys of the family's official repository (rope, untied head), for vLLM and SGLang.

transformers 5 renamed keys, and it leaves out keys that its own networks do not read. vLLM and SGLang choose the experts of
DeepSeek by such keys, and transformers 4 knows only the older names. So an export has both.
"""

from __future__ import annotations

from pathlib import Path

import torch

from longhaul.artifacts.atomic_files import read_json, write_json
from longhaul.config.architectures import FIXED_ROUTING
from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.hub_tensors import untied_where_servers_do_not_tie
from longhaul.config.rotary_embedding import rope_parameters, rotary_numbers
from longhaul.export.fp8_tensors import DTYPE as FP8
from longhaul.export.fp8_tensors import quantization_config
from longhaul.export.model_without_memory import hugging_face_config
from longhaul.export.pretrained_settings import special_token_ids, with_unknown_keys

_DEEPSEEK = {"ep_size": 1, "moe_layer_freq": 1}
# Values that describe every network of a family that transformers builds.
_CONSTANTS: dict[str, HuggingFaceConfig] = {
    "deepseek_v2": _DEEPSEEK | FIXED_ROUTING["deepseek_v2"],
    # The exported network has no multi-token prediction layers.
    "deepseek_v3": _DEEPSEEK | FIXED_ROUTING["deepseek_v3"] | {"num_nextn_predict_layers": 0},
}
_POSITIONS = "original_max_position_embeddings"
_LATENT_ATTENTION = ("deepseek_v2", "deepseek_v3")


def write_hub_config(
    path: Path, base: HuggingFaceConfig, tokenizer: dict[str, int | None], architecture: str, dtype: torch.dtype
) -> None:
    """Write an export's config.json.

    base:         content of the trained model's config.json; what a pretrained model says in it stays
    tokenizer:    the run's bos_token_id, eos_token_id and pad_token_id
    architecture: name of the model's class in transformers
    dtype:        data type of the export
    """
    if base["model_type"].startswith("qwen"):
        # Without a sliding window the key has no effect. The default of transformers, 28, may exceed the number of layers.
        base = {"max_window_layers": base["num_hidden_layers"], **base}
    config = hugging_face_config(untied_where_servers_do_not_tie(base))
    for key, value in special_token_ids(base, tokenizer).items():
        setattr(config, key, value)
    # A network in FP8 computes in bf16.
    config.architectures, config.dtype = [architecture], torch.bfloat16 if dtype == FP8 else dtype
    config.use_cache = True
    config.save_pretrained(path.parent)
    written = with_official_keys(with_unknown_keys(read_json(path), base))
    if dtype == FP8:
        written["quantization_config"] = quantization_config(base)
    write_json(path, written)


def with_official_keys(config: HuggingFaceConfig) -> HuggingFaceConfig:
    """Return the content of an exported config.json with all keys of the family's official repositories.

    config: what transformers 5 wrote, and the additional keys of the pretrained folder
    """
    family = config["model_type"]
    keys = config | _CONSTANTS.get(family, {}) | _both_rope_forms(config)
    if "dtype" in keys:
        keys["torch_dtype"] = keys["dtype"]
    if family == "deepseek_v2" and keys["topk_method"] == "greedy":
        keys |= {"n_group": 1, "topk_group": 1}  # vLLM always selects groups; one group is no restriction
    if family == "qwen3_moe":
        keys["num_experts"] = keys["num_local_experts"] = keys.get("num_local_experts") or keys["num_experts"]
    return dict(sorted(keys.items()))


def _both_rope_forms(config: HuggingFaceConfig) -> HuggingFaceConfig:
    """Return rope_parameters for transformers 5, and rope_theta with rope_scaling for everything older."""
    rope = {"rope_type": "default", **rope_parameters(config)}
    if "factor" in rope:
        # vLLM 0.32 and SGLang 0.5.23 take a factor of `linear` that is no float for a list of factors, and end.
        rope["factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        # The default of transformers. vLLM has none.
        rope.setdefault(_POSITIONS, config["max_position_embeddings"])
    further: HuggingFaceConfig = {}
    if rope["rope_type"] == "longrope":
        # transformers 4 reads the positions beside rope_scaling alone, and takes no other factor than their ratio.
        further = {_POSITIONS: rope.setdefault(_POSITIONS, config["max_position_embeddings"])}
        rope["attention_factor"] = rotary_numbers(config).attention_scale
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if config["model_type"] in _LATENT_ATTENTION:
        scaling["type"] = rope["rope_type"]  # the word of DeepSeek's own repositories and code
    is_scaled = rope["rope_type"] != "default"
    return {
        "rope_parameters": rope,
        "rope_scaling": scaling if is_scaled else None,
        "rope_theta": rope["rope_theta"],
        **further,
    }
