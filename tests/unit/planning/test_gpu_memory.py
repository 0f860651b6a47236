"""The memory estimate, compared with numbers computed by hand and with peaks that a GPU measured.

`make bench-memory` writes the measured peaks to bench/results/gpu_memory*.txt.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from bench.gpu_memory import GROUPS, OPTIONS, plan_options, record
from bench.memory_plan import MODEL, TARGET, plan_175b
from longhaul.config.model_size import model_size
from longhaul.config.stage_config import Parallel, Stage, Zero
from longhaul.planning.gpu_memory import GIB, MemoryEstimate, estimate_gpu_memory
from tests.support.pipeline_run import REPOSITORY
from tests.support.tiny_model_sizes import TINY_QWEN3_MOE, tiny_size, tiny_stage

RESULTS = REPOSITORY / "bench/results"
RECORDED = ("dense", "mixture")
"""Groups with a record. The rows of states in CPU memory or on a disk have none since layers are compiled."""
SMALL_BUCKET = {"reduce_bucket_size": 1000}
# ZeRO stage 1, bf16, 4 ranks: see test_model_state_memory.py and test_activation_memory.py for the parts.
ZERO_1 = MemoryEstimate(
    weights=2 * 1352,
    gradients=2 * 1352,
    optimizer=12 * 1352 // 4,
    activations=2 * (88 + 16) * 32 * 2,
    logits=3872,
    gathered_weights=0,
    gradient_buckets=2 * 2 * 1000,
    optimizer_step=2 * 1352 // 4,
    host=0,
    locked=0,
    disk=0,
    snapshot=12 * 1352 // 4 + 2 * 1352,
)


def test_estimate_of_zero_1_equals_hand_computed_bytes():
    memory = estimate_gpu_memory(tiny_stage(zero=Zero(stage=1, **SMALL_BUCKET)), tiny_size(), 4)
    assert memory == ZERO_1
    assert memory.model_states == 2704 + 2704 + 4056
    assert memory.total == 9464 + 13312 + 3872 + 4000


def test_optimizer_step_counts_if_it_is_larger_than_the_passes():
    memory = MemoryEstimate(1, 2, 4, 8, 16, 32, 64, optimizer_step=121, host=0, locked=0, disk=0, snapshot=0)
    assert memory.total == 7 + 121, "8 + 16 + 32 + 64 = 120"


def test_as_gib_has_all_parts_and_the_total():
    memory = MemoryEstimate(*(number * GIB for number in range(12)))
    expected = {name: float(value // GIB) for name, value in asdict(memory).items()}
    assert memory.as_gib() == {**expected, "total": 0 + 1 + 2 + 3 + 4 + 5 + 6}


def test_as_gib_has_three_decimals():
    memory = MemoryEstimate(GIB // 3, *[0] * 11)
    assert (memory.as_gib()["weights"], memory.as_gib()["total"]) == (0.333, 0.333)


def test_optimizer_in_cpu_memory_needs_16_bytes_per_parameter_of_the_partition():
    zero = Zero(stage=1, offload_optimizer="cpu", **SMALL_BUCKET)
    memory = estimate_gpu_memory(tiny_stage(zero=zero), tiny_size(), 4)
    assert (memory.host, memory.locked, memory.disk) == (16 * 1352 // 4, 0, 0)
    assert (memory.gradients, memory.optimizer, memory.optimizer_step) == (0, 0, 0)


def test_cpu_memory_includes_offloaded_activations_and_swap_buffers():
    zero = Zero(stage=3, offload_optimizer="nvme", **SMALL_BUCKET)
    stage = tiny_stage(zero=zero, activation_checkpointing="offload")
    memory = estimate_gpu_memory(stage, tiny_size(), 4)
    gradients, inputs, buffers = 2 * 1352 // 4, 2 * 8 * 32 * 2, 16 * 1352 // 4
    assert (memory.host, memory.locked) == (gradients + inputs + buffers, buffers)
    assert memory.disk == 16 * 1352 // 4


def test_attention_mask_counts_as_activations():
    packed, plain = (
        estimate_gpu_memory(tiny_stage(kind=kind, precision="fp32"), tiny_size(), 4).activations
        for kind in ("sft", "pretrain")
    )
    assert packed - plain == 2 * 16 * 16 * (1 + 4)


def test_zero_3_gathers_weights_over_the_data_parallel_ranks():
    memory = estimate_gpu_memory(tiny_stage(zero=Zero(stage=3, **SMALL_BUCKET)), tiny_size(), 4)
    assert (memory.weights, memory.gathered_weights) == (2 * 1352 // 4, 2 * 1352)


@pytest.mark.parametrize(("tied", "parameters"), [(False, 592 + 80 + 8), (True, 592 + 80)])
def test_fullest_pipeline_rank_has_the_head(tied: bool, parameters: int):
    """Two ranks have one layer each. The first also has the embedding, the last also has the head and the final norm.

    With a tied embedding, the head is a second copy of it, and the estimate leaves out the final norm.
    """
    stage = tiny_stage(parallel=Parallel(pipeline=2))
    assert estimate_gpu_memory(stage, tiny_size(tie_word_embeddings=tied), 4).weights == 2 * parameters


def test_tensor_parallelism_splits_all_parameters_but_norms():
    stage = tiny_stage(parallel=Parallel(tensor=2))
    assert estimate_gpu_memory(stage, tiny_size(), 4).weights == 2 * (2 * 16 + (1352 - 2 * 16) // 2)


def test_experts_are_partitioned_over_fewer_ranks_than_other_weights():
    """4 data-parallel ranks, experts over 2: each rank has 664 other parameters and half of 2·384 in experts."""
    memory = estimate_gpu_memory(tiny_stage(parallel=Parallel(expert=2)), model_size(TINY_QWEN3_MOE), 4)
    assert memory.weights == 2 * (664 + 384)
    assert memory.optimizer == 12 * 664 // 4 + 12 * 384 // 2
    assert memory.optimizer_step == 2 * 664 // 4 + 2 * 384 // 2


def measured_peaks(group: str) -> dict[str, tuple[float, float]]:
    """Return option -> (peak in GiB, relative difference of the loss to the plain run) of a group's record.

    A row has the option, GiB planned, measured and held, planned / measured, and the difference.
    """
    lines = (RESULTS / f"{record(group)}.txt").read_text().splitlines()
    rows = [line.split() for line in lines]
    return {row[0]: (float(row[2]), float(row[5])) for row in rows if len(row) == 6 and row[0] in OPTIONS}


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in RECORDED for option in GROUPS[group][1]])
def test_estimate_is_within_5_percent_of_the_measured_peak(group: str, option: str, tmp_path: Path):
    for name in ("corpus", "chats"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    memory = plan_options(tmp_path, GROUPS[group][0]).stage(option).memory
    assert memory
    assert memory.total / 2**30 == pytest.approx(measured_peaks(group)[option][0], rel=0.05)


@pytest.mark.parametrize("group", RECORDED)
def test_measured_losses_of_all_options_equal_those_of_the_plain_run(group: str):
    peaks = measured_peaks(group)
    assert set(peaks) == set(GROUPS[group][1])
    assert max(difference for _, difference in peaks.values()) < 2e-3  # in bf16


def test_full_recomputation_saves_a_third_at_175_billion_parameters():
    totals = {stage.name: stage.memory.total for stage in plan_175b().stages if stage.memory}
    assert list(totals) == ["none", "selective", "full", "offload"]
    assert sorted(totals.values(), reverse=True) == list(totals.values())
    assert totals["full"] < TARGET * totals["none"]


def test_hpz_adds_a_second_copy_of_the_weights_at_175_billion_parameters():
    stage, sizes = plan_175b().stages[0].stage, model_size({"model_type": "llama", **MODEL})
    plain, with_hpz = (estimate_gpu_memory(_with_hpz(stage, size), sizes, world_size=64).weights for size in (1, 8))
    assert with_hpz - plain == 2 * sizes.total // 8


def _with_hpz(stage: Stage, size: int) -> Stage:
    return stage.model_copy(update={"zero": Zero(stage=3, zero_hpz_partition_size=size), "parallel": Parallel()})
