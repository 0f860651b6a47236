"""Refuses parallel layouts that are untested or do not divide the model: tensor, pipeline, expert, sequence, ZeRO, PowerSGD;
warns of pipelines whose GPUs idle. Each error names the nearest layout that works.

Only combinations that tests/parity proves are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.parameter_counts import sparse_layers
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError
from longhaul.planning.layers_per_pipeline_rank import layers_per_pipeline_rank

# The plan warns if pipeline ranks are idle for more than this fraction of a step.
MAX_PIPELINE_BUBBLE = 0.2


def data_parallel_size(stage: Stage, world_size: int) -> int:
    """Return the number of groups of ranks that read different samples.

    Tensor-, pipeline- and sequence-parallel ranks read the same samples. Expert-parallel ranks read different ones.

    Raises:
        UserError: the layout does not fit the number of ranks, or is not supported.
    """
    parallel, where = stage.parallel, f"stages.{stage.name}"
    sharing = parallel.tensor * parallel.pipeline * parallel.sequence
    if world_size % sharing:
        raise UserError(
            f"{where}.parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x sequence {parallel.sequence} = "
            f"{sharing} does not divide the {world_size} ranks of nodes {stage.nodes} x gpus_per_node {stage.gpus_per_node}",
            f"use a product of {_divisors(world_size)}, or a number of ranks that is a multiple of {sharing}",
        )
    data = world_size // (parallel.tensor * parallel.pipeline)
    if data % parallel.expert:
        raise UserError(
            f"{where}.parallel.expert {parallel.expert} does not divide the {data} data-parallel ranks, which hold the experts",
            f"set parallel.expert to {_divisors(data)}",
        )
    _check_zero_stage(stage)
    _check_contiguous_gradients(stage)
    _check_hpz(stage)
    _check_combination(stage)
    _check_communication(stage, data)
    return world_size // sharing


def check_model(stage: Stage, model: HuggingFaceConfig) -> None:
    """Raise UserError if the model's sizes do not fit the layout; `model` is a Hugging Face config."""
    parallel, where = stage.parallel, f"stages.{stage.name}.parallel"
    layers, experts = model["num_hidden_layers"], model.get("n_routed_experts") or model.get("num_experts") or 0
    if parallel.pipeline > layers:
        raise UserError(
            f"{where}.pipeline {parallel.pipeline}: the model has {layers} layers",
            f"set parallel.pipeline to at most {layers}",
        )
    if parallel.expert > 1 and (not experts or experts % parallel.expert):
        raise UserError(
            f"{where}.expert {parallel.expert} does not divide the model's {experts} routed experts"
            if experts
            else f"{where}.expert {parallel.expert}: the model has 0 routed experts",
            f"set parallel.expert to {_divisors(experts)}" if experts else "set parallel.expert to 1",
        )
    _check_divides(where, "tensor", parallel.tensor, _sizes_split_by_tensor(model))
    _check_divides(where, "sequence", parallel.sequence, _heads(model))
    _check_attention_window(stage, model)
    if parallel.pipeline > 1 and parallel.expert > 1:
        _check_experts_on_each_pipeline_rank(where, stage, model)
    if parallel.sequence > 1 and stage.sequence_length % parallel.sequence:
        raise UserError(
            f"stages.{stage.name}.sequence_length {stage.sequence_length} is not a multiple of parallel.sequence "
            f"{parallel.sequence}",
            f"use a sequence_length of {stage.sequence_length // parallel.sequence * parallel.sequence or parallel.sequence}",
        )


def _check_attention_window(stage: Stage, model: HuggingFaceConfig) -> None:
    """Raise UserError if the layout would ignore the model's sliding window: it builds the mask of full attention."""
    window = model.get("sliding_window") if model.get("use_sliding_window") else None
    for axis in ("pipeline", "sequence"):
        ranks = getattr(stage.parallel, axis)
        if window and ranks > 1 and stage.sequence_length > window:
            raise UserError(
                f"stages.{stage.name}.parallel.{axis} {ranks} with sequence_length {stage.sequence_length}: the model's "
                f"sliding_window {window} is not supported with parallel.{axis}",
                f"set parallel.{axis} to 1, or sequence_length to at most {window}",
            )


def pipeline_bubble(pipeline: int, micro_batches: int) -> float:
    """Return the fraction of a step in which a rank of a 1F1B pipeline is idle.

    Source: Narayanan et al. 2021 (arXiv:2104.04473, section 2.2). They divide the idle time by the working time,
    (p - 1) / m; this function divides it by the time of the whole step.
    """
    return (pipeline - 1) / (micro_batches + pipeline - 1)


def pipeline_bubble_warning(stage: Stage, micro_batches: int) -> str | None:
    """Return a warning for a pipeline that is idle for more than MAX_PIPELINE_BUBBLE of a step."""
    pipeline = stage.parallel.pipeline
    idle = pipeline_bubble(pipeline, micro_batches)
    if idle <= MAX_PIPELINE_BUBBLE:
        return None
    enough = -(-(pipeline - 1) * round(1 - MAX_PIPELINE_BUBBLE, 6) // MAX_PIPELINE_BUBBLE)
    return (
        f"stages.{stage.name}: {pipeline} pipeline ranks with {micro_batches} micro batches are idle for {idle:.0%} of a step; "
        f"{enough:.0f} micro batches reduce that to {MAX_PIPELINE_BUBBLE:.0%}: increase global_batch_size, or reduce "
        "micro_batch_size or parallel.pipeline"
    )


def _check_zero_stage(stage: Stage) -> None:
    parallel, zero, where = stage.parallel, stage.zero, f"stages.{stage.name}"
    if parallel.pipeline > 1 and zero.stage >= 2:
        raise UserError(
            f"{where}: parallel.pipeline {parallel.pipeline} with ZeRO stage {zero.stage}: DeepSpeed's pipelines need ZeRO "
            "stage 1",
            "set zero.stage to 1, or parallel.pipeline to 1",
        )
    axes = [axis for axis in ("tensor", "pipeline", "expert") if getattr(parallel, axis) > 1]
    if axes and zero.stage == 0:
        raise UserError(
            f"{where}: parallel.{axes[0]} {getattr(parallel, axes[0])} with ZeRO stage 0: the checkpoint of a split model needs "
            "ZeRO's master weights, which stage 0 does not have",
            f"set zero.stage to 1{'' if 'pipeline' in axes else ', 2 or 3'}, or {' and '.join(axes)} to 1",
        )


def _check_contiguous_gradients(stage: Stage) -> None:
    """Raise UserError for experts whose gradients DeepSpeed would average over ranks that hold other experts.

    Without contiguous buffers, ZeRO 1 reduces all gradients over all data-parallel ranks (buffered_reduce_fallback in
    stage_1_and_2.py of DeepSpeed 0.19.8), and ZeRO 2 refuses experts. CPU offload and ZeRO 3 have such buffers in any case.
    """
    zero, expert = stage.zero, stage.parallel.expert
    if expert > 1 and zero.stage < 3 and not zero.contiguous_gradients and zero.offload_optimizer == "none":
        raise UserError(
            f"stages.{stage.name}.zero.contiguous_gradients false with parallel.expert {expert}: DeepSpeed would average "
            "gradients of different experts",
            "remove contiguous_gradients, or set parallel.expert to 1",
        )


def _check_hpz(stage: Stage) -> None:
    size, where = stage.zero.zero_hpz_partition_size, f"stages.{stage.name}.zero.zero_hpz_partition_size"
    if size == 1:
        return
    if stage.zero.stage < 3:
        raise UserError(
            f"{where} {size} needs ZeRO stage 3; it is {stage.zero.stage}", "set zero.stage to 3, or remove the key"
        )
    if stage.gpus_per_node % size:
        raise UserError(
            f"{where} {size} does not divide the {stage.gpus_per_node} ranks of a node; the second copy must stay inside a node",
            f"use {_divisors(stage.gpus_per_node)}",
        )
    others = [f"parallel.{axis} {ranks}" for axis, ranks in stage.parallel if ranks > 1]
    if stage.zero.offload_optimizer == "nvme":
        others.append("offload_optimizer nvme")
    if stage.zero.offload_param != "none":
        others.append(f"offload_param {stage.zero.offload_param}")
    if others:
        raise UserError(f"{where} {size} with {others[0]} is not supported", "remove zero_hpz_partition_size")


def _check_combination(stage: Stage) -> None:
    parallel, where = stage.parallel, f"stages.{stage.name}.parallel"
    others = [axis for axis in ("tensor", "pipeline", "expert") if getattr(parallel, axis) > 1]
    if parallel.sequence > 1 and others:
        raise UserError(
            f"{where}: sequence {parallel.sequence} with {others[0]} {getattr(parallel, others[0])} is not supported",
            f"set {' and '.join(others)} to 1: sequence parallelism works with data parallelism and ZeRO stage 0 to 3",
        )
    axes = [*others, *(["sequence"] if parallel.sequence > 1 else [])]
    if stage.precision == "fp16" and axes:
        raise UserError(
            f"{where}.{axes[0]} {getattr(parallel, axes[0])} with precision fp16 is not supported",
            "set precision to bf16 or fp32",
        )


def _check_communication(stage: Stage, data_parallel: int) -> None:
    settings, where = stage.communication, f"stages.{stage.name}.communication"
    key = "powersgd" if settings.powersgd else "data_type"
    if not settings.powersgd and not settings.data_type:
        return
    if settings.powersgd and settings.data_type:
        raise UserError(
            f"{where} sets both powersgd and data_type {settings.data_type}",
            "remove one of them: PowerSGD reduces its matrices in fp32",
        )
    axes = [axis for axis, ranks in stage.parallel if ranks > 1]
    if axes:
        raise UserError(
            f"{where}.{key} with parallel.{axes[0]} {getattr(stage.parallel, axes[0])} is not supported",
            f"set {' and '.join(axes)} to 1, or remove {key}",
        )
    if settings.powersgd:
        _check_powersgd(stage, data_parallel, f"{where}.powersgd")


def _check_powersgd(stage: Stage, data_parallel: int, where: str) -> None:
    if stage.zero.stage >= 2:
        raise UserError(
            f"{where} with ZeRO stage {stage.zero.stage}: PowerSGD compresses whole gradients, which this stage partitions",
            "set zero.stage to 1, or use communication.data_type bf16",
        )
    if stage.zero.offload_optimizer != "none":
        raise UserError(
            f"{where} with offload_optimizer {stage.zero.offload_optimizer} is not supported",
            "set zero.offload_optimizer to none",
        )
    if stage.precision == "fp16":
        raise UserError(
            f"{where} with precision fp16: overflowed gradients would remain in the error that is added to the next step",
            "set precision to bf16 or fp32",
        )
    if data_parallel == 1:
        raise UserError(
            f"{where} with 1 data-parallel rank: there is no gradient reduction", "remove powersgd, or use more ranks"
        )


def _sizes_split_by_tensor(model: HuggingFaceConfig) -> dict[str, int]:
    """Return the sizes that tensor parallelism splits, by config key."""
    names = ["vocab_size", "intermediate_size", "moe_intermediate_size"]
    return _heads(model) | {name: model[name] for name in names if model.get(name)}


def _heads(model: HuggingFaceConfig) -> dict[str, int]:
    return {name: model[name] for name in ("num_attention_heads", "num_key_value_heads") if name in model}


def _check_divides(where: str, axis: str, ranks: int, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size % ranks:
            raise UserError(
                f"{where}.{axis} {ranks} does not divide the model's {name} {size}",
                f"set parallel.{axis} to {_divisors(math.gcd(*sizes.values()))}"
                + (", or pad vocab_size" if name == "vocab_size" else ""),
            )


def _check_experts_on_each_pipeline_rank(where: str, stage: Stage, model: HuggingFaceConfig) -> None:
    """Raise UserError if a pipeline rank has no routed experts.

    DeepSpeed's ranks agree on a gradient norm for one parameter group after the other, so each rank needs the same groups.
    """
    sparse, pipeline = sparse_layers(model), stage.parallel.pipeline
    without = _pipeline_ranks_without_experts(sparse, pipeline)
    if without:
        layers = layers_per_pipeline_rank(len(sparse), pipeline)[without[0]]
        possible = max((n for n in range(1, pipeline) if not _pipeline_ranks_without_experts(sparse, n)), default=1)
        raise UserError(
            f"{where}.pipeline {pipeline} with expert {stage.parallel.expert}: pipeline rank {without[0]} has layers "
            f"{layers.start} to {layers.stop - 1}, which are all dense; each pipeline rank needs a layer with routed experts",
            f"set parallel.pipeline to {possible}, or parallel.expert to 1",
        )


def _pipeline_ranks_without_experts(sparse: Sequence[bool], pipeline: int) -> list[int]:
    held = layers_per_pipeline_rank(len(sparse), pipeline)
    return [rank for rank, layers in enumerate(held) if not any(sparse[layer] for layer in layers)]


def _divisors(number: int) -> str:
    """Return the divisors of a number as a text such as "1, 2 or 4"."""
    *first, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(first)} or {last}" if first else last
