"""Makes this rank's part of a model, whose whole never has memory here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from longhaul.checkpoint_io.tensor_parts import Shard
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.tensor_slices import shard_of

_EXPERTS = ".mlp.experts.local."

Give = Callable[[torch.Tensor, torch.device], torch.nn.Parameter]
"""Gives a parameter without memory (device meta) its memory."""


def split_model(
    config: Any, dims: ParallelDims, trust_remote_code: bool, device: torch.device, ds_config: dict[str, Any]
) -> Any:
    """A Hugging Face causal LM of which only this rank's part is there, with undefined values; of ZeRO-3, its partition.

    Raises:
        RuntimeError: the architecture has a buffer that is neither saved nor known here.
    """
    partitioned = ds_config["zero_optimization"]["stage"] == 3
    model = cut_model(config, dims, trust_remote_code, partitioned)
    _give_memory(model, device, _give_partition(dims, ds_config) if partitioned else _give_whole)
    if dims.parallel.tensor > 1:
        from longhaul.train.parallel.tensor_parallel import hook_gradients

        hook_gradients(model, dims)
    return model


def cut_model(config: Any, dims: ParallelDims, trust_remote_code: bool = False, partitioned: bool = False) -> Any:
    """This rank's part of the model without any memory, which ZeRO-3 is to partition or not."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    if dims.parallel.pipeline > 1:
        from longhaul.train.parallel.pipeline_parallel import keep_own_stage

        keep_own_stage(model, dims)
    if dims.parallel.tensor > 1:
        from longhaul.train.parallel.tensor_parallel import split_tensors

        split_tensors(model, dims)
    if dims.parallel.expert > 1:
        from longhaul.train.parallel.expert_parallel import split_experts

        split_experts(model, dims, partitioned)
    return model


def _give_whole(parameter: torch.Tensor, device: torch.device) -> torch.nn.Parameter:
    """With undefined values, and what was noted at it."""
    made: Any = torch.nn.Parameter(torch.empty_like(parameter, device=device))
    made.__dict__.update(parameter.__dict__)
    return made


def _give_partition(dims: ParallelDims, ds_config: dict[str, Any]) -> Give:
    """For ZeRO-3: every parameter is partitioned over its data-parallel ranks before the next one is made.

    DeepSpeed knows no experts of ours; those of its AutoEP have the same parts on the same ranks, so they bear its marks.
    """
    import deepspeed

    data = dims.group("data") if dims.parallel.tensor > 1 else None
    init = deepspeed.zero.Init(module=torch.nn.Module(), data_parallel_group=data, config_dict_or_path=ds_config)

    def give(parameter: torch.Tensor, device: torch.device) -> torch.nn.Parameter:
        made: Any = _give_whole(parameter.to(init.dtype), device)
        made.__dict__.update(parameter.__dict__)
        if name := getattr(made, "group_name", None):
            made.ds_zero_placement_family, made.ds_zero_partition_group_name = "autoep_expert", name
            made.ds_zero_partition_process_group = dims.group("expert_data")
        init._convert_to_zero_parameters([made])
        return made

    return give


def _give_memory(model: Any, device: torch.device, give: Give) -> None:
    """Memory for parameters and saved buffers; a tied parameter stays one. The rotary tables are computed anew."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    made: dict[int, torch.nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                made[id(parameter)] = give(parameter, device)
            setattr(module, key, made[id(parameter)])
        for key, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if key in module._non_persistent_buffers_set:
                raise RuntimeError(f"{name}.{key} is a buffer that no checkpoint holds; it cannot be made here")
            setattr(module, key, torch.zeros_like(buffer, device=device))


def parameters(module: torch.nn.Module) -> Iterator[tuple[Shard, torch.nn.Parameter]]:
    """Every parameter of a model or PipelineModule, with the part of the Hugging Face tensor that it is; tied ones once."""
    for name, parameter in module.named_parameters():
        yield shard_of(hugging_face_name(module, name), parameter), parameter


def saved_buffers(module: torch.nn.Module) -> Iterator[tuple[Shard, torch.Tensor]]:
    """Every buffer that belongs to a checkpoint."""
    saved = torch.nn.Module.state_dict(module).keys()
    for name, buffer in module.named_buffers():
        if name in saved:
            yield shard_of(hugging_face_name(module, name), buffer), buffer


def hugging_face_name(module: torch.nn.Module, name: str) -> str:
    """The transformers name of a parameter or buffer, whatever this package wrapped around it."""
    if hasattr(module, "tied_modules"):
        from longhaul.train.parallel.pipeline_parallel import hugging_face_name as of_pipeline

        name = of_pipeline(name)
    return name.replace(_EXPERTS, ".mlp.experts.")
