"""Builds DeepSpeed's engine from ds_config.json: parameter groups (no weight decay for norms and biases), swap folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ConfigDict, FiniteFloat
from typing_extensions import TypedDict

from longhaul.artifacts.typed_json import read_typed_json
from longhaul.compat.deepspeed import (
    Engine,
    count_sliced_experts_in_gradient_norm,
    gather_whole_layers,
    skip_averaging_over_one_rank,
    unpartitioned_shape,
)
from longhaul.config.model_size import model_size
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.planning.constants_shared_with_trainer import swap_param_buffer_elements
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.parallel.sliced_parameters import decoder_layers


class _Parameters(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    lr: FiniteFloat


class _Optimizer(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    params: _Parameters


class _DeepSpeedConfig(TypedDict):
    """The values of ds_config.json that the trainer computes with; DeepSpeed checks the others."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    optimizer: _Optimizer
    zero_optimization: dict[str, Any]


def read_deepspeed_config(job: TrainSpec, context: DistributedContext | None = None) -> dict[str, Any]:
    """Return the rendered ds_config.json, with this process' swap folder and buffer size where it offloads to a disk.

    The global batch size is not in it; DeepSpeed computes it from the world size.
    """
    config: dict[str, Any] = {**read_typed_json(Path(job.deepspeed), _DeepSpeedConfig)}
    if context and context.swap:
        zero = config["zero_optimization"]
        for key in job.stage.zero.nvme_keys:
            zero[key]["nvme_path"] = str(context.swap)
        if "offload_param" in job.stage.zero.nvme_keys:
            zero["offload_param"]["buffer_size"] = swap_param_buffer_elements(model_size(job.model), context.dims.data)
    return config


def peak_learning_rate(job: TrainSpec) -> float:
    """Return the learning rate at the peak of the schedule: the `lr` of the optimizer in ds_config.json."""
    return read_deepspeed_config(job)["optimizer"]["params"]["lr"]


def build_engine(job: TrainSpec, module: torch.nn.Module, context: DistributedContext) -> Engine:
    """Return deepspeed.initialize's engine around the module; every rank calls this.

    A PipelineModule brings its own process groups; else tensor ranks are given to DeepSpeed as `mpu`.
    """
    import deepspeed

    if job.stage.zero.gathers_whole_layers:
        gather_whole_layers(module, [type(layer) for layer in decoder_layers(module)])
    groups = cast(Any, parameter_groups(module))  # the annotation says Module, the code accepts groups
    parallel = job.stage.parallel
    mpu = context.dims if parallel.tensor > 1 and parallel.pipeline == 1 else None
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=groups, config=read_deepspeed_config(job, context), mpu=mpu
    )
    if mpu and job.stage.zero.stage == 3:
        count_sliced_experts_in_gradient_norm(engine)
    skip_averaging_over_one_rank(engine)
    return engine


def parameter_groups(module: torch.nn.Module) -> list[dict[str, object]]:
    """Return the optimizer's parameter groups: norms and biases without weight decay, sliced experts in groups of their own.

    Weights that decay have no `weight_decay` here: the optimizer fills in the value of ds_config.json.
    """
    groups: dict[tuple[bool, str | None], list[torch.nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            key = (len(unpartitioned_shape(parameter)) >= 2, getattr(parameter, "group_name", None))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": members,
            **({} if decays else {"weight_decay": 0.0}),
            **({"moe": True, "name": expert_group} if expert_group else {}),
        }
        for (decays, expert_group), members in sorted(groups.items(), key=_group_order)
    ]


def _group_order(group: tuple[tuple[bool, str | None], list[torch.nn.Parameter]]) -> tuple[str, bool]:
    """Order groups the same way on every rank: by expert group, those that decay first."""
    (decays, expert_group), _ = group
    return expert_group or "", not decays
