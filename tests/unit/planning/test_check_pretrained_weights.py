"""The plan compares names and shapes in the headers of a pretrained folder with its config.json."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from longhaul.errors import UserError
from longhaul.planning.check_pretrained_weights import check_pretrained_weights
from tests.support.small_configs import DEEPSEEK, LLAMA, plan_of, write_weights

CONFIG: dict[str, Any] = {"model_type": "llama", **LLAMA}
V3: dict[str, Any] = {"model_type": "deepseek_v3", **DEEPSEEK}


def refusal(folder: Path, config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        check_pretrained_weights(folder, config)
    assert refused.value.hint
    return refused.value.message


def add_tensors(path: Path, *names: str) -> None:
    """Write a file of empty tensors."""
    header = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "missing keys: model.layers.2.input_layernorm.weight, "),
        ({"num_hidden_layers": 1}, "unexpected keys: model.layers.1.input_layernorm.weight, "),
        (
            {"intermediate_size": 65},
            "model.layers.0.mlp.gate_proj.weight has shape [128, 64], the model expects [65, 64]",
        ),
        ({"vocab_size": 401}, "model.embed_tokens.weight has 400 rows, but config.json's vocab_size is 401"),
        ({"model_type": "qwen3"}, "missing keys: model.layers.0.self_attn.k_norm.weight, "),
        ({"attention_bias": True}, "missing keys: model.layers.0.self_attn.k_proj.bias, "),
    ],
)
def test_weights_of_another_config_are_refused_until_it_is_restored(
    changes: dict[str, Any], message: str, tmp_path: Path
):
    write_weights(tmp_path / "a.safetensors", CONFIG)
    assert message in refusal(tmp_path, {**CONFIG, **changes})
    check_pretrained_weights(tmp_path, CONFIG)


def test_a_tensor_in_two_files_or_a_damaged_header_is_refused_until_removed(tmp_path: Path):
    write_weights(tmp_path / "a.safetensors", CONFIG)
    add_tensors(tmp_path / "b.safetensors", "model.norm.weight")
    assert "model.norm.weight is in two files, the second is b.safetensors" in refusal(tmp_path, CONFIG)
    (tmp_path / "b.safetensors").write_text("short")
    assert "b.safetensors has 5 bytes" in refusal(tmp_path, CONFIG)
    header = json.dumps({"model.norm.bias": {"dtype": "F32", "data_offsets": [0, 0]}}).encode()
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "no valid safetensors header: model.norm.bias has no shape" in refusal(tmp_path, CONFIG)
    (tmp_path / "b.safetensors").unlink()
    check_pretrained_weights(tmp_path, CONFIG)


def test_what_a_folder_may_hold_beside_the_model_is_accepted(tmp_path: Path):
    """Rotary frequencies of older releases, a tied head, factors of FP8 and a layer of multi-token prediction."""
    tied = {**V3, "tie_word_embeddings": True}
    write_weights(tmp_path / "a.safetensors", tied)
    add_tensors(tmp_path / "b.safetensors", "model.layers.0.self_attn.rotary_emb.inv_freq")
    check_pretrained_weights(tmp_path, tied)
    names = ["lm_head.weight", "model.layers.0.self_attn.o_proj.weight_scale_inv", "model.layers.2.eh_proj.weight"]
    add_tensors(tmp_path / "b.safetensors", *names[1:])
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    check_pretrained_weights(tmp_path, {**tied, **fp8, "num_nextn_predict_layers": 1})
    assert "unexpected keys: model.layers.0.self_attn.o_proj.weight_scale_inv, " in refusal(tmp_path, tied)


def test_a_config_that_claims_billions_of_experts_ends_at_once(tmp_path: Path):
    write_weights(tmp_path / "a.safetensors", V3)
    began_s = time.monotonic()
    assert "missing keys: " in refusal(tmp_path, {**V3, "n_routed_experts": 10**9})
    assert time.monotonic() - began_s < 5


def test_a_header_with_60_000_unknown_names_is_refused_at_once(tmp_path: Path):
    write_weights(tmp_path / "a.safetensors", CONFIG)
    add_tensors(tmp_path / "b.safetensors", *(f"model.extra.{number}" for number in range(60_000)))
    began_s = time.monotonic()
    message = refusal(tmp_path, CONFIG)
    assert "unexpected keys: model.extra.0, " in message and "(60000 in all)" in message and len(message) < 2000
    assert time.monotonic() - began_s < 10


def test_the_plan_refuses_the_folder(tmp_path: Path):
    (tmp_path / "start").mkdir()
    (tmp_path / "start/config.json").write_text(json.dumps(CONFIG))
    write_weights(tmp_path / "start/model.safetensors", {**CONFIG, "hidden_size": 32})
    with pytest.raises(
        UserError, match=r"model.embed_tokens.weight has shape \[400, 32\], the model expects \[400, 64\]"
    ):
        plan_of(tmp_path, {"model": {"pretrained": {"path": "start"}}})
