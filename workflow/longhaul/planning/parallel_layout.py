"""The parallel layout of a stage, and every layout that is refused, with the nearest that works.

What is allowed here is what tests/parity/layouts.py proves, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from longhaul.config.model_size import sparse_layers, stage_layers
from longhaul.config.run_config import Stage
from longhaul.errors import UserError

# Idle share of a pipeline's ranks above which the plan warns.
BUBBLE_LIMIT = 0.2


def sample_ranks(stage: Stage, world_size: int) -> int:
    """Into how many parts a global batch's samples are dealt; UserError for a layout that cannot work.

    tensor x pipeline x sequence ranks read the same samples; expert-parallel ranks are data-parallel ones.
    """
    parallel, where = stage.parallel, f"stages.{stage.name}"
    shared = parallel.tensor * parallel.pipeline * parallel.sequence
    if world_size % shared:
        raise UserError(
            f"{where}.parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x sequence {parallel.sequence} = "
            f"{shared} does not divide the {world_size} ranks of nodes {stage.nodes} x gpus_per_node {stage.gpus_per_node}",
            f"use a product of {_divisors(world_size)}, or a number of ranks that is a multiple of {shared}",
        )
    data = world_size // (parallel.tensor * parallel.pipeline)
    if data % parallel.expert:
        raise UserError(
            f"{where}.parallel.expert is {parallel.expert}; experts are spread over the data-parallel ranks, here {data}",
            f"set expert to {_divisors(data)}",
        )
    _check_zero(stage)
    _check_hierarchy(stage)
    _check_combination(stage)
    _check_communication(stage, data)
    return world_size // shared


def check_model(stage: Stage, model: dict[str, Any]) -> None:
    """Refuses what the network's sizes do not allow."""
    parallel, where = stage.parallel, f"stages.{stage.name}.parallel"
    layers, experts = model["num_hidden_layers"], model.get("n_routed_experts") or model.get("num_experts") or 0
    if parallel.pipeline > layers:
        raise UserError(
            f"{where}.pipeline {parallel.pipeline}: the model has {layers} layers", f"use at most {layers} stages"
        )
    if parallel.expert > 1 and (not experts or experts % parallel.expert):
        raise UserError(
            f"{where}.expert {parallel.expert}: the model has {experts} routed experts",
            f"set expert to {_divisors(experts)}" if experts else "set expert to 1: there is nothing to spread",
        )
    _check_divides(where, "tensor", parallel.tensor, _split_by_tensor(model))
    _check_divides(where, "sequence", parallel.sequence, _heads(model))
    if parallel.pipeline > 1 and parallel.expert > 1:
        _check_experts_in_every_stage(where, stage, model)
    if parallel.sequence > 1 and stage.sequence_length % parallel.sequence:
        raise UserError(
            f"stages.{stage.name}.sequence_length {stage.sequence_length} is no multiple of parallel.sequence "
            f"{parallel.sequence}",
            f"use a sequence_length of {stage.sequence_length // parallel.sequence * parallel.sequence or parallel.sequence}",
        )


def bubble(pipeline: int, micro_batches: int) -> float:
    """Share of a step in which a rank of a 1F1B pipeline is idle (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

    They count it against the time of the work alone, (p - 1) / m; here it is against all of the step.
    """
    return (pipeline - 1) / (micro_batches + pipeline - 1)


def bubble_warning(stage: Stage, micro_batches: int) -> str | None:
    """What to say of a pipeline that idles for more than BUBBLE_LIMIT of its time."""
    idle = bubble(stage.parallel.pipeline, micro_batches)
    if idle <= BUBBLE_LIMIT:
        return None
    enough = -(-(stage.parallel.pipeline - 1) * round(1 - BUBBLE_LIMIT, 6) // BUBBLE_LIMIT)
    return (
        f"stages.{stage.name}: {stage.parallel.pipeline} pipeline stages over {micro_batches} micro batches idle for "
        f"{idle:.0%} of a step; {enough:.0f} micro batches lower that to {BUBBLE_LIMIT:.0%}: raise global_batch_size, "
        "or lower micro_batch_size or parallel.pipeline"
    )


def _check_zero(stage: Stage) -> None:
    parallel, zero, where = stage.parallel, stage.zero, f"stages.{stage.name}"
    if parallel.pipeline > 1 and zero.stage >= 2:
        raise UserError(
            f"{where}: pipeline {parallel.pipeline} with ZeRO stage {zero.stage}: DeepSpeed's pipelines work with ZeRO 1",
            "set zero.stage to 1, or parallel.pipeline to 1",
        )
    split = [axis for axis in ("tensor", "pipeline", "expert") if getattr(parallel, axis) > 1]
    if split and zero.stage == 0:
        raise UserError(
            f"{where}: parallel.{split[0]} {getattr(parallel, split[0])} with ZeRO stage 0: the parts of a split model are "
            "saved as ZeRO's masters, which stage 0 does not have",
            f"set zero.stage to 1{'' if 'pipeline' in split else ', 2 or 3'}, or {' and '.join(split)} to 1",
        )


def _check_hierarchy(stage: Stage) -> None:
    ways, where = stage.zero.zero_hpz_partition_size, f"stages.{stage.name}.zero.zero_hpz_partition_size"
    if ways == 1:
        return
    if stage.zero.stage < 3:
        raise UserError(
            f"{where} {ways} needs ZeRO stage 3; it is {stage.zero.stage}", "set zero.stage to 3, or drop the key"
        )
    if stage.gpus_per_node % ways:
        raise UserError(
            f"{where} {ways} does not divide the {stage.gpus_per_node} ranks of a node; its copy is there to spare the "
            "network between nodes",
            f"use {_divisors(stage.gpus_per_node)}",
        )
    others = [axis for axis, ranks in stage.parallel if ranks > 1]
    swapped = stage.zero.offload_optimizer == "nvme"
    if others or swapped or stage.zero.offload_param != "none":
        what = f"{others[0]} parallelism" if others else "an optimizer on a disk" if swapped else "offloaded weights"
        raise UserError(f"{where} with {what} is not proved here", "drop the key")


def _check_combination(stage: Stage) -> None:
    parallel, where = stage.parallel, f"stages.{stage.name}.parallel"
    others = [axis for axis in ("tensor", "pipeline", "expert") if getattr(parallel, axis) > 1]
    if parallel.sequence > 1 and others:
        raise UserError(
            f"{where}: sequence {parallel.sequence} with {others[0]} {getattr(parallel, others[0])} is not proved here",
            f"set {' and '.join(others)} to 1: sequence parallelism works with data parallelism and ZeRO 0 to 3",
        )
    if stage.precision == "fp16" and (others or parallel.sequence > 1):
        raise UserError(
            f"{where}: fp16 with {(others or ['sequence'])[0]} parallelism is not proved here", "use bf16 or fp32"
        )


def _check_communication(stage: Stage, data: int) -> None:
    settings, where = stage.communication, f"stages.{stage.name}.communication"
    key = "powersgd" if settings.powersgd else "data_type"
    if not settings.powersgd and not settings.data_type:
        return
    if settings.powersgd and settings.data_type:
        raise UserError(f"{where} has both powersgd and data_type", "choose one: thin matrices are reduced in fp32")
    split = [axis for axis, ranks in stage.parallel if ranks > 1]
    if split:
        raise UserError(
            f"{where}.{key} with parallel.{split[0]} {getattr(stage.parallel, split[0])} is not proved here",
            f"set {' and '.join(split)} to 1, or drop {key}",
        )
    if settings.powersgd:
        _check_powersgd(stage, data, f"{where}.powersgd")


def _check_powersgd(stage: Stage, data: int, where: str) -> None:
    if stage.zero.stage >= 2:
        raise UserError(
            f"{where} with ZeRO stage {stage.zero.stage}: it compresses whole gradients, and that stage partitions them",
            "set zero.stage to 1, or use communication.data_type bf16",
        )
    if stage.zero.offload_optimizer != "none":
        raise UserError(f"{where} with an offloaded optimizer is not proved here", "set zero.offload_optimizer to none")
    if stage.precision == "fp16":
        raise UserError(
            f"{where} with fp16: gradients that overflow would stay in what is added to the next step's",
            "use bf16 or fp32",
        )
    if data == 1:
        raise UserError(f"{where}: one data-parallel rank reduces no gradients", "drop it, or use more ranks")


def _split_by_tensor(model: dict[str, Any]) -> dict[str, int]:
    """What tensor parallelism cuts, by the config's names."""
    names = ["vocab_size", "intermediate_size", "moe_intermediate_size"]
    return _heads(model) | {name: model[name] for name in names if model.get(name)}


def _heads(model: dict[str, Any]) -> dict[str, int]:
    return {name: model[name] for name in ("num_attention_heads", "num_key_value_heads") if name in model}


def _check_divides(where: str, axis: str, ranks: int, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size % ranks:
            raise UserError(
                f"{where}.{axis} {ranks} does not divide the model's {name} {size}",
                f"set {axis} to {_divisors(math.gcd(*sizes.values()))}"
                + (", or pad vocab_size" if name == "vocab_size" else ""),
            )


def _check_experts_in_every_stage(where: str, stage: Stage, model: dict[str, Any]) -> None:
    """DeepSpeed's ranks agree on one gradient norm, a parameter group at a time: every stage must have the same groups."""
    sparse, stages = sparse_layers(model), stage.parallel.pipeline
    without = _stages_without_experts(sparse, stages)
    if without:
        layers = stage_layers(len(sparse), stages)[without[0]]
        fits = max((n for n in range(1, stages) if not _stages_without_experts(sparse, n)), default=1)
        raise UserError(
            f"{where}: layers {layers.start} to {layers.stop - 1}, stage {without[0] + 1} of {stages} of the pipeline, are all "
            "dense; with experts spread over ranks every stage needs a mixture",
            f"use {fits} stages, or set expert to 1",
        )


def _stages_without_experts(sparse: Sequence[bool], stages: int) -> list[int]:
    cut = stage_layers(len(sparse), stages)
    return [stage for stage, layers in enumerate(cut) if not any(sparse[layer] for layer in layers)]


def _divisors(number: int) -> str:
    return _either([n for n in range(1, number + 1) if number % n == 0])


def _either(numbers: list[int]) -> str:
    texts = [str(number) for number in numbers]
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
