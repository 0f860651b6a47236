"""Checks of a stage against site, model and settings: exact limits, and messages with key, value, limit and remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longhaul.cli import main
from longhaul.config.load_config import load_config
from longhaul.config.model_size import model_size
from longhaul.config.partition_config import NodeShape, Partition
from longhaul.config.run_config import Config, Storage
from longhaul.config.schedule_config import Schedule
from longhaul.config.site_config import Site
from longhaul.config.software_config import Accelerator
from longhaul.config.stage_config import CheckpointSettings, Parallel, Recovery, Stage, Zero
from longhaul.errors import UserError
from longhaul.planning.check_feasibility import (
    accumulation_steps,
    check_checkpoint_files,
    check_chunk_files,
    check_job_limits,
    check_memory,
    check_number_of_steps,
    check_offload,
    check_positions,
    check_precision,
    check_save_time,
    check_schedule,
    check_site,
    check_vocabulary,
    deterministic_warning,
    not_compiled_warning,
    save_time_warning,
)
from longhaul.planning.gpu_memory import MemoryEstimate
from tests.support.small_configs import write_config
from tests.support.tiny_model_sizes import TINY_QWEN3_MOE, tiny_size, tiny_stage

GIB = 2**30


def refusal(check: Callable[..., object], *arguments: Any) -> tuple[str, str] | None:
    """Return message and remedy of a check's UserError, or None if it passes."""
    try:
        check(*arguments)
    except UserError as error:
        return error.message, error.hint
    return None


GPUS = Partition(jobs=("gpu",), max_nodes=4, node=NodeShape(cpus=64, memory_mb=1000, gpus=8))


def site(*partitions: Partition, **changes: Any) -> Site:
    """Return a site, by default with 4 nodes of 8 GPUs and 64 cores and without a time limit."""
    one_machine = Site(
        name="centre",
        scheduler="local",
        partitions=(GPUS.model_copy(update={"max_nodes": 1}),),
        accelerator=Accelerator(cuda="13.0"),
    )
    return one_machine.model_copy(update={"partitions": partitions or (GPUS,), **changes})


def with_node(**changes: Any) -> Partition:
    return GPUS.model_copy(update={"node": GPUS.node.model_copy(update=changes)})


def run_config(folder: Path, **changes: Any) -> Config:
    """Return the small config with these dotted keys changed ("__" stands for a dot)."""
    return load_config(write_config(folder, {key.replace("__", "."): value for key, value in changes.items()})).config


@pytest.mark.parametrize(
    ("global_batch_size", "micro", "data_parallel", "expected"), [(8, 2, 1, 4), (8, 2, 4, 1), (24, 2, 3, 4)]
)
def test_accumulation_is_the_global_batch_divided_by_one_pass(
    global_batch_size: int, micro: int, data_parallel: int, expected: int
):
    stage = tiny_stage(global_batch_size=global_batch_size, micro_batch_size=micro)
    assert accumulation_steps(stage, data_parallel) == expected


@pytest.mark.parametrize(("data_parallel", "possible"), [(3, 6), (5, 10)])
def test_global_batch_that_does_not_divide_is_refused_with_the_nearest_smaller_one(data_parallel: int, possible: int):
    assert refusal(accumulation_steps, tiny_stage(), data_parallel) == (
        f"stages.base: global_batch_size 8 is not a multiple of micro_batch_size 2 x data parallel {data_parallel} = {possible}",
        f"use a global_batch_size of {possible}, or another micro_batch_size",
    )


def test_nearest_smaller_global_batch_has_several_passes():
    refused = refusal(accumulation_steps, tiny_stage(global_batch_size=15), 3)
    assert refused and refused[1] == "use a global_batch_size of 12, or another micro_batch_size"


def test_tokenizer_may_have_as_many_tokens_as_the_model(tmp_path: Path):
    config = run_config(tmp_path)
    assert refusal(check_vocabulary, config, tiny_size(vocab_size=400)) is None
    assert refusal(check_vocabulary, config, tiny_size(vocab_size=399)) == (
        "tokenizer.train.vocab_size 400 is larger than the model's vocab_size 399",
        "set tokenizer.train.vocab_size to at most 399, or increase the model's vocab_size",
    )
    existing = run_config(tmp_path, tokenizer={"path": "folder"})
    assert refusal(check_vocabulary, existing, tiny_size(vocab_size=1)) is None


SCHEDULES: list[tuple[dict[str, Any], tuple[str, str] | None]] = [
    ({"kind": "wsd", "decay_steps": 1, "warmup_steps": 9}, None),
    ({"kind": "cosine", "warmup_steps": 10}, None),
    ({"kind": "wsd", "warmup_steps": 0.5, "decay_steps": 0.5}, None),
    (
        {"kind": "wsd", "warmup_steps": 0.55, "decay_steps": 0.45},
        (
            "stages.base.schedule: warmup_steps 6 + decay_steps 5 exceed the stage's 10 steps",
            "reduce them, write them as shares of the steps such as 0.03, or train for more steps",
        ),
    ),
    (
        {"kind": "wsd", "warmup_steps": 0.6, "decay_steps": 0.5},
        ("stages.base.schedule: warmup_steps 0.6 + decay_steps 0.5 exceed the stage", "reduce them"),
    ),
    (
        {"kind": "wsd"},
        ("stages.base.schedule: kind wsd needs decay_steps >= 1; it is 0", "use 10 to 20 % of the steps"),
    ),
    (
        {"kind": "linear", "decay_steps": 1},
        ("stages.base.schedule.decay_steps 1 has no effect with kind linear", "remove decay_steps, or use kind wsd"),
    ),
    (
        {"kind": "wsd", "decay_steps": 2, "warmup_steps": 9},
        (
            "stages.base.schedule: warmup_steps 9 + decay_steps 2 exceed the stage's 10 steps",
            "reduce them, write them as shares of the steps such as 0.03, or train for more steps",
        ),
    ),
]


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES)
def test_schedule_must_fit_its_kind_and_the_steps(schedule: dict[str, Any], expected: tuple[str, str] | None):
    stage = tiny_stage(schedule=Schedule(**schedule))
    assert (refusal(check_schedule, stage) or refusal(check_number_of_steps, stage, 10)) == expected


def test_profile_must_end_with_the_steps():
    stage = tiny_stage(profile_steps=(3, 11))
    assert refusal(check_number_of_steps, stage, 11) is None
    assert refusal(check_number_of_steps, stage, 10) == (
        "stages.base.profile_steps [3, 11] exceed the stage's 10 steps",
        "profile steps up to 10",
    )


PRECISIONS: list[tuple[dict[str, Any], int, tuple[str, str] | None]] = [
    ({"precision": "fp16"}, 1, None),
    ({"precision": "bf16"}, 0, None),
    ({"precision": "fp32", "zero": Zero(stage=0)}, 8, None),
    ({"precision": "bf16", "sequence_aux_loss_coef": 0.5}, 8, None),
    ({"precision": "fp8"}, 1, None),
    (
        {"precision": "fp8"},
        0,
        ("stages.base: precision fp8 on site centre, which has no GPU", "set precision to bf16 or fp32"),
    ),
    (
        {"precision": "fp8", "sequence_length": 12},
        1,
        (
            "stages.base: precision fp8 with 24 tokens for each rank and micro batch: FP8 units multiply multiples of 16",
            "make micro_batch_size times sequence_length a multiple of 16",
        ),
    ),
    (
        {"precision": "fp8", "zero": Zero(stage=0)},
        1,
        (
            "stages.base: precision fp8 with ZeRO stage 0 has no fp32 master weights, which changes the result",
            "set zero.stage to 1",
        ),
    ),
    (
        {"precision": "fp16"},
        0,
        (
            "stages.base: precision fp16 on site centre, which has no GPU: DeepSpeed's loss scaling needs GPUs",
            "set precision to bf16 or fp32",
        ),
    ),
    (
        {"precision": "bf16", "zero": Zero(stage=0)},
        8,
        (
            "stages.base: precision bf16 with ZeRO stage 0 has no fp32 master weights, which changes the result",
            "set zero.stage to 1",
        ),
    ),
    (
        {"precision": "fp16", "sequence_aux_loss_coef": 0.5},
        8,
        (
            "stages.base: sequence_aux_loss_coef 0.5 with precision fp16 is not supported",
            "set precision to bf16 or fp32",
        ),
    ),
]


@pytest.mark.parametrize(("changes", "gpus", "expected"), PRECISIONS)
def test_precision_must_work_with_site_zero_stage_and_loss(
    changes: dict[str, Any], gpus: int, expected: tuple[str, str] | None
):
    assert refusal(check_precision, tiny_stage(**changes), site(with_node(gpus=gpus))) == expected


def test_fp8_is_refused_on_amd_gpus():
    amd = site(accelerator=Accelerator(rocm="6.4"))
    assert refusal(check_precision, tiny_stage(precision="fp8"), amd) == (
        "stages.base: precision fp8 on site centre, which has AMD GPUs, is not supported",
        "set precision to bf16",
    )


OF_A100 = "with gpu_peak_tflops 312"
# the site's gpu_type and gpu_peak_tflops, the GPUs that the message names
FP8_GPUS: list[tuple[str | None, float | None, str | None]] = [
    ("a100", None, "of type a100"),
    ("a100", 989, "of type a100"),
    ("gpu", 312, OF_A100),
    (None, 312, OF_A100),
    ("h100", 312, None),
    (None, 989, None),
    ("gpu", 165, None),
    (None, None, None),
]


@pytest.mark.parametrize(("gpu", "peak", "named"), FP8_GPUS)
def test_fp8_is_refused_on_a_known_gpu_without_it(gpu: str | None, peak: float | None, named: str | None):
    """Most site files name no type of GPU, but all state the rate."""
    partition = with_node(gpu_peak_tflops=peak).model_copy(update={"gpu_type": gpu})
    found = refusal(check_precision, tiny_stage(precision="fp8"), site(partition))
    expected = f"stages.base: precision fp8 on GPUs {named}, which do not multiply in FP8"
    assert found == ((expected, "set precision to bf16, or use a partition with newer GPUs") if named else None)


ON_DISK = {"stage": 3, "offload_optimizer": "cpu", "offload_param": "nvme"}
IGNORED = "(DeepSpeed would ignore the key)"
IN_MEMORY = "(DeepSpeed would keep the states in CPU memory)"
# ZeRO settings, other settings of the stage, is storage.scratch set, expected message and remedy
OFFLOADS: list[tuple[dict[str, Any], dict[str, Any], bool, tuple[str, str] | None]] = [
    ({"stage": 1, "offload_optimizer": "cpu"}, {}, False, None),
    ({"stage": 3, "offload_param": "cpu"}, {}, False, None),
    ({"stage": 3, "offload_optimizer": "nvme"}, {}, True, None),
    (ON_DISK, {}, True, None),
    ({**ON_DISK, "stage3_prefetch_bucket_size": None, "stage3_max_reuse_distance": 0}, {}, True, None),
    # 1 MiB of bf16 has 524,288 elements; 4 ranks
    ({**ON_DISK, "stage3_param_persistence_threshold": 4 * 524_287}, {"nodes": 2, "gpus_per_node": 2}, True, None),
    (
        {"stage": 0, "offload_optimizer": "cpu"},
        {},
        False,
        ("stages.base.zero.offload_optimizer cpu needs ZeRO stage >= 1; it is 0", "set zero.stage to 1, 2 or 3"),
    ),
    (
        {"stage": 2, "offload_param": "cpu"},
        {},
        False,
        (
            f"stages.base.zero.offload_param cpu needs ZeRO stage 3; it is 2 {IGNORED}",
            "set zero.stage to 3, or offload only the optimizer",
        ),
    ),
    (
        {"stage": 2, "offload_optimizer": "nvme"},
        {},
        True,
        (
            f"stages.base.zero.offload_optimizer nvme needs ZeRO stage 3; it is 2 {IN_MEMORY}",
            "set zero.stage to 3, or zero.offload_optimizer to cpu",
        ),
    ),
    (
        {"stage": 3, "offload_optimizer": "nvme"},
        {},
        False,
        (
            "stages.base.zero.offload_optimizer nvme needs storage.scratch, which is not set: longhaul never swaps to $TMPDIR "
            "or /tmp by default",
            "set storage.scratch to a folder on a local disk of every node",
        ),
    ),
    (
        ON_DISK,
        {"precision": "fp16"},
        True,
        (
            "stages.base.zero.offload_param nvme with precision fp16 is not supported",
            "set precision to bf16 or fp32",
        ),
    ),
    (
        {"stage": 3, "offload_param": "nvme"},
        {},
        True,
        (
            "stages.base.zero.offload_param nvme with offload_optimizer none is not supported: master weights need more GPU "
            "memory than the weights",
            "set zero.offload_optimizer to cpu or nvme",
        ),
    ),
    (
        ON_DISK,
        {"parallel": Parallel(pipeline=2, expert=3)},
        True,
        (
            "stages.base.zero.offload_param nvme with parallel.pipeline 2 is not supported",
            "set parallel.pipeline to 1",
        ),
    ),
    (
        {**ON_DISK, "stage3_prefetch_bucket_size": 5},
        {},
        True,
        (
            "stages.base.zero.offload_param nvme with stage3_prefetch_bucket_size 5: prefetched or kept weights would need more "
            "buffers than there are",
            "remove stage3_prefetch_bucket_size; with weights on disk it is always 0",
        ),
    ),
    (
        {**ON_DISK, "stage3_max_reuse_distance": 6},
        {},
        True,
        (
            "stages.base.zero.offload_param nvme with stage3_max_reuse_distance 6: prefetched or kept weights would need more "
            "buffers than there are",
            "remove stage3_max_reuse_distance; with weights on disk it is always 0",
        ),
    ),
    (
        {**ON_DISK, "stage3_param_persistence_threshold": 4 * 524_287 + 1},
        {"nodes": 2, "gpus_per_node": 2},
        True,
        (
            "stages.base.zero.offload_param nvme with stage3_param_persistence_threshold 2097149: a tensor with more than "
            "2097148 elements is swapped to disk and must be partitioned",
            "set stage3_param_persistence_threshold to at most 2097148, or remove it",
        ),
    ),
]


@pytest.mark.parametrize(("zero", "changes", "has_scratch", "expected"), OFFLOADS)
def test_offload_must_fit_the_other_settings(
    zero: dict[str, Any], changes: dict[str, Any], has_scratch: bool, expected: tuple[str, str] | None
):
    storage = Storage(scratch="/local") if has_scratch else Storage()
    assert refusal(check_offload, tiny_stage(zero=Zero(**zero), **changes), storage) == expected


BIG, LEAN, QUICK = (
    GPUS.model_copy(update={"jobs": (kind,), "name": name, "max_minutes": minutes, "max_nodes": nodes})
    for kind, name, minutes, nodes in (("gpu", "big", 900, 3), ("cpu", "lean", 100, 1), ("debug", "quick", 15, 2))
)
CORES = with_node(gpus=0)
SHAPES: list[tuple[dict[str, Any], Site, tuple[str, str] | None]] = [
    ({"nodes": 4, "gpus_per_node": 8, "minutes": 10_000}, site(), None),
    ({"nodes": 3, "minutes": 900}, site(BIG, LEAN, QUICK), None),
    ({"gpus_per_node": 64}, site(CORES), None),
    (
        {"gpus_per_node": 9},
        site(BIG),
        (
            "stages.base.gpus_per_node 9: site centre has 8 GPUs per node in partition big",
            "use at most 8, on more nodes",
        ),
    ),
    (
        {"gpus_per_node": 65},
        site(CORES),
        (
            "stages.base.gpus_per_node 65: site centre has 64 CPU cores per node and no GPU in the partition for gpu jobs",
            "use at most 64: each process needs one core",
        ),
    ),
    (
        {"nodes": 5},
        site(),
        (
            "stages.base.nodes 5: site centre allows 4 in the partition for gpu jobs",
            "use at most 4 nodes, or correct max_nodes of the partition in the site file",
        ),
    ),
    (
        {"nodes": 4},
        site(BIG, LEAN, QUICK),
        (
            "stages.base.nodes 4: site centre allows 3 in partition big",
            "use at most 3 nodes, or correct max_nodes of the partition in the site file",
        ),
    ),
    (
        {"minutes": 901},
        site(BIG, LEAN, QUICK),
        ("stages.base.minutes 901: partition big allows 900", "use at most 900 minutes"),
    ),
]


@pytest.mark.parametrize(("changes", "where", "expected"), SHAPES)
def test_site_must_have_nodes_ranks_and_minutes(changes: dict[str, Any], where: Site, expected: tuple[str, str] | None):
    assert refusal(check_site, tiny_stage(**changes), where) == expected


JOB_LIMITS: list[tuple[dict[str, Any], tuple[str, str] | None]] = [
    ({"checks": {"nodes": 2, "gpus_per_node": 8, "minutes": 15}, "data_minutes": 100}, None),
    ({"checks": {}}, None),
    (
        {"checks": {"nodes": 3}},
        (
            "checks.nodes 3: site centre allows 2 in partition quick",
            "use at most 2 nodes, or correct max_nodes of the partition in the site file",
        ),
    ),
    (
        {"checks": {"gpus_per_node": 9}},
        (
            "checks.gpus_per_node 9: site centre has 8 GPUs per node in partition quick",
            "use at most 8, on more nodes",
        ),
    ),
    ({"checks": {"minutes": 16}}, ("checks.minutes 16: partition quick allows 15", "use at most 15 minutes")),
    ({"data_minutes": 101}, ("data_minutes 101: partition lean allows 100", "use at most 100 minutes")),
]


@pytest.mark.parametrize(("changes", "expected"), JOB_LIMITS)
def test_site_must_have_the_resources_of_checks_and_data_jobs(
    changes: dict[str, Any], expected: tuple[str, str] | None, tmp_path: Path
):
    """Default minutes are longer than these partitions allow. They are reduced, not refused."""
    config = run_config(tmp_path, **changes)
    assert refusal(check_job_limits, config, site(BIG, LEAN, QUICK)) == expected


def test_plan_warns_where_a_partition_cuts_the_default_minutes_of_data_jobs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def printed(minutes: int, config: dict[str, Any]) -> str:
        path = write_config(tmp_path, config, {"partitions.0.max_minutes": minutes})
        with pytest.raises(SystemExit) as exited:
            main(["plan", str(path)])
        assert not exited.value.code
        return " ".join(capsys.readouterr().out.split())

    short = {"stages.0.minutes": 60, "stages.1.minutes": 60}
    assert "warning: partition gpu allows 60 minutes, less than the usual 120 of data_minutes" in printed(60, short)
    assert "data_minutes" not in printed(60, {**short, "data_minutes": 60})
    assert "data_minutes" not in printed(120, short)


def test_checks_use_at_least_one_node_and_one_gpu(tmp_path: Path):
    small = site(with_node(gpus=1).model_copy(update={"max_nodes": 1}))
    assert refusal(check_job_limits, run_config(tmp_path, checks={}), small) is None


def saving(write_gb_per_s: float = 0.5, **changes: Any) -> tuple[Stage, int, Site]:
    """Return a stage with a margin of 30 s, bytes that take 90 s to write, and the site."""
    return (
        tiny_stage(recovery=Recovery(stop_margin_s=30), **changes),
        45 * 10**9,
        site(checkpoint_write_gb_per_s=write_gb_per_s),
    )


def test_an_allocation_must_be_longer_than_save_and_margin():
    assert refusal(check_save_time, *saving(minutes=3)) is None
    assert refusal(check_save_time, *saving(minutes=2)) == (
        "stages.base.minutes 2: a save of 45.0 GB takes about 90 s, and recovery.stop_margin_s is 30 s: no checkpoint can be "
        "saved before the allocation ends",
        "set minutes to 3 or more, or recovery.stop_margin_s to at most 29",
    )
    assert refusal(check_save_time, tiny_stage(minutes=2), 45 * 10**9, site()) is None, "unknown write rate"


def test_a_save_that_is_longer_than_the_margin_gives_a_warning():
    assert save_time_warning(*saving(write_gb_per_s=1.5)) is None, "30 s, exactly the margin"
    assert save_time_warning(*saving()) == (
        "stages.base: a save of 45.0 GB takes about 90 s, longer than recovery.stop_margin_s 30: the end of an allocation may "
        "interrupt the first save, whose time is not measured yet"
    )


def test_layers_that_are_not_compiled_on_gpus_give_a_warning_with_the_reason():
    offloads = tiny_stage(activation_checkpointing="offload")
    assert not_compiled_warning(offloads, None, site()) == (
        "stages.base: its layers run without torch.compile: activation_checkpointing: offload moves the input of a layer to the "
        "CPU"
    )
    assert not_compiled_warning(tiny_stage(), None, site()) is None
    experts = {"parallel": {"expert": 2}, "gpus_per_node": 2}
    assert not_compiled_warning(tiny_stage(**experts, activation_checkpointing="selective"), None, site()) == (
        "stages.base: its layers run without torch.compile: with expert parallelism, activation_checkpointing: selective cannot "
        "keep single results of compiled layers; none and full are compiled"
    )
    for kind in ("none", "full"):
        assert not_compiled_warning(tiny_stage(**experts, activation_checkpointing=kind), None, site()) is None
    assert not_compiled_warning(offloads, None, site(with_node(gpus=0))) is None
    assert not_compiled_warning(tiny_stage(activation_checkpointing="offload", compile="off"), None, site()) is None


def test_zero_3_compiles_dense_models_alone():
    stage = tiny_stage(zero={"stage": 3})
    dense, mixture = tiny_size(), model_size(TINY_QWEN3_MOE)
    assert not_compiled_warning(stage, dense, site()) is None
    assert "only dense models" in (not_compiled_warning(stage, mixture, site()) or "")


def test_a_sequence_may_be_as_long_as_the_models_positions():
    assert refusal(check_positions, tiny_stage(sequence_length=64), tiny_size()) is None
    assert refusal(check_positions, tiny_stage(sequence_length=65), tiny_size()) == (
        "stages.base.sequence_length 65 exceeds the model's max_position_embeddings 64",
        "use at most 64, or increase max_position_embeddings",
    )


@pytest.mark.parametrize(("more", "limit"), [(0, 6), (1, None)])
def test_model_states_may_fill_a_gpu(more: int, limit: int | None):
    memory = MemoryEstimate(GIB, 2 * GIB, 3 * GIB + more, *[GIB] * 9)
    assert refusal(check_memory, tiny_stage(), memory, tiny_size(), site(with_node(gpu_memory_gib=limit))) is None


def test_model_states_that_are_larger_than_a_gpu_are_refused():
    memory = MemoryEstimate(GIB, 2 * GIB, 3 * GIB + 1, *[GIB] * 9)
    found = refusal(check_memory, tiny_stage(), memory, tiny_size(), site(with_node(gpu_memory_gib=6)))
    assert found and found[0] == (
        "stages.base: weights, gradients and optimizer states need 6.1 GiB per GPU; site centre has 6 GiB"
    )


def test_kept_checkpoints_must_fit_the_quota_of_files():
    """3 last, 2 best and the one being written: 6 checkpoints with 10 files each."""
    stage = tiny_stage(checkpoints=CheckpointSettings(keep_last=3, keep_best=2))
    assert refusal(check_checkpoint_files, stage, 10, site(inode_limit=60)) is None
    assert refusal(check_checkpoint_files, stage, 10, site()) is None
    assert refusal(check_checkpoint_files, stage, 10, site(inode_limit=59)) == (
        "stages.base: 6 checkpoints with 10 files each exceed site centre's inode_limit 59",
        "keep at most 4 checkpoints: checkpoints.keep_last + checkpoints.keep_best",
    )
    assert refusal(check_checkpoint_files, stage, 10, site(inode_limit=19)) == (
        "stages.base: 6 checkpoints with 10 files each exceed site centre's inode_limit 19",
        "two checkpoints need 20 files: use fewer ranks, or ask for a larger quota and set inode_limit",
    )


def test_chunks_of_a_dataset_must_fit_the_quota_of_files(tmp_path: Path):
    """Files of 2.5 and 1 chunks give 3 + 1 chunks, small files of 0.6 + 0.6 share 2: 6 chunks with 9 files each."""
    dataset = run_config(tmp_path, datasets__prose__chunk_mb=1.0).datasets["prose"]
    file_sizes = [2_500_000, 600_000, 1_000_000, 600_000]
    assert refusal(check_chunk_files, "prose", dataset, file_sizes, site(inode_limit=54)) is None
    assert refusal(check_chunk_files, "prose", dataset, file_sizes, site()) is None
    assert refusal(check_chunk_files, "prose", dataset, file_sizes, site(inode_limit=26)) == (
        "datasets.prose: 6 chunks of 1 MB need up to 54 files; site centre's inode_limit is 26",
        "set chunk_mb to 3 or more",
    )


def test_deterministic_kernels_on_amd_gpus_are_not_promised():
    asked = tiny_stage(deterministic=True)
    amd = site().model_copy(update={"accelerator": Accelerator(cuda=None, rocm="6.4")})
    assert "deterministic: tested on NVIDIA GPUs only" in (deterministic_warning(asked, amd) or "")
    assert deterministic_warning(asked, site()) is None and deterministic_warning(tiny_stage(), amd) is None
