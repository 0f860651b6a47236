"""A model run with one decoder layer in memory computes what the whole model does, bit for bit."""

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
from longhaul.export.check_loading import prove_loading
from longhaul.export.check_logits import Exported
from longhaul.export.layerwise_model import StreamedModel
from longhaul.export.safetensors_writer import write_shards
from longhaul.export.tensor_layout import ExportedTensor, export_layout, meta_model
from longhaul.export.torch_threads import torch_threads
from tests.support.zero_training import hugging_face_config

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


def written(folder: Path, name: str, dtype: torch.dtype) -> Exported:
    """A random model as an export of several shards."""
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
    found = json.loads(config.to_json_string(use_diff=False))
    tensors = list(export_layout(meta_model(found), masters, dtype))
    write_shards(folder, tensors, shard_bytes=40_000)
    config.save_pretrained(folder)
    return Exported(folder, json.loads((folder / "config.json").read_text()), tensors)


def whole(exported: Exported, dtype: torch.dtype):
    """By from_pretrained; copied, as a product with one token's vector rounds by where mapped weights happen to lie."""
    model = transformers.AutoModelForCausalLM.from_pretrained(exported.folder, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_whole_models_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    exported = written(tmp_path / "export", name, dtype)
    model = whole(exported, dtype)
    with torch_threads(1), torch.no_grad():
        wanted = [model(input_ids=ids_T[None], use_cache=False).logits.float() for ids_T in SEQUENCES]
        streamed = exported.model(dtype)
        for _ in range(2):  # a second pass finds nothing that the first left behind
            found = streamed.logits(SEQUENCES)
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_exports_of_fp32_run_in_the_trainers_type(tmp_path: Path) -> None:
    exported = written(tmp_path / "export", "deepseek-v3", torch.float32)
    model = whole(exported, torch.bfloat16)
    with torch_threads(1), torch.no_grad():
        wanted = model(input_ids=SEQUENCES[0][None], use_cache=False).logits.float()
        assert torch.equal(exported.model(torch.bfloat16).logits(SEQUENCES[:1])[0], wanted)


def test_one_layer_at_a_time_has_memory(tmp_path: Path) -> None:
    """Seen at every read: tensors of the model that are not on the meta device."""
    exported = written(tmp_path / "export", "deepseek-v3", torch.float32)
    resident: list[set[str]] = []

    def read(tensor: ExportedTensor, start: int, stop: int) -> torch.Tensor:
        resident.append({tensor.source} | _with_memory(model))
        return tensor.master.read_range(tensor.start + start, tensor.start + stop)

    model = StreamedModel(exported.config, exported.tensors, read, torch.float32)
    model.logits(SEQUENCES)
    assert {tensor.source for tensor in exported.tensors} == set().union(*resident)
    layers = [{name.split(".")[2] for name in names if ".layers." in name} for names in resident]
    assert max(map(len, layers)) == 1
    assert not _with_memory(model), "something stayed"


def _with_memory(model: StreamedModel) -> set[str]:
    names = {(module, key): name for (module, key), name in model._names.items()}
    return {
        name
        for (module, key), name in names.items()
        if "rotary" not in name and not getattr(module, key).is_meta and "lm_head" not in name
    }


def test_a_buffer_that_no_file_holds_is_named(tmp_path: Path) -> None:
    exported = written(tmp_path / "export", "llama", torch.float32)
    model = exported.model(torch.float32)
    model._layers[1].mlp.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    model._names = model._own_names() | model._names | {(model._layers[1].mlp, "table"): "model.layers.1.mlp.table"}
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.table is a tensor of the model that no file"):
        model.logits(SEQUENCES)


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-moe", "deepseek-v3"])
@pytest.mark.parametrize("limit", [0, 1 << 27], ids=["keys only", "values too"])
def test_what_from_pretrained_misses_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    monkeypatch.setattr("longhaul.export.check_loading.WHOLE_BYTES", limit)
    exported = written(tmp_path / "export", name, torch.bfloat16)
    tensors = list(exported.tensors)
    assert prove_loading(exported.folder, tensors, torch.bfloat16)["equal"] == (len(tensors) if limit else 0)
    shard = sorted(exported.folder.glob("*.safetensors"))[-1]
    good = load_file(shard)
    key = min(good)
    changes = {
        "missing keys": {other: value for other, value in good.items() if other != key},
        "unexpected keys": {**good, "model.layers.0.more.weight": torch.ones(2)},
        "from_pretrained": {**good, key: torch.ones(3, 2)},
    }
    for says, tensors_then in changes.items():
        save_file(tensors_then, shard, {"format": "pt"})
        index = exported.folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v != shard.name}
        content["weight_map"] |= dict.fromkeys(tensors_then, shard.name)
        index.write_text(json.dumps(content))
        with pytest.raises(UserError, match=says):
            prove_loading(exported.folder, tensors, torch.bfloat16)
