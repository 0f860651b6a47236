"""A model that runs with one decoder layer in memory gives the logits of the whole model, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from longhaul.checkpoint_io import open_safetensors
from longhaul.errors import UserError
from longhaul.export.exported_tensors import ExportedTensor, list_exported_tensors
from longhaul.export.layerwise_model import LayerwiseModel
from longhaul.export.model_without_memory import meta_model
from longhaul.export.safetensors_writer import write_shards
from longhaul.export.tensor_blocks import torch_threads
from longhaul.export.verify_loading import verify_loading
from longhaul.export.verify_logits import WrittenExport
from tests.support.train_zero_checkpoints import hugging_face_config

MODELS = {
    "llama": ("llama", False, {}),
    "llama-long-rope": (
        "llama",
        False,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen3-tied": ("qwen3", True, {}),
    "qwen3-moe": ("qwen3_moe", False, {"output_router_logits": True}),
    "deepseek-v2": ("deepseek_v2", False, {}),
    "deepseek-v3": ("deepseek_v3", False, {"num_hidden_layers": 3}),
    "deepseek-v3-yarn": (
        "deepseek_v3",
        False,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
}
SEQUENCES = [
    torch.randint(3, 261, (length,), generator=torch.Generator().manual_seed(length)) for length in (17, 1, 33)
]


def write_export(folder: Path, name: str, dtype: torch.dtype) -> WrittenExport:
    """Write a random model as an export of several shards."""
    kind, tied, keys = MODELS[name]
    config = hugging_face_config(kind, tied)
    for key, value in keys.items():
        setattr(config, key, value)
    config = type(config)(**config.to_dict())
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.shape != model.model.rotary_emb.inv_freq.shape:
                tensor.add_(torch.randn(tensor.shape) / 5)
    folder.mkdir()
    state = {key: tensor for key, tensor in model.state_dict().items() if not (tied and key == "lm_head.weight")}
    save_file(state, folder.parent / f"{folder.name}-masters")
    masters = open_safetensors(folder.parent / f"{folder.name}-masters")
    if tied:
        first = "model.embed_tokens.weight"
        masters[first] = replace(masters[first], aliases=("lm_head.weight",))
    content = json.loads(config.to_json_string(use_diff=False))
    tensors = list(list_exported_tensors(meta_model(content), meta_model(content), masters, dtype))
    write_shards(folder, tensors, shard_bytes=40_000)
    config.save_pretrained(folder)
    return WrittenExport(folder, json.loads((folder / "config.json").read_text()), tensors)


def load_whole(exported: WrittenExport, dtype: torch.dtype):
    """Load the export with from_pretrained.

    The weights are copied: the product with one token's vector rounds differently for other alignments of mapped weights.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(exported.folder, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_whole_models_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    exported = write_export(tmp_path / "export", name, dtype)
    model = load_whole(exported, dtype)
    with torch_threads(1), torch.no_grad():
        expected = [model(input_ids=ids_T[None], use_cache=False).logits.float() for ids_T in SEQUENCES]
        layerwise = exported.model(dtype)
        for _ in range(2):  # the first pass leaves nothing behind that changes the second
            found = layerwise.logits(SEQUENCES)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_fp32_export_runs_in_the_trainers_data_type(tmp_path: Path) -> None:
    exported = write_export(tmp_path / "export", "deepseek-v3", torch.float32)
    model = load_whole(exported, torch.bfloat16)
    with torch_threads(1), torch.no_grad():
        expected = model(input_ids=SEQUENCES[0][None], use_cache=False).logits.float()
        assert torch.equal(exported.model(torch.bfloat16).logits(SEQUENCES[:1])[0], expected)


def test_only_one_layer_has_memory_at_a_time(tmp_path: Path) -> None:
    """Each read records which tensors of the model are not on the meta device."""
    exported = write_export(tmp_path / "export", "deepseek-v3", torch.float32)
    in_memory: list[set[str]] = []

    def read(tensor: ExportedTensor, start: int, stop: int) -> torch.Tensor:
        in_memory.append({tensor.model_name} | _names_in_memory(model))
        return tensor.master.read_range(tensor.start + start, tensor.start + stop)

    model = LayerwiseModel(exported.config, exported.tensors, read, torch.float32)
    model.logits(SEQUENCES)
    assert {tensor.model_name for tensor in exported.tensors} == set().union(*in_memory)
    layers = [{name.split(".")[2] for name in names if ".layers." in name} for names in in_memory]
    assert max(map(len, layers)) == 1
    assert not _names_in_memory(model), "a tensor kept its memory"


def _names_in_memory(model: LayerwiseModel) -> set[str]:
    names = {(module, key): name for (module, key), name in model._stored_names.items()}
    return {
        name
        for (module, key), name in names.items()
        if "rotary" not in name and not getattr(module, key).is_meta and "lm_head" not in name
    }


def test_message_names_a_buffer_that_no_file_holds(tmp_path: Path) -> None:
    exported = write_export(tmp_path / "export", "llama", torch.float32)
    model = exported.model(torch.float32)
    mlp = model._layers[1].mlp
    mlp.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    model._stored_names = (
        model._find_stored_names() | model._stored_names | {(mlp, "table"): "model.layers.1.mlp.table"}
    )
    with pytest.raises(UserError, match=r"no file of the export holds model\.layers\.1\.mlp\.table"):
        model.logits(SEQUENCES)


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-moe", "deepseek-v3"])
@pytest.mark.parametrize("limit", [0, 1 << 27], ids=["keys only", "values too"])
def test_keys_that_from_pretrained_does_not_match_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    monkeypatch.setattr("longhaul.export.verify_loading.MAX_LOADED_BYTES", limit)
    exported = write_export(tmp_path / "export", name, torch.bfloat16)
    tensors = list(exported.tensors)
    assert verify_loading(exported.folder, tensors, torch.bfloat16)["equal"] == (len(tensors) if limit else 0)
    shard = sorted(exported.folder.glob("*.safetensors"))[-1]
    good = load_file(shard)
    key = min(good)
    changes = {
        "missing keys": {other: value for other, value in good.items() if other != key},
        "unexpected keys": {**good, "model.layers.0.more.weight": torch.ones(2)},
        "from_pretrained": {**good, key: torch.ones(3, 2)},
    }
    for message, changed in changes.items():
        save_file(changed, shard, {"format": "pt"})
        index = exported.folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v != shard.name}
        content["weight_map"] |= dict.fromkeys(changed, shard.name)
        index.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            verify_loading(exported.folder, tensors, torch.bfloat16)
