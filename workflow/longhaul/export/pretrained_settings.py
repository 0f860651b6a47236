"""Keeps settings of the pretrained folder in the export: generation_config.json, special token ids, unknown config keys."""

from __future__ import annotations

from longhaul.config.field_types import HuggingFaceConfig

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of a config.json that describe the pretrained folder itself, and those that transformers writes under another name.
_REPLACED = {"_name_or_path", "auto_map", "quantization_config", "torch_dtype", "rope_scaling", "rope_theta", "type"}


def special_token_ids(base: HuggingFaceConfig, tokenizer: dict[str, int | None]) -> HuggingFaceConfig:
    """Return the ids of the pretrained model, and those of the run's tokenizer where it has none.

    The tokenizer's end of a text is always among the ends: training taught the model to stop with it.
    """
    ids = {key: tokenizer[key] if base.get(key) is None else base[key] for key in SPECIAL_TOKENS}
    ends = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
    own = tokenizer["eos_token_id"]
    if own is not None and own not in ends:
        ids["eos_token_id"] = [*ends, own]
    return ids


def generation_settings(
    base: HuggingFaceConfig, model: HuggingFaceConfig, tokenizer: dict[str, int | None]
) -> HuggingFaceConfig:
    """Return the content of generation_config.json.

    base:  that of the pretrained model, or {}
    model: content of the model's config.json, whose ends of a text count where `base` names none, as in transformers
    """
    ends = {"eos_token_id": model.get("eos_token_id")} if base.get("eos_token_id") is None else {}
    found = base | special_token_ids(base | ends, tokenizer)
    return {key: value for key, value in found.items() if value is not None or key in base}


def end_token_ids(settings: HuggingFaceConfig) -> set[int]:
    """Return the tokens that end a text, by a generation_config.json: `generate` and servers stop at any of them."""
    ends = settings.get("eos_token_id")
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def with_unknown_keys(written: HuggingFaceConfig, base: HuggingFaceConfig) -> HuggingFaceConfig:
    """Return the content of the exported config.json with the keys of the pretrained one that transformers did not write."""
    return written | {key: value for key, value in base.items() if key not in written and key not in _REPLACED}
