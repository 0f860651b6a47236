"""Exports have the keys, tensor names, shapes and types of each family's official repository.

official_repositories.json records these facts: the content of config.json, and name pattern -> data type and shape. `*` stands
for a layer or an expert. Sources: the repositories' config.json; the layouts in DeepSeek's README_WEIGHTS.md and modelling code
and in those of Llama and Qwen.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig

from longhaul.checkpoint_io import LazyTensor
from longhaul.config.architectures import Model
from longhaul.config.hub_tensors import untied_where_servers_do_not_tie
from longhaul.config.rotary_embedding import rotary_numbers
from longhaul.export.exported_tensors import ExportedTensor, list_exported_tensors
from longhaul.export.fp8_tensors import with_fp8_matrices
from longhaul.export.hub_config import with_official_keys, write_hub_config
from longhaul.export.model_without_memory import meta_model
from longhaul.export.pretrained_settings import SPECIAL_TOKENS
from longhaul.export.safetensors_writer import SAFETENSORS_NAMES

OFFICIAL: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("official_repositories.json").read_text())
SGLANG = json.loads(Path(__file__).with_name("sglang_config_keys.json").read_text())
# Keys that say how a repository was made or trained and that no server reads.
NOT_OF_THE_NETWORK = {
    "auto_map",
    "transformers_version",
    "aux_loss_alpha",
    "seq_aux",
    "use_mrope",
    "quantization_config",
}
# The exported network has no multi-token prediction layers; transformers drops a window that is not used.
OTHER_VALUES = {"num_nextn_predict_layers": 0, "sliding_window": None}
# Keys that transformers 5 adds. No server reads another meaning into them.
ADDED = {
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "layer_types",
    "mlp_bias",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "qk_head_dim",
    "rope_interleave",
    "rope_parameters",
    "rope_scaling",
    "transformers_version",
}


def trained_config(official: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the model_config.json that the trainer writes for this network, stated with longhaul's own config keys."""
    family = official["model_type"]
    (decoder, _) = get_args(Model.model_fields[family].annotation)
    keys = {key: tuple(value) if isinstance(value, list) else value for key, value in official.items()} | changes
    return Model(**{family: {key: value for key, value in keys.items() if key in decoder.model_fields}}).config_dict()


def exported_config(
    folder: Path, official: dict[str, Any], dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> dict[str, Any]:
    """Return the content of the config.json of an export of this network."""
    base = trained_config(official, **changes) | {key: official[key] for key in SPECIAL_TOKENS if key in official}
    path = folder / "config.json"
    write_hub_config(path, base, dict.fromkeys(SPECIAL_TOKENS), official["architectures"][0], dtype)
    return json.loads(path.read_text())


def exported_tensors(config: dict[str, Any], dtype: torch.dtype) -> tuple[ExportedTensor, ...]:
    """Return the tensors of an export of a trained model, as the exporter lists them from a checkpoint."""
    trained = meta_model(config)
    state = trained.state_dict()
    aliases = ("lm_head.weight",) if config["tie_word_embeddings"] else ()
    masters = {
        name: LazyTensor(tuple(value.shape), torch.float32, (), aliases if name == "model.embed_tokens.weight" else ())
        for name, value in state.items()
        if name not in aliases
    }
    return list_exported_tensors(trained, meta_model(untied_where_servers_do_not_tie(config)), masters, dtype)


def description(tensors: tuple[ExportedTensor, ...]) -> dict[str, Any]:
    """Return name pattern -> data type and shape."""
    return {
        re.sub(r"\.\d+\.", ".*.", tensor.name): {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
        }
        for tensor in tensors
    }


@pytest.mark.parametrize("repository", OFFICIAL)
def test_config_has_the_keys_and_values_of_the_official_repository(tmp_path: Path, repository: str):
    official = OFFICIAL[repository]["config"]
    written = exported_config(tmp_path, official)
    expected = {key: value for key, value in official.items() if key not in NOT_OF_THE_NETWORK}
    expected |= {key: value for key, value in OTHER_VALUES.items() if key in expected}
    if scaling := expected.get("rope_scaling"):
        # DeepSeek's repositories say `type`; the export says both, as servers and transformers want.
        expected["rope_scaling"] = {"rope_type": scaling.get("type"), **scaling}
    if "num_experts" in expected:
        # transformers 5 reads this name, too. Official repositories and servers say num_experts.
        expected["num_local_experts"] = expected["num_experts"]
    assert {key: written.get(key, "missing") for key in expected} == expected
    assert set(written) - set(expected) <= ADDED


@pytest.mark.parametrize("repository", OFFICIAL)
def test_config_has_every_key_that_sglang_reads_without_a_default(tmp_path: Path, repository: str):
    """SGLang reads config.json through transformers 5. sglang_config_keys.json records the keys, from its model code."""
    exported_config(tmp_path, OFFICIAL[repository]["config"])
    config = AutoConfig.from_pretrained(tmp_path)
    assert [key for key in SGLANG["keys"][config.model_type] if not hasattr(config, key)] == []


@pytest.mark.parametrize("repository", OFFICIAL)
def test_tensors_have_the_names_shapes_and_types_of_the_official_repository(repository: str):
    official = OFFICIAL[repository]
    layers = official["config"].get("first_k_dense_replace", 0) + 1
    found = description(exported_tensors(trained_config(official["config"], num_hidden_layers=layers), torch.bfloat16))
    unquantized = {"F8_E4M3": "BF16"}
    expected = {
        name: tensor | {"dtype": unquantized.get(tensor["dtype"], tensor["dtype"])}
        for name, tensor in official["tensors"].items()
        if not name.endswith("_scale_inv")
    }
    assert found == expected


def test_fp8_export_is_stored_as_deepseek_publishes(tmp_path: Path):
    official = OFFICIAL["deepseek-ai/DeepSeek-R1"]
    tensors = exported_tensors(trained_config(official["config"], num_hidden_layers=4), torch.bfloat16)
    assert description(tuple(with_fp8_matrices(tensors))) == official["tensors"]
    written = exported_config(tmp_path, official["config"], torch.float8_e4m3fn)
    for key in ("quantization_config", "torch_dtype"):
        assert written[key] == official["config"][key]


@pytest.mark.parametrize("repository", OFFICIAL)
def test_both_forms_of_the_rotary_keys_say_the_same(tmp_path: Path, repository: str):
    written = exported_config(tmp_path, OFFICIAL[repository]["config"])
    older = {key: value for key, value in written.items() if key != "rope_parameters"}
    newer = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}
    assert rotary_numbers(older) == rotary_numbers(newer) == rotary_numbers(OFFICIAL[repository]["config"])


@pytest.mark.parametrize(
    "repository", ["deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V2-Lite", "Qwen/Qwen3-30B-A3B"]
)
def test_a_tied_head_is_written_out_where_servers_do_not_tie(tmp_path: Path, repository: str):
    official = OFFICIAL[repository]["config"]
    assert exported_config(tmp_path, official, tie_word_embeddings=True)["tie_word_embeddings"] is False
    tensors = exported_tensors(trained_config(official, num_hidden_layers=1, tie_word_embeddings=True), torch.float32)
    by_name = {tensor.name: tensor for tensor in tensors}
    assert by_name["lm_head.weight"].master is by_name["model.embed_tokens.weight"].master


def test_transformers_reads_the_written_keys_as_it_wrote_them(tmp_path: Path):
    official = OFFICIAL["deepseek-ai/DeepSeek-R1"]["config"]
    exported_config(tmp_path, official)
    read = AutoConfig.from_pretrained(tmp_path)
    assert rotary_numbers(read.to_dict()) == rotary_numbers(trained_config(official))
    assert read.dtype == torch.bfloat16


def test_the_scaled_positions_are_always_stated():
    """transformers takes max_position_embeddings where the key is missing; vLLM fails."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    config = {"model_type": "deepseek_v3", "max_position_embeddings": 512, "rope_parameters": rope}
    assert with_official_keys(config)["rope_scaling"]["original_max_position_embeddings"] == 512


def test_the_factor_is_a_float_for_servers():
    """Source: LinearScalingRotaryEmbedding of vLLM 0.32 and of SGLang 0.5.23 (layers/rotary_embedding/base.py)."""
    rope = {"rope_type": "linear", "factor": 4, "rope_theta": 1e4}
    written = with_official_keys({"model_type": "llama", "max_position_embeddings": 512, "rope_parameters": rope})
    found = (written["rope_parameters"]["factor"], written["rope_scaling"]["factor"])
    assert [(type(factor), factor) for factor in found] == [(float, 4.0)] * 2


@pytest.mark.parametrize(
    "keys", [{}, {"factor": 2.0}, {"original_max_position_embeddings": 128}, {"attention_factor": 1.5}]
)
def test_transformers_4_gets_the_positions_and_the_scale_of_longrope(keys: dict[str, Any]):
    """It reads the positions beside rope_scaling alone, and fails without them and a factor."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, **keys}
    sizes = {"model_type": "llama", "max_position_embeddings": 512, "hidden_size": 64, "num_attention_heads": 4}
    written = with_official_keys({**sizes, "rope_parameters": rope})
    positions = keys.get("original_max_position_embeddings", 512)
    assert written["original_max_position_embeddings"] == positions
    assert written["rope_scaling"]["original_max_position_embeddings"] == positions
    trained = rotary_numbers({**sizes, "rope_parameters": rope})
    assert written["rope_scaling"]["attention_factor"] == trained.attention_scale
    assert rotary_numbers(written) == trained


def test_keys_of_a_pretrained_folder_do_not_override_the_network():
    base = {"model_type": "deepseek_v3", "rope_theta": 5.0, "num_nextn_predict_layers": 1, "scoring_func": "softmax"}
    written = with_official_keys(base | {"max_position_embeddings": 8})
    assert (written["num_nextn_predict_layers"], written["scoring_func"]) == (0, "sigmoid")
