"""Builds a Hugging Face model on the meta device from a config.json, and refuses unsupported families."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longhaul.config.field_types import HuggingFaceConfig
from longhaul.errors import UserError

_NOT_OF_THE_NETWORK = ("model_type", "transformers_version", "dtype", "torch_dtype", "quantization_config")
SUPPORTED_MODELS_HINT = "export a Llama, Qwen2, Qwen3, Qwen3-MoE, DeepSeek V2 or DeepSeek V3 model"


def hugging_face_config(config: HuggingFaceConfig) -> PreTrainedConfig:
    """Return the config object for the content of a config.json.

    Raises:
        UserError: transformers does not know the model_type.
    """
    keys = {key: value for key, value in config.items() if key not in _NOT_OF_THE_NETWORK}
    if config["model_type"] not in CONFIG_MAPPING:
        raise UserError(f"transformers does not know model_type {config['model_type']}", SUPPORTED_MODELS_HINT)
    return AutoConfig.for_model(config["model_type"], **keys)


def meta_model(config: HuggingFaceConfig) -> PreTrainedModel:
    """Return the model of a config.json's content, with all tensors on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hugging_face_config(config))
