"""Sections of the DeepSpeed config for ZeRO, offload and pipelines. Golden files (tests/golden) cover whole configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
