"""An export keeps what the pretrained folder says about its model."""

from __future__ import annotations

from longhaul.export.pretrained_settings import (
    end_token_ids,
    generation_settings,
    special_token_ids,
    with_unknown_keys,
)

TOKENIZER: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 2}


def test_ids_of_the_pretrained_model_stay():
    base = {"bos_token_id": 5, "eos_token_id": [1, 9], "pad_token_id": None}
    assert special_token_ids(base, TOKENIZER) == {"bos_token_id": 5, "eos_token_id": [1, 9], "pad_token_id": 2}


def test_the_tokenizers_end_is_always_an_end():
    """A chat template ends a turn with <|im_end|>, where the base model's config names <|endoftext|> alone."""
    assert special_token_ids({"eos_token_id": 9}, TOKENIZER)["eos_token_id"] == [9, 1]
    assert special_token_ids({"eos_token_id": 1}, TOKENIZER)["eos_token_id"] == 1
    assert special_token_ids({}, TOKENIZER)["eos_token_id"] == 1


def test_sampling_values_stay():
    base = {"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 9], "transformers_version": "4.45.0"}
    assert generation_settings(base, {"eos_token_id": [5, 6]}, TOKENIZER) == base | {"pad_token_id": 2}
    assert generation_settings({}, {}, TOKENIZER) == {"eos_token_id": 1, "pad_token_id": 2}


def test_ends_of_the_models_config_count_without_a_generation_config():
    """transformers takes them from config.json where the folder has no generation_config.json."""
    assert generation_settings({}, {"eos_token_id": [7, 8]}, TOKENIZER)["eos_token_id"] == [7, 8, 1]
    assert generation_settings({"temperature": 0.6}, {"eos_token_id": 1}, TOKENIZER)["eos_token_id"] == 1


def test_a_text_ends_at_one_token_at_any_of_several_or_nowhere():
    assert end_token_ids(generation_settings({"eos_token_id": [0, 9]}, {}, TOKENIZER)) == {0, 9, 1}
    assert end_token_ids({"eos_token_id": 0}) == {0}
    assert end_token_ids({"eos_token_id": None}) == end_token_ids({}) == set()


def test_unknown_keys_stay_and_descriptions_of_the_folder_go():
    base = {"my_key": {"a": 1}, "hidden_size": 64, "auto_map": {"AutoConfig": "x--y"}, "rope_theta": 5e5}
    written = {"hidden_size": 64, "rope_parameters": {"rope_theta": 5e5}}
    assert with_unknown_keys(written, base) == written | {"my_key": {"a": 1}}
