"""A generation_config.json with which transformers cannot load the export is refused."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from longhaul.config.generation_keys import check_generation_keys
from longhaul.errors import UserError
from tests.unit.config.test_pretrained_keys import ODD_VALUES


def failure(settings: dict[str, Any], folder: Path) -> str:
    """Return the error with which transformers loads these settings or prints them; "" without one."""
    from transformers import GenerationConfig

    (folder / "generation_config.json").write_text(json.dumps(settings))
    try:
        loaded = GenerationConfig.from_pretrained(folder)
        loaded.validate()
        loaded.to_json_string()
        GenerationConfig.from_dict(loaded.to_dict())
    except Exception as error:  # whatever transformers raises, the export would end with it
        return repr(error)
    return ""


def test_settings_that_transformers_cannot_load_are_refused(tmp_path: Path):
    from transformers import GenerationConfig

    failures: dict[tuple[str, str], str] = {}
    for key, value in product(sorted(vars(GenerationConfig())), ODD_VALUES):
        settings = {"eos_token_id": [1, 2], key: value}
        try:
            check_generation_keys(settings)
        except UserError:
            continue
        failures[key, repr(value)] = failure(settings, tmp_path)
    assert {case: error for case, error in failures.items() if error} == {}


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "offloaded_static", "quantized", "hybrid"])
def test_every_usual_cache_is_accepted(cache: str, tmp_path: Path):
    settings = {"eos_token_id": 1, "cache_implementation": cache}
    check_generation_keys(settings)
    assert not failure(settings, tmp_path)


def test_usual_settings_are_accepted(tmp_path: Path):
    settings = {"bos_token_id": 1, "eos_token_id": [1, 2], "pad_token_id": 1, "do_sample": True, "temperature": 0.7}
    settings |= {"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "transformers_version": "4.37.0"}
    check_generation_keys(settings)
    assert not failure(settings, tmp_path)


def test_a_comment_is_accepted(tmp_path: Path):
    settings = {"eos_token_id": 1, "__comment": "x"}
    check_generation_keys(settings)
    assert not failure(settings, tmp_path)


def test_no_key_replaces_what_transformers_class_has():
    """Without the refusal, `to_dict: 1` ends the export, after the whole training."""
    from transformers import GenerationConfig

    for name in set(dir(GenerationConfig)) - set(vars(GenerationConfig())):
        users = "Python uses" if name.startswith("__") else "transformers' generation classes use"
        message = f"generation_config.json: '{name}' is a name that {users}"
        with pytest.raises(UserError, match=message) as refused:
            check_generation_keys({name: 1})
        assert "remove this key" in str(refused.value)
