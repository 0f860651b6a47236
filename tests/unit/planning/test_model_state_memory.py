"""Memory of model states and their buffers, compared with numbers computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from longhaul.config.communication_config import Communication, PowerSgd
from longhaul.config.model_size import model_size
from longhaul.config.stage_config import BadSteps, Parallel, Zero
from longhaul.planning.constants_shared_with_trainer import swap_param_buffer_elements
from longhaul.planning.model_state_memory import (
    ModelStates,
    gathered_weight_bytes,
    gradient_bucket_bytes,
    model_states,
    optimizer_step_bytes,
    swap_buffer_bytes,
)
from tests.support.tiny_model_sizes import TINY_QWEN3_MOE, tiny_size, tiny_stage

# 1000 parameters over 4 ranks: ZeRO settings, precision, and bytes of weights, gradients, optimizer, host and disk
MODEL_STATES: dict[str, tuple[dict[str, Any], str, tuple[int, int, int, int, int]]] = {
    "ZeRO 0 in fp32": ({"stage": 0}, "fp32", (4000, 4000, 8000, 0, 0)),
    "ZeRO 1 in fp32": ({"stage": 1}, "fp32", (4000, 4000, 3000, 0, 0)),
    "ZeRO 1 in bf16": ({"stage": 1}, "bf16", (2000, 2000, 3000, 0, 0)),
    "ZeRO 1 in fp16": ({"stage": 1}, "fp16", (2000, 2000, 3000, 0, 0)),
    "ZeRO 2": ({"stage": 2}, "bf16", (2000, 500, 3000, 0, 0)),
    "ZeRO 3": ({"stage": 3}, "bf16", (500, 500, 3000, 0, 0)),
    "ZeRO 3 with hpZ": ({"stage": 3, "zero_hpz_partition_size": 2}, "bf16", (500 + 1000, 500, 3000, 0, 0)),
    "ZeRO 1, optimizer in CPU memory": ({"stage": 1, "offload_optimizer": "cpu"}, "bf16", (2000, 0, 0, 3000 + 1000, 0)),
    "ZeRO 3, optimizer in CPU memory": ({"stage": 3, "offload_optimizer": "cpu"}, "bf16", (500, 0, 0, 3000 + 1000, 0)),
    "ZeRO 3, optimizer on disk": ({"stage": 3, "offload_optimizer": "nvme"}, "bf16", (500, 0, 0, 500, 3000 + 1000)),
    "ZeRO 3, weights in CPU memory": ({"stage": 3, "offload_param": "cpu"}, "bf16", (0, 500, 3000, 500, 0)),
    "ZeRO 3, all in CPU memory": (
        {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
        "bf16",
        (0, 0, 0, 3000 + 1000 + 500, 0),
    ),
    "ZeRO 3, all on disk": (
        {"stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme"},
        "bf16",
        (0, 0, 0, 500, 3000 + 1000 + 500),
    ),
}


@pytest.mark.parametrize(("zero", "precision", "expected"), MODEL_STATES.values(), ids=MODEL_STATES)
def test_model_states_equal_hand_computed_bytes(zero: dict[str, Any], precision: str, expected: tuple[int, ...]):
    assert model_states(tiny_stage(zero=Zero(**zero), precision=precision), 1000, 4) == ModelStates(*expected)


def test_model_states_add_up_field_by_field():
    assert ModelStates(1, 2, 3, 4, 5) + ModelStates(10, 20, 30, 40, 50) == ModelStates(11, 22, 33, 44, 55)


BILLION = 10**9
LARGEST_LAYER_PARTITION = 592 // 4
# partition in elements, ZeRO settings, expected bytes; over 4 ranks, in bf16
SWAP_BUFFER_CASES: dict[str, tuple[int, dict[str, Any], int]] = {
    "nothing on disk": (BILLION, {"offload_optimizer": "cpu", "offload_param": "cpu"}, 0),
    "optimizer, small partition": (338, {"offload_optimizer": "nvme"}, 4 * 4 * 338),
    "optimizer, large partition": (
        BILLION,
        {"offload_optimizer": "nvme"},
        4 * 4 * (100_000_000 + LARGEST_LAYER_PARTITION),
    ),
    # 8 buffers for a partition of the largest tensor, 128 / 4 elements, and one sub-group of DeepSpeed's default size
    "weights, small partition": (338, {"offload_optimizer": "cpu", "offload_param": "nvme"}, 2 * (8 * 32 + 338)),
    "weights, large partition": (
        2 * BILLION,
        {"offload_optimizer": "cpu", "offload_param": "nvme"},
        2 * (8 * 32 + BILLION + LARGEST_LAYER_PARTITION),
    ),
    "both, small partition": (
        338,
        {"offload_optimizer": "nvme", "offload_param": "nvme"},
        4 * 4 * 338 + 2 * (8 * 32 + 338),
    ),
}


@pytest.mark.parametrize(("partition", "zero", "expected"), SWAP_BUFFER_CASES.values(), ids=SWAP_BUFFER_CASES)
def test_swap_buffers_equal_hand_computed_bytes(partition: int, zero: dict[str, Any], expected: int):
    assert swap_buffer_bytes(tiny_stage(zero=Zero(stage=3, **zero)), tiny_size(), partition, ranks=4) == expected


@pytest.mark.parametrize(("ranks", "elements"), [(1, 128), (4, 32), (5, 26), (128, 1)])
def test_swap_buffer_of_weights_holds_a_partition_of_the_largest_tensor(ranks: int, elements: int):
    assert swap_param_buffer_elements(tiny_size(), ranks) == elements


OPTIMIZER_STEPS: dict[str, tuple[dict[str, Any], bool, float]] = {
    "one pass reads a flat copy of bf16 gradients": ({"zero": Zero(stage=1)}, True, 2),
    "under ZeRO 3 they are flat already": ({"zero": Zero(stage=3)}, True, 0),
    "FP8 has bf16 gradients": ({"zero": Zero(stage=1), "precision": "fp8"}, True, 2),
    "CPUs also copy them in fp32": ({"zero": Zero(stage=1)}, False, 2 + 4),
    "so do stages that wait for the result": (
        {"zero": Zero(stage=1), "bad_steps": BadSteps(spike_factor=3)},
        True,
        2 + 4,
    ),
    "stages without a compiler": ({"zero": Zero(stage=1), "compile": "off"}, True, 2 + 4),
    "pipelines": ({"zero": Zero(stage=1), "parallel": Parallel(pipeline=2)}, True, 2 + 4),
    "and weights in CPU memory": ({"zero": Zero(stage=3, offload_param="cpu")}, True, 2 + 4),
    "fp32 needs no other copy": ({"zero": Zero(stage=3), "precision": "fp32"}, True, 4),
    "ZeRO 0 copies nothing": ({"zero": Zero(stage=0), "precision": "fp32"}, True, 0),
    "an optimizer in CPU memory neither": ({"zero": Zero(stage=1, offload_optimizer="cpu")}, True, 0),
    "nor one on a disk": ({"zero": Zero(stage=3, offload_optimizer="nvme")}, True, 0),
}


@pytest.mark.parametrize(("changes", "on_gpus", "per_parameter"), OPTIMIZER_STEPS.values(), ids=OPTIMIZER_STEPS)
def test_optimizer_step_needs_copies_of_gradients(changes: dict[str, Any], on_gpus: bool, per_parameter: float):
    assert optimizer_step_bytes(tiny_stage(**changes), 1000, 4, on_gpus) == per_parameter * 250


# ZeRO settings, ranks, expected bytes in bf16: a layer has 592 parameters, the whole model 1352
GATHERED: dict[str, tuple[dict[str, Any], int, int]] = {
    "ZeRO 2 gathers nothing": ({"stage": 2}, 4, 0),
    "ZeRO 3 keeps a small model": ({"stage": 3}, 4, 2 * 1352),
    "live parameters limit what is kept": ({"stage": 3, "stage3_max_live_parameters": 1000}, 4, 2 * 1000),
    "the layer in use is always gathered": ({"stage": 3, "stage3_max_live_parameters": 100}, 4, 2 * 592),
    "weights on disk are not kept": ({"stage": 3, "offload_param": "nvme"}, 4, 2 * 592),
    "a single rank gathers nothing": ({"stage": 3}, 1, 0),
    "a single rank copies offloaded weights": ({"stage": 3, "offload_param": "cpu"}, 1, 2 * 1352),
}


@pytest.mark.parametrize(("zero", "ranks", "expected"), GATHERED.values(), ids=GATHERED)
def test_gathered_weights_equal_hand_computed_bytes(zero: dict[str, Any], ranks: int, expected: int):
    assert gathered_weight_bytes(tiny_stage(zero=Zero(**zero)), tiny_size(), ranks, 1352) == expected


def test_deepspeeds_default_keeps_a_billion_elements():
    assert gathered_weight_bytes(tiny_stage(zero=Zero(stage=3)), tiny_size(), 4, 2 * BILLION) == 2 * BILLION


def test_gathered_layer_is_split_by_tensor_and_expert_parallelism():
    zero = Zero(stage=3, stage3_max_live_parameters=100)
    # 16 parameters of norms are not split: 16 + 576 / 2
    stage = tiny_stage(zero=zero, parallel=Parallel(tensor=2))
    assert gathered_weight_bytes(stage, tiny_size(), 4, 1352) == 2 * (16 + 576 // 2)
    # 248 parameters and half of 384 in routed experts
    stage = tiny_stage(zero=zero, parallel=Parallel(expert=2))
    assert gathered_weight_bytes(stage, model_size(TINY_QWEN3_MOE), 4, 1432) == 2 * (248 + 384 // 2)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 1}, 2 * 2 * 500_000_000),
        ({"stage": 2, "overlap_comm": False}, 2 * 500_000_000),
        ({"stage": 3}, 2 * 500_000_000),
        ({"stage": 2, "reduce_bucket_size": 1000}, 2 * 2 * 1000),
        ({"stage": 1, "contiguous_gradients": False}, 0),
        ({"stage": 0}, 0),
    ],
)
def test_gradient_buckets_equal_hand_computed_bytes(zero: dict[str, Any], expected: int):
    assert gradient_bucket_bytes(tiny_stage(zero=Zero(**zero)), 1000, 4) == expected


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("contiguous", [True, False])
def test_one_rank_copies_gradients_to_the_host_by_way_of_one_bucket(stage: int, contiguous: bool):
    """DeepSpeed sets contiguous_gradients where the optimizer is in CPU memory."""
    zero = Zero.model_validate(
        {"stage": stage, "offload_optimizer": "cpu", "contiguous_gradients": contiguous, "reduce_bucket_size": 1000}
    )
    assert gradient_bucket_bytes(tiny_stage(zero=zero), 5000, 1) == 2 * 1000


@pytest.mark.parametrize(("stage", "expected"), [(1, 0), (2, 0), (3, 2 * 500_000_000)])
def test_single_data_parallel_rank_needs_buckets_only_under_zero_3(stage: int, expected: int):
    assert gradient_bucket_bytes(tiny_stage(zero=Zero.model_validate({"stage": stage})), 1000, 1) == expected


@pytest.mark.parametrize(("parameters", "bucket"), [(1000, 1000), (10**8, 25_000_000)])
def test_powersgd_keeps_two_errors_and_one_bucket_twice_in_fp32(parameters: int, bucket: int):
    stage = tiny_stage(communication=Communication(powersgd=PowerSgd()))
    assert gradient_bucket_bytes(stage, parameters, 4) == 4 * (2 * parameters + 2 * bucket)
