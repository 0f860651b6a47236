"""What each rank of a layout holds: together the whole model once, and no more than the plan says; without any process group."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.checkpoint_io.tensor_parts import Shard
from longhaul.config.load import load_config
from longhaul.config.model_size import geometry
from longhaul.config.run_config import Parallel
from longhaul.jobs.launch_files import REPOSITORY
from longhaul.planning import make_plan
from longhaul.planning.gpu_memory import estimate
from longhaul.planning.plan import StagePlan
from longhaul.train.parallel import parallel_dims as grids
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.pipeline_parallel import stage_layers
from longhaul.train.parallel.sequence_parallel import document_mask
from longhaul.train.parallel.slice_model import cut_model, parameters
from tests.support.small_configs import plan_of

MIXTURE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


@pytest.fixture(autouse=True)
def forget_groups():
    """DeepSpeed keeps the names of groups; here they stand for none."""
    yield
    from deepspeed.utils import groups

    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()


def held(model: dict[str, Any], parallel: Parallel, rank: int, world_size: int) -> list[Shard]:
    """The parts of the model's tensors on one rank."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**model)
    return [shard for shard, _ in parameters(cut_model(config, ParallelDims(rank, world_size, parallel)))]


@pytest.mark.parametrize(
    "axes", [{"tensor": 2}, {"pipeline": 2}, {"expert": 4}, {"tensor": 2, "pipeline": 2, "expert": 2}]
)
def test_all_ranks_together_hold_every_element_once(tmp_path: Path, axes: dict[str, int]):
    model = plan_of(tmp_path, {"model": {"deepseek_v3": MIXTURE}}).config.model.config_dict()
    parallel = Parallel(**axes)
    parts: dict[str, dict[Any, Shard]] = {}
    for rank in range(8):
        for shard in held(model, parallel, rank, 8):
            parts.setdefault(shard.name, {})[tuple(shard.parts.items())] = shard
    for name, shards in parts.items():
        whole = next(iter(shards.values())).shape
        assert sum(shard.numel for shard in shards.values()) == math.prod(whole), name
        count = torch.zeros(whole)
        for shard in shards.values():
            shard.place(count, shard.cut(count) + 1)
        assert (count == 1).all(), name
    assert sum(math.prod(next(iter(s.values())).shape) for s in parts.values()) == geometry(model).total


def test_tensor_ranks_hold_local_shapes(tmp_path: Path):
    """Silent replication would train as well, and waste the memory that the axis is there for."""
    model = plan_of(tmp_path, {"model": {"deepseek_v3": MIXTURE}}).config.model.config_dict()
    shapes = {shard.name: shard.local_shape for shard in held(model, Parallel(tensor=2), 1, 2)}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (200, 64)
    layer = "model.layers.1."
    assert shapes[f"{layer}self_attn.q_b_proj.weight"] == (48, 16)
    assert shapes[f"{layer}self_attn.o_proj.weight"] == (64, 32)
    assert shapes[f"{layer}mlp.experts.gate_up_proj"] == (4, 32, 64)
    assert shapes[f"{layer}mlp.experts.down_proj"] == (4, 64, 16)
    assert shapes[f"{layer}mlp.shared_experts.down_proj.weight"] == (64, 16)
    assert shapes[f"{layer}mlp.gate.weight"] == (4, 64)


LAYOUTS_OF_V3 = [Parallel(pipeline=16, expert=32), Parallel(pipeline=8, tensor=4, expert=16)]


def v3(parallel: Parallel) -> tuple[StagePlan, dict[str, Any]]:
    plan = make_plan(load_config(REPOSITORY / "config" / "examples" / "deepseek-v3-671b-3d.yaml"))
    stage = plan.stages[0]
    changed = stage.stage.model_copy(update={"parallel": parallel})
    return StagePlan(**{**vars(stage), "stage": changed}), plan.config.model.config_dict()


@pytest.mark.parametrize("parallel", LAYOUTS_OF_V3, ids=lambda parallel: f"pipeline {parallel.pipeline}")
def test_deepseek_v3_is_cut_as_planned(parallel: Parallel):
    """671 B parameters over 512 ranks: the states of the fullest stage are those that the plan counts, within 1 %.

    The first stage has the most parameters, the second one the most experts, which ZeRO partitions least. `make bench-shapes`
    asks all ranks.
    """
    staged, model = v3(parallel)
    replicas, found = 512 // (parallel.pipeline * parallel.tensor), []
    for stage in (0, 1, parallel.pipeline - 1):
        shards = held(model, parallel, stage * replicas * parallel.tensor, 512)
        experts = sum(shard.numel for shard in shards if ".experts." in shard.name)
        dense = sum(shard.numel for shard in shards) - experts
        found.append(4 * (dense + experts) + 12 * (dense / replicas + experts * parallel.expert / replicas))
    assert max(found) == pytest.approx(estimate(staged.stage, geometry(model), 512).states, rel=0.01)


def test_layers_are_dealt_evenly():
    assert [len(own) for own in stage_layers(61, 16)] == [4] * 13 + [3] * 3
    assert [layer for own in stage_layers(61, 16) for layer in own] == list(range(61))


def test_documents_do_not_see_each_other():
    """As transformers finds them in positions that restart, padding included."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1]])
    documents = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    expected = (documents[:, None] == documents[None, :]).tril()
    mask = document_mask(positions)
    assert mask is not None and torch.equal(mask[0, 0], expected)


def test_one_document_a_row_needs_no_mask():
    assert document_mask(torch.arange(8).repeat(3, 1)) is None
    assert document_mask(torch.stack([torch.arange(8), torch.arange(8) % 5])) is not None


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"sequence": 4},
        {"tensor": 2, "sequence": 2},
        {"tensor": 2, "pipeline": 2, "expert": 2},
        {"pipeline": 4, "expert": 4},
    ],
)
@pytest.mark.parametrize("axis", ["tensor", "sequence", "expert", "expert_data", "data", "model"])
def test_ranks_that_differ_along_one_axis_are_a_line(axes: dict[str, int], axis: str):
    parallel, ranks = Parallel(**axes), range(16)
    own = {rank: grids._coordinates(ParallelDims(rank, 16, parallel), axis) for rank in ranks}
    wanted = dict.fromkeys(tuple(r for r in ranks if own[r] == own[rank]) for rank in ranks)
    assert [tuple(line) for line in grids._lines(parallel, 16, axis)] == list(wanted)
    for rank in ranks:
        line = ParallelDims(rank, 16, parallel).get_data_parallel_group_ranks()
        assert rank in line and len(line) == ParallelDims(rank, 16, parallel).data


def test_lines_of_two_thousand_ranks_ask_each_rank_once(monkeypatch: pytest.MonkeyPatch):
    asked, coordinates = [], grids._coordinates
    monkeypatch.setattr(grids, "_coordinates", lambda dims, axis: asked.append(dims.rank) or coordinates(dims, axis))
    lines = grids._lines(Parallel(tensor=8, pipeline=8, expert=8), 2048, "expert_data")
    assert sorted(asked) == list(range(2048)) == sorted(rank for line in lines for rank in line)
