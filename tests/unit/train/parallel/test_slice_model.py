"""The slices of all ranks: together they are the whole model exactly once, and no rank holds more than the plan states.

No process groups are created.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.checkpoint_io.tensor_slice import TensorSlice
from longhaul.config.load_config import load_config
from longhaul.config.model_size import model_size
from longhaul.config.stage_config import Parallel
from longhaul.planning import build_plan
from longhaul.planning.gpu_memory import estimate_gpu_memory
from longhaul.planning.layers_per_pipeline_rank import layers_per_pipeline_rank
from longhaul.planning.plan import StagePlan
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.slice_model import parameter_slices, slice_model
from tests.support.pipeline_run import REPOSITORY
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
def clear_deepspeed_groups():
    """DeepSpeed keeps registered groups by name; these tests register None."""
    yield
    from deepspeed.utils import groups

    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()


def slices_of_rank(model: dict[str, Any], parallel: Parallel, rank: int, world_size: int) -> list[TensorSlice]:
    from transformers import AutoConfig

    sliced = slice_model(AutoConfig.for_model(**model), ParallelDims(rank, world_size, parallel))
    return [tensor_slice for tensor_slice, _ in parameter_slices(sliced)]


@pytest.mark.parametrize(
    "axes", [{"tensor": 2}, {"pipeline": 2}, {"expert": 4}, {"tensor": 2, "pipeline": 2, "expert": 2}]
)
def test_all_ranks_together_hold_every_element_once(tmp_path: Path, axes: dict[str, int]):
    model = plan_of(tmp_path, {"model": {"deepseek_v3": MIXTURE}}).config.model.config_dict()
    parallel = Parallel(**axes)
    by_name: dict[str, dict[Any, TensorSlice]] = {}
    for rank in range(8):
        for tensor_slice in slices_of_rank(model, parallel, rank, 8):
            by_name.setdefault(tensor_slice.name, {})[tuple(tensor_slice.axis_ranges.items())] = tensor_slice
    for name, slices in by_name.items():
        shape = next(iter(slices.values())).shape
        assert sum(tensor_slice.numel for tensor_slice in slices.values()) == math.prod(shape), name
        count = torch.zeros(shape)
        for tensor_slice in slices.values():
            tensor_slice.insert(count, tensor_slice.extract(count) + 1)
        assert (count == 1).all(), name
    assert sum(math.prod(next(iter(s.values())).shape) for s in by_name.values()) == model_size(model).total


def test_tensor_ranks_hold_local_shapes(tmp_path: Path):
    """A tensor that is replicated by mistake would still train, but would waste the memory that the axis saves."""
    model = plan_of(tmp_path, {"model": {"deepseek_v3": MIXTURE}}).config.model.config_dict()
    slices = slices_of_rank(model, Parallel(tensor=2), 1, 2)
    shapes = {tensor_slice.name: tensor_slice.local_shape for tensor_slice in slices}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (200, 64)
    layer = "model.layers.1."
    assert shapes[f"{layer}self_attn.q_b_proj.weight"] == (48, 16)
    assert shapes[f"{layer}self_attn.o_proj.weight"] == (64, 32)
    assert shapes[f"{layer}mlp.experts.gate_up_proj"] == (4, 32, 64)
    assert shapes[f"{layer}mlp.experts.down_proj"] == (4, 64, 16)
    assert shapes[f"{layer}mlp.shared_experts.down_proj.weight"] == (64, 16)
    assert shapes[f"{layer}mlp.gate.weight"] == (4, 64)


LAYOUTS_OF_V3 = [Parallel(pipeline=16, expert=32), Parallel(pipeline=8, tensor=4, expert=16)]


def plan_v3(parallel: Parallel) -> tuple[StagePlan, dict[str, Any]]:
    plan = build_plan(load_config(REPOSITORY / "config" / "examples" / "deepseek-v3-671b-3d.yaml"))
    planned = plan.stages[0]
    stage = planned.stage.model_copy(update={"parallel": parallel})
    return StagePlan(**{**vars(planned), "stage": stage}), plan.config.model.config_dict()


@pytest.mark.parametrize("parallel", LAYOUTS_OF_V3, ids=lambda parallel: f"pipeline {parallel.pipeline}")
def test_the_fullest_rank_of_deepseek_v3_holds_the_planned_bytes(parallel: Parallel):
    """671 B parameters over 512 ranks: weights, gradients and optimizer states agree with the plan within 1 %.

    Pipeline rank 0 has the most parameters. Rank 1 has the most experts, which ZeRO partitions least. `make bench-rank-slices`
    checks all ranks.
    """
    planned, model = plan_v3(parallel)
    replicas, held_bytes = 512 // (parallel.pipeline * parallel.tensor), []
    for pipeline_rank in (0, 1, parallel.pipeline - 1):
        slices = slices_of_rank(model, parallel, pipeline_rank * replicas * parallel.tensor, 512)
        experts = sum(tensor_slice.numel for tensor_slice in slices if ".experts." in tensor_slice.name)
        dense = sum(tensor_slice.numel for tensor_slice in slices) - experts
        held_bytes.append(4 * (dense + experts) + 12 * (dense / replicas + experts * parallel.expert / replicas))
    assert max(held_bytes) == pytest.approx(
        estimate_gpu_memory(planned.stage, model_size(model), 512).model_states, rel=0.01
    )


def test_pipeline_ranks_get_equal_numbers_of_layers():
    assert [len(own) for own in layers_per_pipeline_rank(61, 16)] == [4] * 13 + [3] * 3
    assert [layer for own in layers_per_pipeline_rank(61, 16) for layer in own] == list(range(61))
