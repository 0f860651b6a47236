"""Checks the values of a pretrained model's config.json: with the classes of section `model`, and keys that only such a file has.

transformers refuses many of these values, too, but only in the training job. Others it takes, and the network is another one.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from longhaul.config.architectures import ARCHITECTURES, Size, check_network_values
from longhaul.config.field_types import HuggingFaceConfig, NonNegativeInt
from longhaul.config.parameter_counts import has_latent_attention
from longhaul.config.reserved_keys import CONFIG_CLASSES, refuse_own_names
from longhaul.config.rotary_embedding import check_rope
from longhaul.config.validation_messages import validation_message
from longhaul.errors import UserError

_WHERE = "model.pretrained: config.json"
_REMEDY = "correct the model's config.json"
_ROPE = ("rope_theta", "rope_scaling")
"""Keys of the classes that check_rope checks: it knows types of rotary embeddings that are not for new models."""

_TokenId = Annotated[int, Field(ge=-1)] | None  # -1: older Llama folders have no padding token
_Dtype = Literal["float64", "float32", "bfloat16", "float16", "float8_e4m3fn"] | None


class _FileKeys(BaseModel):
    """Keys that networks of transformers read, and that are no keys of section `model`."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    architectures: tuple[str, ...] | None = None
    dtype: _Dtype = None
    torch_dtype: _Dtype = None
    vocab_size: int
    num_hidden_layers: int
    pad_token_id: _TokenId = None
    bos_token_id: _TokenId = None
    eos_token_id: int | tuple[int, ...] | None = None
    use_cache: bool = True
    return_dict: Literal[True] = True
    output_hidden_states: Literal[False] = False
    output_attentions: Literal[False] = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0
    chunk_size_feed_forward: int = 0
    is_encoder_decoder: Literal[False] = False
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    num_labels: Annotated[int, Field(ge=0, le=100_000)] = 2  # transformers makes a name for each
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None
    pretraining_tp: int | None = None
    num_mtp_layers: int = 1
    transformers_version: str | None = None
    head_dim: Size | None = None
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_interleave: bool = True
    use_sliding_window: bool = False
    sliding_window: Size | None = None
    max_window_layers: NonNegativeInt = 0
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    per_layer_config: None = None

    @model_validator(mode="after")
    def _check_padding_token(self) -> _FileKeys:
        if (self.pad_token_id or 0) >= self.vocab_size:
            raise ValueError(f"pad_token_id is {self.pad_token_id}; it must be less than vocab_size {self.vocab_size}")
        return self

    @model_validator(mode="after")
    def _check_layer_types(self) -> _FileKeys:
        if self.layer_types is None:
            return self
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries; it must have num_hidden_layers, {self.num_hidden_layers}"
            )
        if "sliding_attention" in self.layer_types and not (self.use_sliding_window and self.sliding_window):
            raise ValueError("layer_types has sliding_attention; it needs use_sliding_window true and a sliding_window")
        return self


def check_pretrained_keys(config: HuggingFaceConfig) -> HuggingFaceConfig:
    """Return the config.json of a pretrained model, with floats where it has integers and transformers needs floats.

    Raises:
        UserError: the architecture is not supported, or its network cannot follow a value.
    """
    architecture = config.get("model_type")
    known = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if known is None:
        raise UserError(f"model_type {architecture!r} is not supported", f"use one of {', '.join(ARCHITECTURES)}")
    filled = _with_names_of_the_section(config)
    floats = _floats_for_integers(known, filled) | _floats_for_integers(_FileKeys, filled)
    try:
        refuse_own_names(config, CONFIG_CLASSES, "config")
        _check_one_network(config, f"{known.__name__}ForCausalLM")
        _check_head_width(config)
        check_rope(config)
        check_network_values(config)
    except ValueError as error:
        raise UserError(f"{_WHERE}: {error}", _REMEDY) from None
    return config | floats


def _with_names_of_the_section(config: HuggingFaceConfig) -> HuggingFaceConfig:
    """Return the keys with the names of section `model`, and with a default of transformers that the section has not."""
    filled = dict(config)
    if "num_local_experts" in config:  # transformers 5 writes this name, model cards write num_experts
        filled.setdefault("num_experts", config["num_local_experts"])
    if config["model_type"] == "deepseek_v3":
        filled.setdefault("num_key_value_heads", 128)
    if config["model_type"] == "deepseek_v2" and config.get("num_key_value_heads") is None:
        filled["num_key_value_heads"] = config.get("num_attention_heads")
    return filled


def _floats_for_integers(model: type[BaseModel], config: HuggingFaceConfig) -> dict[str, float]:
    """Return the floats of keys that have an integer in their place. Raises UserError if a key does not allow its value."""
    keys = {key: config[key] for key in model.model_fields if key in config and key not in _ROPE}
    try:
        values = model.model_validate_json(json.dumps(keys))
    except ValidationError as error:
        raise UserError(validation_message(_WHERE, keys, model, error), _REMEDY) from None
    return {key: value for key, value in values if isinstance(value, float) and type(keys.get(key)) is int}


def _check_one_network(config: HuggingFaceConfig, network: str) -> None:
    """Raise ValueError if two keys name different networks, or different numbers of experts."""
    named = config.get("architectures") or [network]
    if network.casefold() not in [name.casefold() for name in named]:
        raise ValueError(f"architectures is {named}; with model_type {config['model_type']} it must have {network}")
    experts, other = config.get("num_experts"), config.get("num_local_experts")
    if experts is not None and other is not None and experts != other:
        raise ValueError(f"num_experts {experts} differs from num_local_experts {other}; keep one of them")


def _check_head_width(config: HuggingFaceConfig) -> None:
    """Raise ValueError for a head_dim that transformers' network cannot have."""
    if "head_dim" not in config:
        return
    width, rotated = config["head_dim"], config.get("qk_rope_head_dim")
    if width is None and config["model_type"] != "llama":
        raise ValueError("head_dim is null; set it to an integer, or remove it")
    if has_latent_attention(config) and width != rotated:
        raise ValueError(f"head_dim is {width}; with latent attention it must be qk_rope_head_dim, {rotated}")
    if (width or 0) % 2:
        raise ValueError(f"the head width is {width}; rotary embeddings need an even width")
