"""Checks of the parallel layout: which layouts are allowed, and messages that name the nearest layout that works."""

from __future__ import annotations

from typing import Any

import pytest

from longhaul.config.communication_config import Communication, PowerSgd
from longhaul.config.stage_config import Parallel, Zero
from longhaul.errors import UserError
from longhaul.planning.check_parallel_layout import (
    check_model,
    data_parallel_size,
    pipeline_bubble,
    pipeline_bubble_warning,
)
from tests.support.tiny_model_sizes import TINY_LLAMA, TINY_QWEN3_MOE, tiny_stage

POWERSGD = Communication(powersgd=PowerSgd())
BF16_REDUCTION = Communication(data_type="bf16")
HPZ = {"stage": 3, "zero_hpz_partition_size": 2}

# settings of the stage, ranks per node on two nodes, expected number of groups that read different samples
ALLOWED: dict[str, tuple[dict[str, Any], int, int]] = {
    "data parallelism": ({}, 4, 8),
    "tensor": ({"parallel": Parallel(tensor=2)}, 4, 4),
    "tensor at ZeRO 3": ({"parallel": Parallel(tensor=2), "zero": Zero(stage=3)}, 4, 4),
    "pipeline": ({"parallel": Parallel(pipeline=4)}, 4, 2),
    "sequence": ({"parallel": Parallel(sequence=8)}, 4, 1),
    "sequence at ZeRO 0": ({"parallel": Parallel(sequence=2), "zero": Zero(stage=0), "precision": "fp32"}, 4, 4),
    "expert": ({"parallel": Parallel(expert=8)}, 4, 8),
    "expert and pipeline": ({"parallel": Parallel(expert=4, pipeline=2)}, 4, 4),
    "tensor, pipeline and expert": ({"parallel": Parallel(tensor=2, pipeline=2, expert=2)}, 4, 2),
    "data parallelism in fp16": ({"precision": "fp16"}, 4, 8),
    "data parallelism at ZeRO 0": ({"zero": Zero(stage=0)}, 4, 8),
    "hpZ": ({"zero": Zero(**HPZ)}, 4, 8),
    "hpZ over a node": ({"zero": Zero(stage=3, zero_hpz_partition_size=4)}, 4, 8),
    "hpZ, optimizer in CPU memory": ({"zero": Zero(**HPZ, offload_optimizer="cpu")}, 4, 8),
    "PowerSGD": ({"communication": POWERSGD}, 1, 2),
    "PowerSGD at ZeRO 0": ({"communication": POWERSGD, "zero": Zero(stage=0), "precision": "fp32"}, 4, 8),
    "reduction in bf16": ({"communication": BF16_REDUCTION, "zero": Zero(stage=3), "precision": "fp16"}, 4, 8),
    "reduction in bf16 on one rank per node": ({"communication": BF16_REDUCTION}, 1, 2),
}


@pytest.mark.parametrize(("changes", "gpus", "expected"), ALLOWED.values(), ids=ALLOWED)
def test_ranks_that_read_the_same_samples_count_once(changes: dict[str, Any], gpus: int, expected: int):
    assert data_parallel_size(tiny_stage(nodes=2, gpus_per_node=gpus, **changes), 2 * gpus) == expected


# settings of the stage on two nodes with four ranks each, expected message, expected remedy
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "product larger than the ranks": (
        {"parallel": Parallel(tensor=2, pipeline=2, sequence=4)},
        "stages.base.parallel: tensor 2 x pipeline 2 x sequence 4 = 16 does not divide the 8 ranks of nodes 2 x "
        "gpus_per_node 4",
        "use a product of 1, 2, 4 or 8, or a number of ranks that is a multiple of 16",
    ),
    "product that does not divide": (
        {"parallel": Parallel(tensor=3)},
        "stages.base.parallel: tensor 3 x pipeline 1 x sequence 1 = 3 does not divide the 8 ranks of nodes 2 x gpus_per_node 4",
        "use a product of 1, 2, 4 or 8, or a number of ranks that is a multiple of 3",
    ),
    "experts over too few ranks": (
        {"parallel": Parallel(tensor=2, pipeline=2, expert=4)},
        "stages.base.parallel.expert 4 does not divide the 2 data-parallel ranks, which hold the experts",
        "set parallel.expert to 1 or 2",
    ),
    "pipeline at ZeRO 2": (
        {"parallel": Parallel(pipeline=2), "zero": Zero(stage=2)},
        "stages.base: parallel.pipeline 2 with ZeRO stage 2: DeepSpeed's pipelines need ZeRO stage 1",
        "set zero.stage to 1, or parallel.pipeline to 1",
    ),
    "tensor at ZeRO 0": (
        {"parallel": Parallel(tensor=2), "zero": Zero(stage=0)},
        "stages.base: parallel.tensor 2 with ZeRO stage 0: the checkpoint of a split model needs ZeRO's master weights, which "
        "stage 0 does not have",
        "set zero.stage to 1, 2 or 3, or tensor to 1",
    ),
    "pipeline and expert at ZeRO 0": (
        {"parallel": Parallel(pipeline=2, expert=2), "zero": Zero(stage=0)},
        "stages.base: parallel.pipeline 2 with ZeRO stage 0: the checkpoint of a split model needs ZeRO's master weights, which "
        "stage 0 does not have",
        "set zero.stage to 1, or pipeline and expert to 1",
    ),
    "hpZ at ZeRO 2": (
        {"zero": Zero(stage=2, zero_hpz_partition_size=2)},
        "stages.base.zero.zero_hpz_partition_size 2 needs ZeRO stage 3; it is 2",
        "set zero.stage to 3, or remove the key",
    ),
    "hpZ over two nodes": (
        {"zero": Zero(stage=3, zero_hpz_partition_size=8)},
        "stages.base.zero.zero_hpz_partition_size 8 does not divide the 4 ranks of a node; the second copy must stay inside a "
        "node",
        "use 1, 2 or 4",
    ),
    "hpZ with tensor": (
        {"zero": Zero(**HPZ), "parallel": Parallel(tensor=2, expert=2)},
        "stages.base.zero.zero_hpz_partition_size 2 with parallel.tensor 2 is not supported",
        "remove zero_hpz_partition_size",
    ),
    "hpZ with the optimizer on disk": (
        {"zero": Zero(**HPZ, offload_optimizer="nvme", offload_param="cpu")},
        "stages.base.zero.zero_hpz_partition_size 2 with offload_optimizer nvme is not supported",
        "remove zero_hpz_partition_size",
    ),
    "hpZ with weights in CPU memory": (
        {"zero": Zero(**HPZ, offload_param="cpu")},
        "stages.base.zero.zero_hpz_partition_size 2 with offload_param cpu is not supported",
        "remove zero_hpz_partition_size",
    ),
    "sequence with tensor and expert": (
        {"parallel": Parallel(sequence=2, tensor=2, expert=2)},
        "stages.base.parallel: sequence 2 with tensor 2 is not supported",
        "set tensor and expert to 1: sequence parallelism works with data parallelism and ZeRO stage 0 to 3",
    ),
    "sequence with pipeline": (
        {"parallel": Parallel(sequence=2, pipeline=2)},
        "stages.base.parallel: sequence 2 with pipeline 2 is not supported",
        "set pipeline to 1: sequence parallelism works with data parallelism and ZeRO stage 0 to 3",
    ),
    "sequence in fp16": (
        {"parallel": Parallel(sequence=2), "precision": "fp16"},
        "stages.base.parallel.sequence 2 with precision fp16 is not supported",
        "set precision to bf16 or fp32",
    ),
    "expert in fp16": (
        {"parallel": Parallel(expert=4), "precision": "fp16"},
        "stages.base.parallel.expert 4 with precision fp16 is not supported",
        "set precision to bf16 or fp32",
    ),
    "two kinds of reduction": (
        {"communication": Communication(powersgd=PowerSgd(), data_type="fp16")},
        "stages.base.communication sets both powersgd and data_type fp16",
        "remove one of them: PowerSGD reduces its matrices in fp32",
    ),
    "PowerSGD with two axes": (
        {"communication": POWERSGD, "parallel": Parallel(tensor=2, expert=2)},
        "stages.base.communication.powersgd with parallel.tensor 2 is not supported",
        "set tensor and expert to 1, or remove powersgd",
    ),
    "reduction in bf16 with sequence": (
        {"communication": BF16_REDUCTION, "parallel": Parallel(sequence=2)},
        "stages.base.communication.data_type with parallel.sequence 2 is not supported",
        "set sequence to 1, or remove data_type",
    ),
    "PowerSGD at ZeRO 2": (
        {"communication": POWERSGD, "zero": Zero(stage=2)},
        "stages.base.communication.powersgd with ZeRO stage 2: PowerSGD compresses whole gradients, which this stage partitions",
        "set zero.stage to 1, or use communication.data_type bf16",
    ),
    "PowerSGD with offload": (
        {"communication": POWERSGD, "zero": Zero(offload_optimizer="cpu")},
        "stages.base.communication.powersgd with offload_optimizer cpu is not supported",
        "set zero.offload_optimizer to none",
    ),
    "PowerSGD in fp16": (
        {"communication": POWERSGD, "precision": "fp16"},
        "stages.base.communication.powersgd with precision fp16: overflowed gradients would remain in the error that is added "
        "to the next step",
        "set precision to bf16 or fp32",
    ),
}


@pytest.mark.parametrize(("changes", "message", "remedy"), REFUSED.values(), ids=REFUSED)
def test_unsupported_layout_is_refused_with_the_nearest_one(changes: dict[str, Any], message: str, remedy: str):
    with pytest.raises(UserError) as refused:
        data_parallel_size(tiny_stage(nodes=2, gpus_per_node=4, **changes), 8)
    assert (refused.value.message, refused.value.hint) == (message, remedy)


def test_powersgd_needs_two_ranks():
    with pytest.raises(UserError) as refused:
        data_parallel_size(tiny_stage(communication=POWERSGD), 1)
    assert refused.value.message == (
        "stages.base.communication.powersgd with 1 data-parallel rank: there is no gradient reduction"
    )
    assert refused.value.hint == "remove powersgd, or use more ranks"


WIDE_LLAMA = {**TINY_LLAMA, "vocab_size": 16, "num_attention_heads": 8, "num_key_value_heads": 4}
DEEPSEEK = {
    **WIDE_LLAMA,
    "num_hidden_layers": 6,
    "model_type": "deepseek_v3",
    "n_routed_experts": 6,
    "first_k_dense_replace": 2,
}
MODELS_ALLOWED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pipeline rank for each layer": ({"parallel": Parallel(pipeline=2)}, TINY_LLAMA),
    "tensor": ({"parallel": Parallel(tensor=4)}, WIDE_LLAMA),
    "sequence": ({"parallel": Parallel(sequence=4)}, {**WIDE_LLAMA, "vocab_size": 17}),
    "expert": ({"parallel": Parallel(expert=4)}, TINY_QWEN3_MOE),
    "expert of n_routed_experts": ({"parallel": Parallel(expert=3)}, DEEPSEEK),
    "expert and pipeline": ({"parallel": Parallel(expert=2, pipeline=2)}, DEEPSEEK),
    "no key-value heads": (
        {"parallel": Parallel(tensor=8)},
        {key: value for key, value in WIDE_LLAMA.items() if key != "num_key_value_heads"},
    ),
    "a sequence that tensor parallelism does not split": (
        {"parallel": Parallel(tensor=2), "sequence_length": 9},
        WIDE_LLAMA,
    ),
}


@pytest.mark.parametrize(("changes", "model"), MODELS_ALLOWED.values(), ids=MODELS_ALLOWED)
def test_model_that_fits_the_layout_is_allowed(changes: dict[str, Any], model: dict[str, Any]):
    check_model(tiny_stage(**changes), model)


# settings of the stage, model, expected message, expected remedy
MODELS_REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "more pipeline ranks than layers": (
        {"parallel": Parallel(pipeline=3)},
        TINY_LLAMA,
        "stages.base.parallel.pipeline 3: the model has 2 layers",
        "set parallel.pipeline to at most 2",
    ),
    "no experts": (
        {"parallel": Parallel(expert=2)},
        TINY_LLAMA,
        "stages.base.parallel.expert 2: the model has 0 routed experts",
        "set parallel.expert to 1",
    ),
    "experts that do not divide": (
        {"parallel": Parallel(expert=4)},
        DEEPSEEK,
        "stages.base.parallel.expert 4 does not divide the model's 6 routed experts",
        "set parallel.expert to 1, 2, 3 or 6",
    ),
    "attention heads that tensor parallelism cannot split": (
        {"parallel": Parallel(tensor=3)},
        WIDE_LLAMA,
        "stages.base.parallel.tensor 3 does not divide the model's num_attention_heads 8",
        "set parallel.tensor to 1, 2 or 4",
    ),
    "key-value heads that tensor parallelism cannot split": (
        {"parallel": Parallel(tensor=8)},
        WIDE_LLAMA,
        "stages.base.parallel.tensor 8 does not divide the model's num_key_value_heads 4",
        "set parallel.tensor to 1, 2 or 4",
    ),
    "vocabulary that tensor parallelism cannot split": (
        {"parallel": Parallel(tensor=4)},
        {**WIDE_LLAMA, "vocab_size": 18},
        "stages.base.parallel.tensor 4 does not divide the model's vocab_size 18",
        "set parallel.tensor to 1 or 2, or pad vocab_size",
    ),
    "MLP that tensor parallelism cannot split": (
        {"parallel": Parallel(tensor=4)},
        {**WIDE_LLAMA, "intermediate_size": 6},
        "stages.base.parallel.tensor 4 does not divide the model's intermediate_size 6",
        "set parallel.tensor to 1 or 2",
    ),
    "experts' MLP that tensor parallelism cannot split": (
        {"parallel": Parallel(tensor=2)},
        {**WIDE_LLAMA, "moe_intermediate_size": 5},
        "stages.base.parallel.tensor 2 does not divide the model's moe_intermediate_size 5",
        "set parallel.tensor to 1",
    ),
    "heads that sequence parallelism cannot split": (
        {"parallel": Parallel(sequence=8)},
        WIDE_LLAMA,
        "stages.base.parallel.sequence 8 does not divide the model's num_key_value_heads 4",
        "set parallel.sequence to 1, 2 or 4",
    ),
    "sequence that sequence parallelism cannot split": (
        {"parallel": Parallel(sequence=4), "sequence_length": 19},
        WIDE_LLAMA,
        "stages.base.sequence_length 19 is not a multiple of parallel.sequence 4",
        "use a sequence_length of 16",
    ),
    "sequence shorter than the ranks": (
        {"parallel": Parallel(sequence=16), "sequence_length": 8},
        {**WIDE_LLAMA, "num_attention_heads": 16, "num_key_value_heads": 16},
        "stages.base.sequence_length 8 is not a multiple of parallel.sequence 16",
        "use a sequence_length of 16",
    ),
    "pipeline rank with dense layers only": (
        {"parallel": Parallel(pipeline=4, expert=2)},
        {**DEEPSEEK, "num_hidden_layers": 8, "first_k_dense_replace": 3},
        "stages.base.parallel.pipeline 4 with expert 2: pipeline rank 0 has layers 0 to 1, which are all dense; each pipeline "
        "rank needs a layer with routed experts",
        "set parallel.pipeline to 2, or parallel.expert to 1",
    ),
    "dense layers on half of the ranks": (
        {"parallel": Parallel(pipeline=2, expert=2)},
        {**DEEPSEEK, "first_k_dense_replace": 3},
        "stages.base.parallel.pipeline 2 with expert 2: pipeline rank 0 has layers 0 to 2, which are all dense; each pipeline "
        "rank needs a layer with routed experts",
        "set parallel.pipeline to 1, or parallel.expert to 1",
    ),
}


@pytest.mark.parametrize(("changes", "model", "message", "remedy"), MODELS_REFUSED.values(), ids=MODELS_REFUSED)
def test_model_that_does_not_fit_the_layout_is_refused(
    changes: dict[str, Any], model: dict[str, Any], message: str, remedy: str
):
    with pytest.raises(UserError) as refused:
        check_model(tiny_stage(**changes), model)
    assert (refused.value.message, refused.value.hint) == (message, remedy)


@pytest.mark.parametrize(("pipeline", "micro_batches", "idle"), [(1, 1, 0.0), (2, 4, 0.2), (4, 3, 0.5), (3, 6, 0.25)])
def test_idle_fraction_of_a_pipeline_is_that_of_the_1f1b_schedule(pipeline: int, micro_batches: int, idle: float):
    assert pipeline_bubble(pipeline, micro_batches) == idle


def test_pipeline_that_is_idle_for_more_than_a_fifth_gives_a_warning():
    stage = tiny_stage(parallel=Parallel(pipeline=3))
    assert pipeline_bubble_warning(stage, 8) is None
    assert pipeline_bubble_warning(stage, 6) == (
        "stages.base: 3 pipeline ranks with 6 micro batches are idle for 25% of a step; 8 micro batches reduce that to 20%: "
        "increase global_batch_size, or reduce micro_batch_size or parallel.pipeline"
    )
