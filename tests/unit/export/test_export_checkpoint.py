"""Exports of real ZeRO checkpoints succeed when all values agree, and leave no folder when any value differs."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longhaul.artifacts.artifact_schemas import Checkpoint, Export, TokenizerManifest
from longhaul.artifacts.atomic_files import file_sha256
from longhaul.artifacts.paths import WeightsFolder
from longhaul.checkpoint_io.tensor_slice import TensorSlice
from longhaul.errors import DiskFull, UserError
from longhaul.export.export_checkpoint import run
from longhaul.export.fp8_tensors import Fp8Matrix
from longhaul.export.generate_samples import NEW_TOKENS
from longhaul.export.model_without_memory import meta_model
from longhaul.train.pretrained_weights import pretrained_values
from tests.support.stage_folder import ExportableStage, create_exportable_stage
from tests.support.train_zero_checkpoints import CASES

EXPORTED = [
    ("llama-z0", "fp32"),
    ("llama-tied-z1", "fp32"),
    ("llama-tied-z3-bf16", "bf16"),
    ("qwen3-moe-z3", "fp32"),
    ("deepseek-v3-z1", "fp32"),
    ("deepseek-v3-tied-z1", "fp32"),
    ("deepseek-v3-tied-z1", "bf16"),
    ("deepseek-v3-z3-bf16", "bf16"),
]


def export(stage: ExportableStage) -> Export:
    run(stage.job)
    return Export.read(Path(stage.job.out))


def assert_refused(stage: ExportableStage, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(stage.job)
    assert not Path(stage.job.out).exists()
    assert not list(Path(stage.job.folder).glob("*")), "an export was left that is not verified"


@pytest.mark.parametrize(("case", "dtype"), EXPORTED, ids=["-".join(case) for case in EXPORTED])
def test_exported_weights_equal_the_live_engines(zero_checkpoints: Path, tmp_path: Path, case: str, dtype: str):
    """The expected tensors were gathered from the engine and saved separately, not read from a checkpoint."""
    exported = export(create_exportable_stage(zero_checkpoints / case, tmp_path, dtype))
    assert exported.verification["tensors"]["equal"] == exported.verification["tensors"]["count"] > 0
    loading = exported.verification["from_pretrained"]
    assert loading["missing"] == loading["unexpected"] == 0
    model = AutoModelForCausalLM.from_pretrained(exported.path, dtype="auto")
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    reference, state = load_file(zero_checkpoints / case / "reference.safetensors"), model.state_dict()
    for name, tensor in reference.items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name


def test_fp32_logits_are_equal_bit_by_bit(zero_checkpoints: Path, tmp_path: Path):
    logits = export(create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path, "fp32")).verification["logits"]
    assert logits["criterion"] == "bit equality" and logits["bit_equal"] and logits["differences"] == []


@pytest.mark.parametrize("case", ["llama-tied-z1", "qwen3-moe-z3", "deepseek-v3-tied-z1"])
def test_fp8_export_is_verified_and_trains_again(zero_checkpoints: Path, tmp_path: Path, case: str):
    exported = export(create_exportable_stage(zero_checkpoints / case, tmp_path, "fp8"))
    found = exported.verification
    assert 0 < found["tensors"]["largest_fp8_error"] <= 1 + 1e-5
    assert found["logits"]["masters_bit_equal"] and found["logits"]["max_abs_difference"] <= found["logits"]["bound"]
    assert found["from_pretrained"]["equal"] > 0
    folder = Path(exported.path)
    config = AutoConfig.from_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model(config.to_dict()).named_parameters()}
    shapes |= {
        name: tuple(tensor.shape) for name, tensor in meta_model(config.to_dict()).named_buffers() if "bias" in name
    }
    values = pretrained_values(folder, shapes, config)
    reference = load_file(zero_checkpoints / case / "reference.safetensors")
    for name, tensor in reference.items():
        read = values(TensorSlice(name, tuple(tensor.shape), {}))
        assert torch.allclose(read, tensor, rtol=1 / 16, atol=tensor.abs().max().item() / 448 / 1024), name


def test_altered_fp8_value_is_refused(zero_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bytes and their hash come from one function, so the error of each element is compared as well."""
    original = Fp8Matrix.values
    monkeypatch.setattr(Fp8Matrix, "values", lambda *part: (original(*part).float() * 1.5).to(torch.float8_e4m3fn))
    assert_refused(create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path, "fp8"), "what FP8 allows")


def test_tied_weights_are_stored_once(zero_checkpoints: Path, tmp_path: Path):
    exported = export(create_exportable_stage(zero_checkpoints / "llama-tied-z1", tmp_path, "fp32"))
    names = {name for path in Path(exported.path).glob("*.safetensors") for name in load_file(path)}
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_model_card_and_folder_state_the_provenance(zero_checkpoints: Path, tmp_path: Path):
    exported = export(create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path, "bf16"))
    card = (Path(exported.path) / "README.md").read_text()
    assert all(word in card for word in ("unit", "main", "d0", "c0")), card
    names = {path.name for path in Path(exported.path).iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert names == set(exported.files)


def test_model_card_states_changes_of_pretrained_weights(zero_checkpoints: Path, tmp_path: Path):
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path, "bf16")
    job = stage.job.model_copy(
        update={"pretrained_changes": ("Its FP8 weights were dequantised.", "Layers were left out.")}
    )
    run(job)
    card = (Path(job.folder) / "latest" / "README.md").read_text()
    assert "from random weights. Its FP8 weights were dequantised. Layers were left out." in card, card


def test_export_keeps_the_settings_of_the_pretrained_model(zero_checkpoints: Path, tmp_path: Path):
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path, "fp32")
    weights = stage.tag.parents[1]
    config = json.loads((weights / "model_config.json").read_text())
    kept = {"my_key": {"a": [1]}, "task_specific_params": {"x": 1}, "eos_token_id": [7, 8]}
    (weights / "model_config.json").write_text(json.dumps(config | kept | {"_name_or_path": "org/base"}))
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [7, 8], "bos_token_id": 5}
    (weights / "pretrained_generation.json").write_text(json.dumps(settings))
    checkpoint = Path(stage.job.checkpoint)
    replace(Checkpoint.read(checkpoint), configs={}).write(checkpoint)  # as earlier releases wrote it
    folder = Path(export(stage).path)
    written = json.loads((folder / "config.json").read_text())
    assert {key: written[key] for key in kept} == kept | {"eos_token_id": [7, 8, 1]}
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == settings | {"eos_token_id": [7, 8, 1], "pad_token_id": 2}
    from transformers import GenerationConfig

    loaded = GenerationConfig.from_pretrained(folder)
    assert (loaded.eos_token_id, loaded.temperature, loaded.top_p) == ([7, 8, 1], 0.6, 0.95)
    (weights / "pretrained_generation.json").unlink()
    assert GenerationConfig.from_pretrained(Path(export(stage).path)).eos_token_id == [7, 8, 1], "those of config.json"


def greedy_ids(folder: str, prompt: list[int]) -> list[int]:
    """Return the tokens that transformers generates with the settings of an export."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    generated = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS)
    return generated[0, len(prompt) :].tolist()


def test_samples_end_at_the_ends_of_the_pretrained_model_as_in_transformers(zero_checkpoints: Path, tmp_path: Path):
    """A chat of Llama 3 ends at <|eot_id|>, which generation_config.json names; the tokenizer names <|end_of_text|>."""
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path, "fp32")
    prompt = json.loads((stage.reference / "prompts.json").read_text())["input_ids"][0]
    endless = export(stage)
    ids = greedy_ids(endless.path, prompt)
    assert not endless.samples[0]["ended_with_eos"] and len(ids) > 3
    (stage.tag.parents[1] / "pretrained_generation.json").write_text(json.dumps({"eos_token_id": [ids[2], 7]}))
    checkpoint = Path(stage.job.checkpoint)
    replace(Checkpoint.read(checkpoint), configs={}).write(checkpoint)
    ended = export(stage)
    assert greedy_ids(ended.path, prompt) == ids[: ids.index(ids[2]) + 1]
    tokenizer = AutoTokenizer.from_pretrained(ended.path)
    assert ended.samples[0]["completion"] == tokenizer.decode(ids[: ids.index(ids[2]) + 1], skip_special_tokens=True)
    assert ended.samples[0]["ended_with_eos"]


def test_exports_of_other_precisions_stay_and_latest_names_the_newest(zero_checkpoints: Path, tmp_path: Path):
    """The link is relative, so that the results can be moved, and a refused export changes nothing."""
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path, "fp32")
    first = export(stage)
    before = file_sha256(Path(first.path) / "model.safetensors")
    second = export(replace(stage, job=stage.job.model_copy(update={"dtype": "bf16"})))
    folder = Path(stage.job.folder)
    assert [Path(made.path).name for made in (first, second)] == ["0123-2-fp32", "0123-2-bf16"]
    assert file_sha256(Path(first.path) / "model.safetensors") == before
    assert (folder / "latest").readlink() == Path("0123-2-bf16")
    (stage.tag / "manifest.json").write_text("{}")
    with pytest.raises(UserError):
        run(stage.job)
    assert {path.name for path in folder.iterdir()} == {"0123-2-fp32", "0123-2-bf16", "latest"}
    assert (folder / "latest" / "config.json").exists()


def test_altered_file_is_refused(zero_checkpoints: Path, tmp_path: Path):
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path)
    victim = max(stage.tag.glob("*.pt"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert_refused(stage, f"{victim.name} has the BLAKE3 hash")


def test_full_disk_names_the_folder_of_exports(zero_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The system's error has no path. Nothing of the export is left."""
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path)

    def refuse(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(DiskFull, match="an export needs") as full:
        export(stage)
    folder = Path(stage.job.folder)
    assert full.value.folder == folder.parent and full.value.needed_bytes > 1000
    assert not list(folder.glob("*"))


def test_altered_manifest_is_refused(zero_checkpoints: Path, tmp_path: Path):
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path)
    manifest = stage.tag / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    assert_refused(stage, "manifest.json has SHA-256")


def test_another_tokenizer_is_refused_until_its_own_is_restored(zero_checkpoints: Path, tmp_path: Path):
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path)
    manifest = Path(stage.job.tokenizer)
    restored = manifest.read_text()
    replace(TokenizerManifest.read(manifest), hash="other").write(manifest)
    assert_refused(stage, "has hash other, but stage main was trained with .*\n  remedy: .*restore the tokenizer")
    manifest.write_text(restored)
    export(stage)


def test_altered_model_config_is_refused_until_it_is_restored(zero_checkpoints: Path, tmp_path: Path):
    """The logits do not show a change of the longest sequence."""
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path)
    path = WeightsFolder(stage.tag.parents[1]).model_config
    restored = path.read_text()
    path.write_text(json.dumps({**json.loads(restored), "max_position_embeddings": 10**6}))
    assert_refused(stage, "model_config.json does not have the hash .*\n  remedy: .*restore them")
    path.write_text(restored)
    export(stage)


def test_missing_file_is_refused(zero_checkpoints: Path, tmp_path: Path):
    stage = create_exportable_stage(zero_checkpoints / "llama-tied-z1", tmp_path)
    next(stage.tag.glob("*optim_states.pt")).unlink()
    assert_refused(stage, "is missing")


@pytest.mark.parametrize("change", ["missing", "additional", "another value"])
def test_tensor_that_differs_from_the_trainers_is_refused(zero_checkpoints: Path, tmp_path: Path, change: str):
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path, "fp32")
    recorded = stage.reference / "tensors.json"
    tensors = json.loads(recorded.read_text())
    name = "model.norm.weight"
    if change == "missing":
        del tensors[name]
    elif change == "additional":
        tensors["model.extra.weight"] = tensors[name]
    else:
        tensors[name]["sha256_fp32"] = "0" * 64
    recorded.write_text(json.dumps(tensors))
    stage.update_manifest()
    assert_refused(stage, "model.(norm|extra).weight")


def test_logits_that_differ_from_the_trainers_are_refused(zero_checkpoints: Path, tmp_path: Path):
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path, "fp32")
    path = stage.reference / "logits.safetensors"
    recorded = load_file(path)
    recorded["logits"][0, 0, 0] += 1e-3
    save_file(recorded, path)
    stage.update_manifest()
    assert_refused(
        stage, "logits of the export differ .* by up to 0.001; the limit is 0, the criterion is bit equality"
    )


def test_checkpoint_without_reference_values_is_refused_until_the_last_one_is_exported(
    zero_checkpoints: Path, tmp_path: Path
):
    """The trainer always writes them with the last checkpoint of a stage."""
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path)
    stage.update_manifest(has_reference_values=False)
    assert_refused(stage, "without the reference values")
    stage.update_manifest(has_reference_values=True)
    assert export(stage)


def test_missing_checkpoint_is_refused_until_an_existing_one_is_named(zero_checkpoints: Path, tmp_path: Path):
    stage = create_exportable_stage(zero_checkpoints / "llama-z0", tmp_path)
    existing = {*Checkpoint.read(Path(stage.job.checkpoint)).checkpoints}
    (missing,) = {"last", "best"} - existing
    with pytest.raises(UserError, match=f"has no `{missing}` checkpoint, only ") as refused:
        run(stage.job.model_copy(update={"which": missing}))
    assert "set the stage's `export` to one of these" in refused.value.hint
    assert stage.job.which in existing and export(stage)


def test_every_case_is_trained(zero_checkpoints: Path):
    assert {path.name for path in zero_checkpoints.iterdir() if (path / "weights").is_dir()} == {
        name for cases in CASES.values() for name in cases
    }
