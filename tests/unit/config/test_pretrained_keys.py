"""Values of a pretrained config.json: what transformers refuses in the training job, the plan refuses before."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from longhaul.config.architectures import ARCHITECTURES, Model
from longhaul.config.pretrained_format import trained_config
from longhaul.config.pretrained_keys import check_pretrained_keys
from longhaul.errors import UserError
from tests.support.small_configs import DEEPSEEK, DEEPSEEK_V2, LLAMA

EXPERTS = {**LLAMA, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 16},
    "qwen3_moe": EXPERTS,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK,
}
OFFICIAL = Path(__file__).parents[1] / "export" / "official_repositories.json"
CLASS_NAMES_THAT_ARE_KEYS = {
    "_attn_implementation",
    "_experts_implementation",
    "keys_to_ignore_at_inference",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
}
"""Attributes of transformers' config classes, apart from their fields, that a config.json may hold."""
ODD_VALUES = ["no", "1", True, None, -1, 0, 1, 1.5, 2.0, 10**9, [], ["a"], [9], {}, {"a": 1}]


def failure(config: dict[str, Any]) -> str:
    """Return the error with which transformers builds this network or computes the logits of some tokens; "" without one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "use_cache": False}))
        assert model(torch.zeros(1, 8, dtype=torch.int64)).logits.shape[:2] == (1, 8)
    except Exception as error:  # whatever transformers raises, the training job would end with it
        return repr(error)
    return ""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_transformers_cannot_follow_is_refused(family: str):
    from transformers import CONFIG_MAPPING

    base = {"model_type": family, "tie_word_embeddings": False, **FAMILIES[family]}
    assert check_pretrained_keys(base) == base
    assert not failure(base)
    keys = {field.name for field in fields(CONFIG_MAPPING[family]) if not field.name.startswith("_")}
    keys |= {*base, "torch_dtype", "num_labels", "rope_theta", "rope_scaling", "sliding_window", "max_window_layers"}
    failures: dict[tuple[str, str], str] = {}
    for key, value in product(sorted(keys - {"model_type"}), ODD_VALUES):
        try:
            failures[key, repr(value)] = failure(check_pretrained_keys({**base, key: value}))
        except UserError:
            continue
    assert {case: error for case, error in failures.items() if error} == {}
    assert len(failures) > 60, "many of the odd values are valid"


@pytest.mark.parametrize("name", json.loads(OFFICIAL.read_text()))
def test_configs_of_official_repositories_are_accepted(name: str):
    config = json.loads(OFFICIAL.read_text())[name]["config"]
    assert check_pretrained_keys(config) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_replaces_what_transformers_config_class_has(family: str):
    """Without the refusal, `to_dict: x` ends the training job, and `attribute_map` lets one size stand for another."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[family]
    keys = {field.name for field in fields(config_class)} | {"model_type"}
    base = {"model_type": family, "tie_word_embeddings": False, **FAMILIES[family]}
    for name in set(dir(config_class)) - keys - CLASS_NAMES_THAT_ARE_KEYS:
        users = "Python uses" if name.startswith("__") else "transformers' config classes use"
        with pytest.raises(UserError, match=f"config.json: '{name}' is a name that {users}"):
            check_pretrained_keys({**base, name: {}})


def test_a_comment_is_accepted():
    config = {"model_type": "llama", "tie_word_embeddings": False, **LLAMA, "__comment": "x"}
    assert not failure(config)
    assert check_pretrained_keys(config) == config


@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_functions_that_config_json_chooses_are_left_out(key: str):
    base = {"model_type": "llama", "tie_word_embeddings": False, **LLAMA}
    for chosen in ({key: "not_installed"}, {f"_{key}": "not_installed"}):
        assert failure({**base, **chosen})
        assert trained_config(check_pretrained_keys({**base, **chosen})) == base


def test_an_integer_becomes_the_float_that_transformers_needs():
    config = {"model_type": "deepseek_v3", **DEEPSEEK, "routed_scaling_factor": 2, "attention_dropout": 0}
    assert failure(config)
    checked = check_pretrained_keys(config)
    assert [type(checked[key]) for key in ("routed_scaling_factor", "attention_dropout")] == [float, float]
    assert checked == config
    assert not failure(checked)


def test_both_names_of_the_number_of_experts_are_read():
    renamed = {"model_type": "qwen3_moe", **EXPERTS, "num_local_experts": 4}
    del renamed["num_experts"]
    assert check_pretrained_keys(renamed) == renamed


@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_section_model_that_are_accepted_can_be_computed(family: str):
    sizes = FAMILIES[family]
    failures: dict[tuple[str, str], str] = {}
    for key, value in product(ARCHITECTURES[family].model_fields, (*ODD_VALUES, 66)):
        try:
            model = Model.model_validate_json(json.dumps({family: {**sizes, key: value}}))
        except ValidationError:
            continue
        failures[key, repr(value)] = failure(model.config_dict())
    assert {case: error for case, error in failures.items() if error} == {}
    assert len(failures) > 15, "many of the odd values are valid"
