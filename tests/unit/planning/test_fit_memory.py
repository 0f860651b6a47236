"""`auto` takes the least recomputation and the largest micro batch of which the planned memory fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.config.field_types import AUTO_MICRO_BATCH
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError
from longhaul.planning.gpu_memory import GIB, estimate_gpu_memory
from longhaul.planning.needed_nodes import USED_SHARE
from longhaul.report.plan_json import plan_json
from tests.support.small_configs import plan_of

AUTO = {
    "stages.0.micro_batch_size": "auto",
    "stages.0.activation_checkpointing": "auto",
    "stages.0.global_batch_size": 48,
    "stages.0.precision": "bf16",
}


def planned(folder: Path, memory_gib: float, **keys: Any) -> Stage:
    changes = {**AUTO, **{f"stages.0.{key}": value for key, value in keys.items()}}
    return plan_of(folder, changes, {"partitions.0.node.gpu_memory_gib": memory_gib}).stages[0].stage


def needed_gib(folder: Path, micro: int, recomputed: str) -> float:
    keys = {"stages.0.micro_batch_size": micro, "stages.0.activation_checkpointing": recomputed}
    stage = plan_of(folder, {**AUTO, **keys}).stages[0]
    assert stage.sizes
    return estimate_gpu_memory(stage.stage, stage.sizes, 1).total / GIB


def test_whole_batch_is_taken_where_it_fits(tmp_path: Path):
    stage = planned(tmp_path, 80)
    assert (stage.micro_batch_size, stage.activation_checkpointing) == (48, "none")


@pytest.mark.parametrize(("micro", "recomputed"), [(24, "none"), (3, "none")])
def test_largest_micro_batch_that_divides_the_global_batch_and_fits(tmp_path: Path, micro: int, recomputed: str):
    """A GPU with exactly the memory of one choice takes it, and one with a little less takes a smaller one."""
    memory_gib = needed_gib(tmp_path, micro, recomputed) / USED_SHARE
    stage = planned(tmp_path, memory_gib * 1.000001)
    assert (stage.micro_batch_size, stage.activation_checkpointing) == (micro, recomputed)
    less = planned(tmp_path, memory_gib * 0.9999)
    assert less.micro_batch_size < micro or less.activation_checkpointing != recomputed


def test_more_is_recomputed_only_where_no_micro_batch_fits(tmp_path: Path):
    """With 128 tokens, layers without recomputation need more than selective ones, and those more than full ones."""
    keys = {"sequence_length": 128, "global_batch_size": 1}
    memory = {kind: 0.0 for kind in ("none", "selective", "full")}
    for kind in memory:
        changes = {**AUTO, **{f"stages.0.{key}": value for key, value in keys.items()}}
        changes |= {"stages.0.micro_batch_size": 1, "stages.0.activation_checkpointing": kind}
        changes |= {"model.llama.num_hidden_layers": 32, "stages.0.zero": {"stage": 3, "offload_optimizer": "cpu"}}
        stage = plan_of(tmp_path, changes).stages[0]
        assert stage.memory
        memory[kind] = stage.memory.total / GIB
    assert memory["none"] > memory["selective"] > memory["full"]
    for kind, needed in memory.items():
        changes = {**AUTO, **{f"stages.0.{key}": value for key, value in keys.items()}}
        changes |= {"model.llama.num_hidden_layers": 32, "stages.0.zero": {"stage": 3, "offload_optimizer": "cpu"}}
        site = {"partitions.0.node.gpu_memory_gib": needed / USED_SHARE * 1.000001}
        assert plan_of(tmp_path, changes, site).stages[0].stage.activation_checkpointing == kind


def test_nothing_fits(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"micro_batch_size 1 with activation_checkpointing full needs 0\.1 GiB"
    ) as refused:
        planned(tmp_path, 1e-6)
    assert "90% of the 1e-06 GiB of site centre" in refused.value.message
    assert refused.value.hint == "use a smaller model, or GPUs with more memory"


def test_the_remedy_of_auto_is_enough(tmp_path: Path):
    """Half of what one GPU needs: ZeRO 1 on one GPU divides nothing. DeepSpeed's default bucket is larger than this model."""
    memory_gib = needed_gib(tmp_path, 1, "full") / USED_SHARE / 2
    zero = {"stage": 1, "reduce_bucket_size": 1000}
    with pytest.raises(UserError) as refused:
        planned(tmp_path, memory_gib, zero=zero)
    assert "set zero.offload_optimizer to cpu" in refused.value.hint
    offloaded = {f"stages.{number}.zero": {**zero, "offload_optimizer": "cpu"} for number in (0, 1)}
    assert plan_of(tmp_path, {**AUTO, **offloaded}, {"partitions.0.node.gpu_memory_gib": memory_gib})


def test_a_shorter_sequence_is_a_remedy_where_it_is_enough(tmp_path: Path):
    memory_gib = 0.99999 * needed_gib(tmp_path, 1, "full") / USED_SHARE
    with pytest.raises(UserError) as refused:
        planned(tmp_path, memory_gib)
    assert refused.value.hint.endswith(", or shorten sequence_length to 32")
    assert planned(tmp_path, memory_gib, sequence_length=32)


def test_a_pipeline_keeps_its_ranks_busy(tmp_path: Path):
    """Two ranks are idle for at most 20 % of a step with four micro batches, so of 48 samples at most 12 are in one."""
    stage = planned(tmp_path, 80, parallel={"pipeline": 2}, gpus_per_node=2)
    assert stage.micro_batch_size == 12


def test_the_smallest_settings_hold_until_the_size_of_a_model_is_known(tmp_path: Path):
    plan = plan_of(tmp_path, {**AUTO, "model": {"pretrained": {"hub": {"id": "org/model"}}}})
    stage = plan.stages[0].stage
    assert (stage.micro_batch_size, stage.activation_checkpointing) == (1, "full")


def test_the_plan_shows_the_choice_and_the_config_keeps_auto(tmp_path: Path):
    plan = plan_of(tmp_path, AUTO, {"partitions.0.node.gpu_memory_gib": 80})
    row = plan_json(plan)["stages"][0]
    assert (row["micro_batch_size"], row["activation_checkpointing"], row["accumulation"]) == (48, "none", 1)
    config = plan.config.stages[0]
    assert config.micro_batch_size == AUTO_MICRO_BATCH and config.model_dump()["micro_batch_size"] == "auto"
    assert Stage.model_validate_json(config.model_dump_json(by_alias=True)) == config
