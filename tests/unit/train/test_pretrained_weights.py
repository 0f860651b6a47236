"""Initial weights from published folders: every layout starts from the same numbers, and each rank reads only its own."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from longhaul.artifacts.paths import JobId
from longhaul.config.pretrained_format import trained_config
from longhaul.config.stage_config import Parallel
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_spec
from longhaul.report.plan_json import plan_json
from longhaul.train.checkpoint.weights_folder import _keep_generation_config
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.slice_model import buffer_slices, parameter_slices, slice_model
from longhaul.train.pretrained_weights import pretrained_values
from tests.support.fp8_folder import BLOCK, CONFIG, LAYERS, write_folder, write_shards
from tests.support.launch_ranks import run_worker
from tests.support.small_configs import plan_of

HERE = Path(__file__).parents[2] / "support"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return a DeepSeek folder, and the tensors from which training must start."""
    path = tmp_path_factory.mktemp("pretrained") / "deepseek"
    return path, write_folder(path)


@pytest.fixture(autouse=True)
def forget_groups():
    """Clear DeepSpeed's table of expert groups: in these tests the groups do not exist."""
    yield
    from deepspeed.utils import groups

    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()


def network() -> Any:
    return AutoConfig.for_model(**trained_config(CONFIG))


def all_shapes() -> dict[str, tuple[int, ...]]:
    model = slice_model(network(), ParallelDims(0, 1, Parallel()))
    return {
        tensor_slice.name: tensor_slice.shape for tensor_slice, _ in [*parameter_slices(model), *buffer_slices(model)]
    }


def initial_values(folder: Path):
    return pretrained_values(folder, all_shapes(), network())


@pytest.mark.parametrize(
    "axes",
    [{}, {"tensor": 2}, {"expert": 2}, {"pipeline": 2}, {"tensor": 2, "expert": 2}],
    ids=["whole", "tensor", "expert", "pipeline", "tensor-expert"],
)
def test_every_rank_has_its_slice_of_the_dequantized_tensors(folder, axes: dict[str, int]) -> None:
    path, expected = folder
    values = initial_values(path)
    ranks = 1 if not axes else 4
    seen = set()
    for rank in range(ranks):
        model = slice_model(network(), ParallelDims(rank, ranks, Parallel(**axes)))
        for tensor_slice, meta in [*parameter_slices(model), *buffer_slices(model)]:
            found = values(tensor_slice)
            assert (found.dtype, found.shape) == (torch.float32, meta.shape), tensor_slice.name
            assert torch.equal(found, tensor_slice.extract(expected[tensor_slice.name])), tensor_slice.name
            seen.add(tensor_slice.name)
    assert seen == set(expected)


def test_a_rank_reads_only_its_own_experts(folder, bytes_read: list[int]) -> None:
    values = initial_values(folder[0])
    sizes = []
    for axes in ({}, {"expert": 4}):
        model = slice_model(network(), ParallelDims(0, 4, Parallel(**axes)))
        bytes_read.clear()
        for tensor_slice, _ in parameter_slices(model):
            if tensor_slice.name.endswith(("gate_up_proj", "down_proj")):
                values(tensor_slice)
        sizes.append(sum(bytes_read))
    assert sizes[0] == 4 * sizes[1] > 0


@pytest.mark.parametrize(
    ("changes", "readers"),
    [
        ({"stages.0.zero": {"stage": 3}, "stages.0.precision": "fp32"}, "rank 0 alone"),
        ({"stages.0.parallel": {"expert": 2}, "stages.0.zero": {"stage": 1}}, "both"),
        ({"stages.0.parallel": {"tensor": 2}, "stages.0.zero": {"stage": 1}}, "both"),
    ],
    ids=["zero-3", "expert", "tensor"],
)
def test_a_stage_starts_from_the_folder(folder, tmp_path: Path, changes: dict[str, Any], readers: str) -> None:
    path, expected = folder
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "expected.safetensors")
    job = job_spec(_plan(tmp_path, path, changes), JobId("train", ("base",)))
    ds_config = tmp_path / "ds_config.json"
    optimizer = {"type": "AdamW", "params": {"lr": 0.001}}
    sections = {"optimizer": optimizer, "zero_optimization": {"stage": job.stage.zero.stage}}
    ds_config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, **sections}))
    job.model_copy(update={"deepspeed": str(ds_config)}).write(tmp_path / "stage.json")
    printed = run_worker(
        HERE / "pretrained_model_worker.py", 2, str(tmp_path / "stage.json"), str(tmp_path / "expected.safetensors")
    )
    read = [int(size) for _, size in sorted(re.findall(r"rank (\d) read (\d+)", printed))]
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert len(read) == 2 and 0 < read[0] < size
    if readers == "rank 0 alone":
        assert read[1] < 1000, "buffers only"
    assert (
        printed.count("pretrained weights: FP8 weights with scales for blocks of 128 x 128 were dequantized to fp32.")
        == 1
    )
    assert printed.count(f"(`model.layers.{LAYERS}.*`) were left out.") == 1


def _plan(tmp_path: Path, folder: Path, changes: dict[str, Any]):
    model = {"model": {"pretrained": {"path": str(folder)}}, "tokenizer.train.vocab_size": 300}
    stages = {"stages.0.nodes": 1, "stages.0.gpus_per_node": 2, "stages.1": ..., "stages.0.export": "last"}
    return plan_of(tmp_path, {**model, **stages, **changes})


def test_plan_and_export_report_the_changes_and_drop_the_storage_format(folder, tmp_path: Path) -> None:
    plan = _plan(tmp_path, folder[0], {})
    changes = plan_json(plan)["pretrained_changes"]
    assert len(changes) == 2 and "128 x 128" in changes[0] and f"model.layers.{LAYERS}.*" in changes[1]
    assert list(job_spec(plan, JobId("export", ("base",))).pretrained_changes) == changes
    model = job_spec(plan, JobId("train", ("base",))).model
    assert "quantization_config" not in model and model["num_nextn_predict_layers"] == 0


def without(key: str):
    return lambda stored: {name: tensor for name, tensor in stored.items() if name != key}


Q = "model.layers.1.self_attn.q_a_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{Q}_scale_inv"), f"{Q} is stored as FP8 without its factors {Q}_scale_inv"),
        (
            lambda stored: {**stored, f"{Q}_scale_inv": torch.ones(1, 2)},
            f"{Q}_scale_inv is [1, 2] torch.float32, but [140, 200] in blocks of {BLOCK} x {BLOCK} has [2, 2] factors",
        ),
        (
            lambda stored: {**stored, f"{Q}_scale_inv": torch.ones(2, 2, dtype=torch.uint8)},
            f"{Q}_scale_inv is [2, 2] torch.uint8",
        ),
        (lambda stored: {**stored, Q: stored[Q].float()}, f"unexpected keys: {Q}_scale_inv (1 in all)"),
        (without(EXPERT), f"missing keys: {EXPERT} (1 in all)"),
        (without("model.norm.weight"), "missing keys: model.norm.weight (1 in all)"),
        (
            lambda stored: {
                **stored,
                f"model.layers.{LAYERS + 1}.x": torch.ones(1),
                "model.more.weight": torch.ones(1),
            },
            f"unexpected keys: model.layers.{LAYERS + 1}.x, model.more.weight (2 in all)",
        ),
        (
            lambda stored: {
                **stored,
                "model.embed_tokens.weight": torch.ones(310, 200),
                "lm_head.weight": torch.ones(310, 200),
            },
            "model.embed_tokens.weight has 310 rows, but config.json's vocab_size is 300",
        ),
        (
            lambda stored: {**stored, "model.norm.weight": torch.ones(3)},
            "model.norm.weight has shape [3], the model expects [200]",
        ),
    ],
    ids=[
        "no factors",
        "too few factors",
        "factors of another type",
        "factors without a matrix",
        "no expert",
        "missing",
        "unknown",
        "another vocabulary",
        "another shape",
    ],
)
def test_a_folder_that_does_not_fit_the_model_is_refused(folder, tmp_path: Path, change, message: str) -> None:
    path = _copy(folder[0], tmp_path)
    stored = {key: tensor for file in sorted(path.glob("*.safetensors")) for key, tensor in load_file(file).items()}
    write_shards(path, change(stored))
    with pytest.raises(UserError, match=re.escape(message)):
        initial_values(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_file_of_the_folder_is_refused_until_it_is_restored(folder, tmp_path: Path, name: str) -> None:
    copied = shutil.copytree(folder[0], tmp_path / "model")
    (tmp_path / "weights").mkdir()
    job: Any = SimpleNamespace(pretrained=str(copied))
    for text in ("{", (folder[0] / "config.json").read_text()):
        (copied / name).write_text(text)
        refused = pytest.raises(UserError, match="remedy: restore the file, or download the pretrained model again")
        with refused if text == "{" else nullcontext():
            _ = initial_values(copied) if name == "config.json" else _keep_generation_config(job, tmp_path / "weights")


def test_rotary_frequencies_of_older_releases_are_not_read(folder, tmp_path: Path) -> None:
    path = _copy(folder[0], tmp_path)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(LAYERS)}
    save_file(buffers, path / "model-00009-of-000009.safetensors")
    values, model = initial_values(path), slice_model(network(), ParallelDims(0, 1, Parallel()))
    for tensor_slice, _ in [*parameter_slices(model), *buffer_slices(model)]:
        assert torch.equal(values(tensor_slice), folder[1][tensor_slice.name]), tensor_slice.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": None}, "is stored as FP8, and config.json has no quantization_config"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "only from DeepSeek's block-scaled FP8"),
        ({"num_nextn_predict_layers": 0}, f"unexpected keys: model.layers.{LAYERS}."),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    folder, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = _copy(folder[0], tmp_path)
    (path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(UserError, match=re.escape(message)):
        initial_values(path)
    (path / "config.json").write_text(json.dumps(CONFIG))  # the remedy: restore it
    initial_values(path)


def test_a_folder_without_safetensors_is_refused_until_it_has_some(folder, tmp_path: Path) -> None:
    path = _copy(folder[0], tmp_path)
    for weights in path.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError, match=r"holds no \*\.safetensors\s+remedy: save the model with save_pretrained"):
        initial_values(path)
    for weights in folder[0].glob("*.safetensors"):
        shutil.copy(weights, path)  # save_pretrained writes such files
    initial_values(path)


def test_a_tensor_in_two_files_is_refused(folder, tmp_path: Path) -> None:
    path = _copy(folder[0], tmp_path)
    save_file({"model.norm.weight": torch.ones(200)}, path / "model-00004-of-000004.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight is in two files, the second is model-00004"):
        initial_values(path)


def _copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))
