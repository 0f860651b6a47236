"""Sections of the DeepSpeed config for ZeRO, offload and pipelines. Golden files (tests/golden) cover whole configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.planning.deepspeed_config import deepspeed_sections
from tests.support.small_configs import plan_of


def zero_section(folder: Path, zero: dict[str, Any]) -> dict[str, Any]:
    plan = plan_of(folder, {"storage": {"scratch": "/local"}, "stages.0.zero": zero, "stages.0.gpus_per_node": 2})
    return deepspeed_sections(plan.stages[0], plan.site)["zero_optimization"]


def test_weights_on_disk_are_neither_prefetched_nor_kept(tmp_path: Path):
    assert zero_section(tmp_path, {"stage": 3, "offload_optimizer": "cpu", "offload_param": "nvme"}) == {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "nvme", "pin_memory": True, "buffer_count": 8, "max_in_cpu": 0},
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
    }


def test_optimizer_on_disk_has_four_buffers_for_small_sub_groups(tmp_path: Path):
    assert zero_section(tmp_path, {"stage": 3, "offload_optimizer": "nvme", "pin_memory": False}) == {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "nvme", "pin_memory": False, "buffer_count": 4},
        "sub_group_size": 100_000_000,
    }


def test_keys_of_stage_3_are_passed_on_in_memory(tmp_path: Path):
    keys = {
        "reduce_bucket_size": 1,
        "stage3_prefetch_bucket_size": 2,
        "stage3_param_persistence_threshold": 3,
        "stage3_max_live_parameters": 4,
        "stage3_max_reuse_distance": 5,
        "zero_hpz_partition_size": 2,
    }
    section = zero_section(tmp_path, {"stage": 3, "allgather_bucket_size": 6, **keys})
    assert section == {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, **keys}


def test_keys_of_stage_3_are_left_out_at_stage_2(tmp_path: Path):
    section = zero_section(tmp_path, {"stage": 2, "allgather_bucket_size": 6, "stage3_max_reuse_distance": 5})
    assert section == {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, "allgather_bucket_size": 6}


def test_zero_0_has_no_other_zero_keys(tmp_path: Path):
    assert zero_section(tmp_path, {"stage": 0}) == {"stage": 0}
    assert zero_section(tmp_path, {"stage": 1, "overlap_comm": False}) == {
        "stage": 1,
        "overlap_comm": False,
        "contiguous_gradients": True,
    }


def test_only_a_pipeline_has_a_pipeline_section_and_sends_whole_activations(tmp_path: Path):
    for pipeline, expected in ((1, None), (2, {"pipe_partitioned": False, "grad_partitioned": False})):
        plan = plan_of(tmp_path, {"stages.0.parallel": {"pipeline": pipeline}, "stages.0.gpus_per_node": 2})
        assert deepspeed_sections(plan.stages[0], plan.site).get("pipeline") == expected


def sections(folder: Path, stage: dict[str, Any], site: dict[str, Any] | None = None) -> dict[str, Any]:
    plan = plan_of(folder, {f"stages.0.{key}": value for key, value in stage.items()}, site)
    return deepspeed_sections(plan.stages[0], plan.site)


OPTIMIZER = {"lr": 0.5, "betas": [0.25, 0.75], "eps": 0.125, "weight_decay": 2.0, "gradient_clipping": 3.0}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_zero_3_recomputes_with_the_linear_function_of_torch(checkpointing: str, tmp_path: Path):
    keys = {"zero": {"stage": 3}, "activation_checkpointing": checkpointing}
    expected = None if checkpointing == "none" else False
    assert sections(tmp_path, keys)["zero_optimization"].get("memory_efficient_linear") is expected


def test_all_sections_of_a_plain_stage_follow_from_its_keys(tmp_path: Path):
    keys = {"optimizer": OPTIMIZER, "micro_batch_size": 2, "precision": "bf16"}
    assert sections(tmp_path, keys) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 3.0,
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.5,
                "betas": [0.25, 0.75],
                "eps": 0.125,
                "weight_decay": 2.0,
                "torch_adam": True,
                "fused": True,
            },
        },
        "zero_optimization": {"stage": 1, "overlap_comm": False, "contiguous_gradients": False},
        "bf16": {"enabled": True, "check_grad_overflow": False},
    }


def test_fused_adam_needs_gpus_and_an_optimizer_in_their_memory(tmp_path: Path):
    no_gpu = {"partitions.0.node.gpus": 0, "accelerator": "cpu"}
    on_cpu = sections(tmp_path, {}, no_gpu)["optimizer"]["params"]
    assert on_cpu["torch_adam"] is True and "fused" not in on_cpu
    offloaded = sections(tmp_path, {"zero": {"offload_optimizer": "cpu"}})["optimizer"]["params"]
    assert sorted(offloaded) == ["betas", "eps", "lr", "weight_decay"]


def test_fp16_section_has_all_settings_of_loss_scaling(tmp_path: Path):
    scale = {
        "loss_scale": 128.0,
        "initial_scale_power": 7,
        "loss_scale_window": 11,
        "hysteresis": 3,
        "min_loss_scale": 0.5,
    }
    found = sections(tmp_path, {"precision": "fp16", "fp16": scale})
    assert found["fp16"] == {"enabled": True, **scale}
    assert "bf16" not in found
    assert not {"fp16", "bf16", "communication_data_type"} & set(sections(tmp_path, {"precision": "fp32"}))


def test_communication_settings_change_the_data_type_and_the_overlap(tmp_path: Path):
    two_ranks = {"gpus_per_node": 2}
    assert (
        sections(tmp_path, {**two_ranks, "communication": {"data_type": "fp32"}})["communication_data_type"] == "fp32"
    )
    compressed = sections(tmp_path, {**two_ranks, "communication": {"powersgd": {}}})["zero_optimization"]
    assert compressed == {"stage": 1, "overlap_comm": False, "contiguous_gradients": True}


def test_a_single_data_parallel_rank_copies_no_gradients_into_buckets(tmp_path: Path):
    no_buckets = {"overlap_comm": False, "contiguous_gradients": False}
    assert sections(tmp_path, {})["zero_optimization"] == {"stage": 1, **no_buckets}
    assert sections(tmp_path, {"gpus_per_node": 2})["zero_optimization"]["overlap_comm"] is True
    halves = sections(tmp_path, {"gpus_per_node": 2, "parallel": {"sequence": 2}})["zero_optimization"]
    assert halves == {"stage": 1, "overlap_comm": True, "contiguous_gradients": True}, "each has half of the tokens"
    whole = sections(tmp_path, {"zero": {"stage": 3}})["zero_optimization"]
    assert whole["contiguous_gradients"] is True, "ZeRO 3 takes gradients out of the parameters in any case"
