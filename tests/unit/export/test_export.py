"""Exports of real ZeRO checkpoints: proved when all is well, and nothing left behind when anything is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longhaul.artifacts.schemas import Export
from longhaul.errors import UserError
from longhaul.export.export_checkpoint import run
from tests.support.stage_folder import Stage, make_stage
from tests.support.zero_training import CASES

EXPORTED = [
    ("llama-z0", "fp32"),
    ("llama-tied-z1", "fp32"),
    ("llama-tied-z3-bf16", "bf16"),
    ("qwen3-moe-z3", "fp32"),
    ("deepseek-v3-z1", "fp32"),
    ("deepseek-v3-z3-bf16", "bf16"),
]


def export(stage: Stage) -> Export:
    run(stage.job)
    return Export.read(Path(stage.job.out))


def refused(stage: Stage, says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(stage.job)
    assert not Path(stage.job.out).exists()
    assert not [path for path in Path(stage.job.folder).parent.glob("*main*")], "a folder that is not proved was left"


@pytest.mark.parametrize(("case", "dtype"), EXPORTED, ids=[case for case, _ in EXPORTED])
def test_what_is_exported_are_the_live_engines_weights(zero_checkpoints: Path, tmp_path: Path, case: str, dtype: str):
    """Against tensors that the training gathered from its engine and saved beside, not through a checkpoint."""
    made = export(make_stage(zero_checkpoints / case, tmp_path, dtype))
    assert made.proof["tensors"]["equal"] == made.proof["tensors"]["count"] > 0
    assert made.proof["from_pretrained"]["missing"] == made.proof["from_pretrained"]["unexpected"] == 0
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made.path, dtype="auto")
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    reference, state = load_file(zero_checkpoints / case / "reference.safetensors"), model.state_dict()
    for name, tensor in reference.items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name


def test_fp32_logits_are_equal_bit_by_bit(zero_checkpoints: Path, tmp_path: Path):
    made = export(make_stage(zero_checkpoints / "llama-z0", tmp_path, "fp32"))
    assert made.proof["logits"]["asked"] == "bit equality" and made.proof["logits"]["bit_equal"]


def test_tied_weights_are_stored_once(zero_checkpoints: Path, tmp_path: Path):
    made = export(make_stage(zero_checkpoints / "llama-tied-z1", tmp_path, "fp32"))
    names = {name for path in Path(made.path).glob("*.safetensors") for name in load_file(path)}
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_the_card_and_the_folder_say_where_it_comes_from(zero_checkpoints: Path, tmp_path: Path):
    made = export(make_stage(zero_checkpoints / "llama-z0", tmp_path, "bf16"))
    card = (Path(made.path) / "README.md").read_text()
    assert all(word in card for word in ("unit", "main", "d0", "c0")), card
    names = {path.name for path in Path(made.path).iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert names == set(made.files)


def test_the_card_says_what_became_of_pretrained_weights(zero_checkpoints: Path, tmp_path: Path):
    stage = make_stage(zero_checkpoints / "llama-z0", tmp_path, "bf16")
    job = stage.job.model_copy(update={"first_weights": ("Its FP8 weights were dequantised.", "Layers were left out.")})
    run(job)
    card = (Path(job.folder) / "README.md").read_text()
    assert "from random weights. Its FP8 weights were dequantised. Layers were left out." in card, card


def test_an_altered_file_is_refused(zero_checkpoints: Path, tmp_path: Path):
    stage = make_stage(zero_checkpoints / "llama-z0", tmp_path)
    victim = max(stage.tag.glob("*.pt"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    refused(stage, "SHA-256")


def test_an_altered_manifest_is_refused(zero_checkpoints: Path, tmp_path: Path):
    stage = make_stage(zero_checkpoints / "llama-z0", tmp_path)
    manifest = stage.tag / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    refused(stage, "manifest.json has SHA-256")


def test_a_missing_file_is_refused(zero_checkpoints: Path, tmp_path: Path):
    stage = make_stage(zero_checkpoints / "llama-tied-z1", tmp_path)
    next(stage.tag.glob("*optim_states.pt")).unlink()
    refused(stage, "is missing")


@pytest.mark.parametrize("change", ["missing", "left over", "another value"])
def test_a_tensor_that_is_not_the_trainers_is_refused(zero_checkpoints: Path, tmp_path: Path, change: str):
    stage = make_stage(zero_checkpoints / "llama-z0", tmp_path, "fp32")
    recorded = stage.tag / "proof" / "tensors.json"
    tensors = json.loads(recorded.read_text())
    name = "model.norm.weight"
    if change == "missing":
        del tensors[name]
    elif change == "left over":
        tensors["model.extra.weight"] = tensors[name]
    else:
        tensors[name]["sha256_fp32"] = "0" * 64
    recorded.write_text(json.dumps(tensors))
    stage.seal()
    refused(stage, "model.(norm|extra).weight")


def test_logits_that_are_not_the_trainers_are_refused(zero_checkpoints: Path, tmp_path: Path):
    stage = make_stage(zero_checkpoints / "llama-z0", tmp_path, "fp32")
    path = stage.tag / "proof" / "logits.safetensors"
    recorded = load_file(path)
    recorded["logits"][0, 0, 0] += 1e-3
    save_file(recorded, path)
    stage.seal()
    refused(stage, "logits of the export differ")


def test_a_checkpoint_without_proof_is_refused(zero_checkpoints: Path, tmp_path: Path):
    stage = make_stage(zero_checkpoints / "llama-z0", tmp_path)
    manifest = json.loads((stage.tag / "manifest.json").read_text())
    (stage.tag / "manifest.json").write_text(json.dumps(manifest | {"exportable": False}))
    import hashlib

    from tests.support.stage_folder import _write_checkpoint

    _write_checkpoint(stage.root, stage.tag, hashlib.sha256((stage.tag / "manifest.json").read_bytes()).hexdigest())
    refused(stage, "without the proof")


def test_every_case_is_trained(zero_checkpoints: Path):
    assert {path.name for path in zero_checkpoints.iterdir() if (path / "weights").is_dir()} == {
        name for cases in CASES.values() for name in cases
    }
