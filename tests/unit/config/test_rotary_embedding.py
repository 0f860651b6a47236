"""Keys of rope_scaling: what is refused, and the frequencies that follow from the rest."""

from __future__ import annotations

import math
from typing import Any

import pytest

from longhaul.config.architectures import Model
from longhaul.config.rotary_embedding import check_rope, rotary_numbers
from tests.support.small_configs import LLAMA

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 32,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear as type": {"type": "linear", "factor": 4.0},
    "linear as rope_type": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn without positions": {"type": "yarn", "factor": 4},
    "yarn untruncated": {**YARN, "truncate": False, "beta_fast": 16, "beta_slow": 2},
    "yarn with attention factor": {**YARN, "attention_factor": 1.5},
    "yarn with mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
    "llama3": LLAMA3,
    "longrope": LONGROPE,
}


def rotary_of_transformers(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(AutoConfig.for_model("llama", **config))


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_numbers_equal_those_of_transformers(scaling: dict[str, Any], theta: float):
    config = {**LLAMA, "rope_theta": theta, "rope_scaling": dict(scaling) or None}
    check_rope(config)
    rotary, numbers = rotary_of_transformers({**config, "rope_scaling": dict(scaling) or None}), rotary_numbers(config)
    assert numbers.inverse_frequencies == pytest.approx(rotary.inv_freq.tolist(), rel=1e-5)
    assert numbers.attention_scale == pytest.approx(rotary.attention_scaling)


@pytest.mark.parametrize("word", ["type", "rope_type"])
def test_both_words_for_the_type_scale_the_network(word: str):
    """Width 16: pair i turns by 10000^(-i/8) per position, a quarter of it with factor 4."""
    llama = {**LLAMA, "rope_scaling": {word: "linear", "factor": 4.0}}
    config = Model.model_validate({"llama": llama}).config_dict()
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    rotary = rotary_of_transformers({key: value for key, value in config.items() if key != "model_type"})
    assert rotary.inv_freq.tolist() == pytest.approx([10_000 ** (-i / 8) / 4 for i in range(8)])


def test_deepseek_scales_the_logits_by_the_square_of_mscale():
    config = {"qk_rope_head_dim": 8, "max_position_embeddings": 160, "rope_scaling": {**YARN, "mscale_all_dim": 1.0}}
    numbers = rotary_numbers(config)
    assert numbers.softmax_scale == pytest.approx((0.1 * math.log(4) + 1) ** 2)
    assert numbers.attention_scale == pytest.approx(0.1 * math.log(4) + 1)


REFUSED: dict[str, tuple[Any, str]] = {
    "no type": ({"factor": 4.0}, "has factor and no rope_type, so nothing would be scaled"),
    "two types": ({"type": "yarn", "rope_type": "linear", "factor": 4.0}, "type 'yarn' and rope_type 'linear'"),
    "unknown type": ({"type": "yarm", "factor": 4.0}, "rope_type is 'yarm'; use one of default, linear"),
    "type that is no word": ({"type": ["yarn"]}, r"rope_type is \['yarn'\]"),
    "factor of the default type": (
        {"rope_type": "default", "factor": 4.0},
        "factor has no effect with rope_type default",
    ),
    "no factor": ({"type": "yarn"}, "rope_type yarn has no factor"),
    "factor null": ({"type": "linear", "factor": None}, "factor is None"),
    "factor as text": ({"type": "linear", "factor": "4"}, "factor is '4'; it must be a number from 1"),
    "factor true": ({"type": "linear", "factor": True}, "factor is True"),
    "negative factor": ({"type": "linear", "factor": -4.0}, "factor is -4.0; it must be a number from 1"),
    "factor below 1": ({"type": "linear", "factor": 0.25}, "factor is 0.25; it must be a number from 1"),
    "absurd factor": ({"type": "linear", "factor": 1e30}, r"factor is 1e\+30; it must be at most 1e\+06"),
    "misspelt key": ({**YARN, "beta_fst": 16}, "beta_fst has no effect with rope_type yarn, whose keys are: factor"),
    "key of another type": ({"type": "linear", "factor": 2.0, "beta_fast": 16}, "beta_fast has no effect"),
    "theta inside": (
        {"type": "linear", "factor": 2.0, "rope_theta": 5e5},
        "rope_theta 500000.0 differs from rope_theta",
    ),
    "llama3 alone": ({"rope_type": "llama3"}, "rope_type llama3 has no factor"),
    "llama3 without positions": (
        {key: value for key, value in LLAMA3.items() if "original" not in key},
        "has no original_max_position_embeddings",
    ),
    "llama3 in the wrong order": ({**LLAMA3, "low_freq_factor": 8.0}, "low_freq_factor 8.0 must be less than high"),
    "yarn in the wrong order": ({**YARN, "beta_fast": 1}, "beta_slow 1 must be less than beta_fast 1"),
    "positions as a fraction": ({**YARN, "original_max_position_embeddings": 32.5}, "must be an integer from 1"),
    "half of mscale": ({**YARN, "mscale": 1.0}, "mscale has no effect without mscale_all_dim"),
    "other half of mscale": ({**YARN, "mscale_all_dim": 1.0}, "mscale_all_dim has no effect without mscale"),
    "mscale with a factor": (
        {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0},
        "mscale has no effect with attention_factor",
    ),
    "truncate as text": ({**YARN, "truncate": "no"}, "truncate is 'no'; it must be true or false"),
    "longrope of another width": ({**LONGROPE, "short_factor": [1.0]}, "short_factor must be a list of 8 positive"),
    "a list": ([1], r"rope_scaling is \[1\]; it must hold keys and values"),
}


@pytest.mark.parametrize(("scaling", "message"), REFUSED.values(), ids=REFUSED)
def test_unusable_and_ineffective_keys_are_refused(scaling: Any, message: str):
    with pytest.raises(ValueError, match=message):
        check_rope({**LLAMA, "rope_theta": 10_000.0, "rope_scaling": scaling})


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_types_without_use_for_a_new_model_are_refused(kind: str):
    scaling = {"rope_type": kind, "factor": 2.0} if kind == "dynamic" else LONGROPE
    with pytest.raises(ValueError, match=r"rope_scaling"):
        Model.model_validate({"llama": {**LLAMA, "rope_scaling": scaling}})
