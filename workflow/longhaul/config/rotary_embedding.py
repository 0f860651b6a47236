"""Checks `rope_scaling` (keys of each rope_type: linear, dynamic, yarn, longrope, llama3), and computes the rotary frequencies.

transformers ignores a key that its rope_type does not use, so a misspelt key would train another model without an error. The
formulas here are written from the papers, and the trainer compares the network with them before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

from longhaul.config.field_types import HuggingFaceConfig

DEFAULT_THETA = 10_000.0
MAX_FACTOR = 1e6


@dataclass(frozen=True)
class _RopeType:
    """Keys of one rope_type: numbers that must be there, and numbers and switches that may be there."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


# Sources: linear https://arxiv.org/abs/2306.15595; yarn https://arxiv.org/abs/2309.00071; longrope
# https://arxiv.org/abs/2402.13753; llama3: Llama 3.1's model code; dynamic: as linear, but only beyond max_position_embeddings.
_POSITIONS = "original_max_position_embeddings"
_YARN = (_POSITIONS, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_TYPES = {
    "default": _RopeType(),
    "linear": _RopeType(("factor",)),
    "dynamic": _RopeType(("factor",)),
    "yarn": _RopeType(("factor",), _YARN),
    "longrope": _RopeType(("short_factor", "long_factor"), ("factor", "attention_factor", _POSITIONS)),
    "llama3": _RopeType(("factor", "low_freq_factor", "high_freq_factor", _POSITIONS)),
}
# Types of a new model. `dynamic` changes nothing up to max_position_embeddings, the longest sequence that trains; the factors
# of `longrope` come from a search on a trained model.
NEW_MODEL_TYPES = ("default", "linear", "yarn", "llama3")
_LISTS = ("short_factor", "long_factor")
_MIN_VALUES = {"factor": 1, _POSITIONS: 1}


@dataclass(frozen=True)
class RotaryNumbers:
    """The values that the rotary embedding of a network computes.

    inverse_frequencies: angle per position of each pair of elements
    attention_scale:     factor of sine and cosine
    softmax_scale:       factor of the attention's logits, in addition to 1 / sqrt(head width); DeepSeek's MLA alone has one
    """

    inverse_frequencies: tuple[float, ...]
    attention_scale: float
    softmax_scale: float


def rope_parameters(config: HuggingFaceConfig) -> HuggingFaceConfig:
    """Return the rotary keys of a Hugging Face config in one form: with rope_type, without the older word `type`.

    Raises:
        ValueError: the config says two different things.
    """
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name} is {value!r}; it must hold keys and values")
    rope = _one_type(scaling or parameters or {})
    if scaling and parameters:
        _check_agreement(rope, _one_type(parameters))
    theta = rope.setdefault("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    if config.get("rope_theta", theta) != theta:
        name = "rope_scaling" if scaling else "rope_parameters"
        raise ValueError(f"{name}.rope_theta {theta!r} differs from rope_theta {config['rope_theta']!r}")
    return rope


def _one_type(rope: HuggingFaceConfig) -> HuggingFaceConfig:
    """Return the keys with rope_type in place of the older word `type`."""
    found = dict(rope)
    kind = found.pop("type", None)
    if kind is not None and found.setdefault("rope_type", kind) != kind:
        raise ValueError(f"rope_scaling has type {kind!r} and rope_type {found['rope_type']!r}; keep one of them")
    return found


def _check_agreement(scaling: HuggingFaceConfig, parameters: HuggingFaceConfig) -> None:
    """Raise ValueError if rope_scaling and rope_parameters, which transformers 5 writes, say different things."""
    defaults = {"rope_type": "default"}
    shared = {"rope_type"} | (scaling.keys() & parameters.keys())
    for key in sorted(shared):
        one, other = ({**defaults, **keys}[key] for keys in (scaling, parameters))
        if one != other:
            raise ValueError(
                f"rope_scaling.{key} {one!r} differs from rope_parameters.{key} {other!r}; keep one of them"
            )


def check_rope(config: HuggingFaceConfig) -> None:
    """Raise ValueError if a rotary key of a Hugging Face config is missing, unusable or without effect."""
    rope = rope_parameters(config)
    theta = rope.pop("rope_theta")
    if not _is_number(theta) or not 1 < theta <= 1e12:
        raise ValueError(f"rope_theta is {theta!r}; it must be a number above 1 and at most 1e12")
    kind = rope.pop("rope_type", None)
    if kind is None and rope:
        raise ValueError(
            f"rope_scaling has {', '.join(rope)} and no rope_type, so nothing would be scaled; set rope_type"
        )
    known = _TYPES.get("default" if kind is None else kind) if isinstance(kind, str | None) else None
    if known is None:
        raise ValueError(f"rope_scaling.rope_type is {kind!r}; use one of {', '.join(_TYPES)}")
    _check_keys(rope, kind or "default", known)
    for key, value in rope.items():
        _check_value(key, value, rotary_width(config))
    _check_effect(rope, has_softmax_scale=_has_latent_attention(config))
    if (part := config.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError(f"partial_rotary_factor {part!r} has no effect in this architecture; remove it")


def _check_keys(rope: HuggingFaceConfig, kind: str, known: _RopeType) -> None:
    for key in known.required:
        if key not in rope:
            raise ValueError(f"rope_scaling with rope_type {kind} has no {key}; set it")
    for key in rope:
        if key not in (*known.required, *known.optional):
            keys = ", ".join((*known.required, *known.optional)) or "none"
            raise ValueError(
                f"rope_scaling.{key} has no effect with rope_type {kind}, whose keys are: {keys}; remove it"
            )


def _check_value(key: str, value: object, width: int) -> None:
    if key == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"rope_scaling.truncate is {value!r}; it must be true or false")
        return
    if key in _LISTS:
        if not isinstance(value, list | tuple) or len(value) != width // 2 or not all(map(_is_positive, value)):
            raise ValueError(f"rope_scaling.{key} must be a list of {width // 2} positive numbers, one for each pair")
        return
    lowest = _MIN_VALUES.get(key, 0)
    if not _is_positive(value) or value < lowest or (key == _POSITIONS and type(value) is not int):
        kind = "an integer" if key == _POSITIONS else "a number"
        limits = f"from {lowest}" if lowest else "above 0"
        raise ValueError(f"rope_scaling.{key} is {value!r}; it must be {kind} {limits}")
    if key == "factor" and value > MAX_FACTOR:
        raise ValueError(f"rope_scaling.factor is {value!r}; it must be at most {MAX_FACTOR:g}")


def _check_effect(rope: HuggingFaceConfig, has_softmax_scale: bool) -> None:
    """Raise ValueError for keys that another key switches off, and for two limits in the wrong order."""
    if "mscale" in rope and "mscale_all_dim" not in rope:
        raise ValueError("rope_scaling.mscale has no effect without mscale_all_dim; set both or none")
    if "mscale_all_dim" in rope and "mscale" not in rope and not has_softmax_scale:
        raise ValueError("rope_scaling.mscale_all_dim has no effect without mscale; set both or none")
    if "attention_factor" in rope and "mscale" in rope:
        raise ValueError("rope_scaling.mscale has no effect with attention_factor; keep one of them")
    for low, high, defaults in (("beta_slow", "beta_fast", (1, 32)), ("low_freq_factor", "high_freq_factor", (0, 1e9))):
        if rope.get(low, defaults[0]) >= rope.get(high, defaults[1]):
            raise ValueError(
                f"rope_scaling.{low} {rope.get(low, defaults[0])} must be less than {high} {rope.get(high, defaults[1])}"
            )


def rotary_numbers(config: HuggingFaceConfig) -> RotaryNumbers:
    """Return what the rotary embedding of a network must compute; `check_rope` has accepted the config."""
    rope = rope_parameters(config)
    kind, positions = rope.get("rope_type", "default"), config["max_position_embeddings"]
    width = rotary_width(config)
    plain = [rope["rope_theta"] ** (-2 * pair / width) for pair in range(width // 2)]
    scale = softmax = 1.0
    if kind == "linear":
        plain = [frequency / rope["factor"] for frequency in plain]
    elif kind == "yarn":
        plain = _yarn_frequencies(plain, rope, rope.get(_POSITIONS, positions), width)
        scale = _yarn_attention_scale(rope)
    elif kind == "longrope":
        plain = [frequency / factor for frequency, factor in zip(plain, rope["short_factor"], strict=True)]
        scale = _longrope_attention_scale(rope, positions)
    elif kind == "llama3":
        plain = [_llama3_frequency(frequency, rope) for frequency in plain]
    if kind != "default" and _has_latent_attention(config) and "mscale_all_dim" in rope:
        softmax = _mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return RotaryNumbers(tuple(plain), scale, softmax)


def rotary_width(config: HuggingFaceConfig) -> int:
    """Return the number of elements of a head that are rotated."""
    if _has_latent_attention(config):
        return config["qk_rope_head_dim"]
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _has_latent_attention(config: HuggingFaceConfig) -> bool:
    return "qk_rope_head_dim" in config


def _yarn_frequencies(plain: list[float], rope: HuggingFaceConfig, positions: int, width: int) -> list[float]:
    """Return frequencies between the plain ones (fast pairs) and those divided by factor (slow pairs)."""

    def pair_with(rotations: float) -> float:
        return width * math.log(positions / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = pair_with(rope.get("beta_fast", 32)), pair_with(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = (high - low) or 0.001
    shares = [min(1.0, max(0.0, (pair - low) / span)) for pair in range(len(plain))]
    return [frequency * (1 - share + share / rope["factor"]) for frequency, share in zip(plain, shares, strict=True)]


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention_scale(rope: HuggingFaceConfig) -> float:
    if "attention_factor" in rope:
        return rope["attention_factor"]
    if "mscale" in rope:
        return _mscale(rope["factor"], rope["mscale"]) / _mscale(rope["factor"], rope["mscale_all_dim"])
    return _mscale(rope["factor"])


def _longrope_attention_scale(rope: HuggingFaceConfig, positions: int) -> float:
    original = rope.get(_POSITIONS, positions)
    factor = rope.get("factor", positions / original)
    if "attention_factor" in rope:
        return rope["attention_factor"]
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3_frequency(frequency: float, rope: HuggingFaceConfig) -> float:
    """Return the frequency itself for short waves, divided by factor for long ones, and a mean of both in between."""
    waves = rope[_POSITIONS] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = min(1.0, max(0.0, (waves - low) / (high - low)))
    return frequency * (share + (1 - share) / rope["factor"])


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: object) -> TypeGuard[int | float]:
    return _is_number(value) and value > 0
