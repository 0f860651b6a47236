"""First weights from folders as they are published: every layout starts from the same numbers, and reads only its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from longhaul.config.pretrained_format import as_trained
from longhaul.config.run_config import Parallel
from longhaul.errors import UserError
from longhaul.jobs.builders import payload
from longhaul.report.plan_table import plan_json
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.slice_model import cut_model, parameters, saved_buffers
from longhaul.train.pretrained_weights import pretrained_values
from tests.support.fp8_folder import BLOCK, CONFIG, LAYERS, write_folder, write_shards
from tests.support.ranks import spawn
from tests.support.small_configs import plan_of

HERE = Path(__file__).parents[2] / "support"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A DeepSeek folder, and the tensors that training must start from."""
    path = tmp_path_factory.mktemp("pretrained") / "deepseek"
    return path, write_folder(path)


@pytest.fixture(autouse=True)
def forget_groups():
    """DeepSpeed keeps the names of groups; here they stand for none."""
    yield
    from deepspeed.utils import groups

    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()


def network() -> Any:
    return AutoConfig.for_model(**as_trained(CONFIG))


def all_shapes() -> dict[str, tuple[int, ...]]:
    model = cut_model(network(), ParallelDims(0, 1, Parallel()))
    return {shard.name: shard.shape for shard, _ in [*parameters(model), *saved_buffers(model)]}


def first_values(folder: Path):
    return pretrained_values(folder, all_shapes(), network())


@pytest.mark.parametrize(
    "axes",
    [{}, {"tensor": 2}, {"expert": 2}, {"pipeline": 2}, {"tensor": 2, "expert": 2}],
    ids=["whole", "tensor", "expert", "pipeline", "tensor-expert"],
)
def test_every_rank_has_its_part_of_the_dequantised_tensors(folder, axes: dict[str, int]) -> None:
    path, wanted = folder
    values = first_values(path)
    ranks = 1 if not axes else 4
    seen = set()
    for rank in range(ranks):
        model = cut_model(network(), ParallelDims(rank, ranks, Parallel(**axes)))
        for shard, meta in [*parameters(model), *saved_buffers(model)]:
            found = values(shard)
            assert (found.dtype, found.shape) == (torch.float32, meta.shape), shard.name
            assert torch.equal(found, shard.cut(wanted[shard.name])), shard.name
            seen.add(shard.name)
    assert seen == set(wanted)


def test_only_the_experts_of_a_rank_are_read(folder, bytes_read: list[int]) -> None:
    values = first_values(folder[0])
    sizes = []
    for axes in ({}, {"expert": 4}):
        model = cut_model(network(), ParallelDims(0, 4, Parallel(**axes)))
        bytes_read.clear()
        for shard, _ in parameters(model):
            if shard.name.endswith(("gate_up_proj", "down_proj")):
                values(shard)
        sizes.append(sum(bytes_read))
    assert sizes[0] == 4 * sizes[1] > 0


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({"stages.0.zero": {"stage": 3}, "stages.0.precision": "fp32"}, "rank 0 alone"),
        ({"stages.0.parallel": {"expert": 2}, "stages.0.zero": {"stage": 1}}, "both"),
        ({"stages.0.parallel": {"tensor": 2}, "stages.0.zero": {"stage": 1}}, "both"),
    ],
    ids=["zero-3", "expert", "tensor"],
)
def test_stages_start_from_the_folder(folder, tmp_path: Path, changes: dict[str, Any], reads: str) -> None:
    path, wanted = folder
    save_file({name: tensor.contiguous() for name, tensor in wanted.items()}, tmp_path / "wanted.safetensors")
    job = payload(_plan(tmp_path, path, changes), "train-base")
    ds_config = tmp_path / "ds_config.json"
    zero = {"stage": job.stage.zero.stage}
    ds_config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}))
    job.model_copy(update={"deepspeed": str(ds_config)}).write(tmp_path / "stage.json")
    printed = spawn(
        HERE / "pretrained_worker.py", 2, str(tmp_path / "stage.json"), str(tmp_path / "wanted.safetensors")
    )
    read = [int(size) for _, size in sorted(re.findall(r"rank (\d) read (\d+)", printed))]
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert len(read) == 2 and 0 < read[0] < size
    if reads == "rank 0 alone":
        assert read[1] < 1000, "buffers only"
    assert (
        printed.count("first weights: Its FP8 weights, scaled in blocks of 128 x 128, were dequantised to fp32.") == 1
    )
    assert printed.count(f"(`model.layers.{LAYERS}.*`) were left out.") == 1


def _plan(tmp_path: Path, folder: Path, changes: dict[str, Any]):
    model = {"model": {"pretrained": {"path": str(folder)}}, "tokenizer.train.vocab_size": 300}
    stages = {"stages.0.nodes": 1, "stages.0.gpus_per_node": 2, "stages.1": ..., "stages.0.export": "last"}
    return plan_of(tmp_path, {**model, **stages, **changes})


def test_plan_and_export_say_so_and_forget_the_stored_form(folder, tmp_path: Path) -> None:
    plan = _plan(tmp_path, folder[0], {})
    said = plan_json(plan)["first_weights"]
    assert len(said) == 2 and "128 x 128" in said[0] and f"model.layers.{LAYERS}.*" in said[1]
    assert list(payload(plan, "convert-base").first_weights) == said
    model = payload(plan, "train-base").model
    assert "quantization_config" not in model and model["num_nextn_predict_layers"] == 0


def without(key: str):
    return lambda stored: {name: tensor for name, tensor in stored.items() if name != key}


Q = "model.layers.1.self_attn.q_a_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
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
            "model.norm.weight is [3], the model wants [200]",
        ),
    ],
    ids=[
        "no factors",
        "too few factors",
        "factors of another type",
        "factors of nothing",
        "no expert",
        "missing",
        "unknown",
        "another vocabulary",
        "another shape",
    ],
)
def test_a_folder_that_is_not_the_models_is_refused(folder, tmp_path: Path, change, says: str) -> None:
    path = _copy(folder[0], tmp_path)
    stored = {key: tensor for file in sorted(path.glob("*.safetensors")) for key, tensor in load_file(file).items()}
    write_shards(path, change(stored))
    with pytest.raises(UserError, match=re.escape(says)):
        first_values(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantization_config": None}, "is stored as FP8, and config.json has no quantization_config"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "only DeepSeek's block-scaled FP8"),
        ({"num_nextn_predict_layers": 0}, f"unexpected keys: model.layers.{LAYERS}."),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused(folder, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = _copy(folder[0], tmp_path)
    (path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(UserError, match=re.escape(says)):
        first_values(path)


def test_a_tensor_in_two_files_is_refused(folder, tmp_path: Path) -> None:
    path = _copy(folder[0], tmp_path)
    save_file({"model.norm.weight": torch.ones(200)}, path / "model-00004-of-000004.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight is in two files, the second is model-00004"):
        first_values(path)


def _copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))
