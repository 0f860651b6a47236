"""Builds this rank's slice of the network on the meta device, then allocates it; maps names to Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from longhaul.checkpoint_io.tensor_slice import TensorSlice
from longhaul.compat.deepspeed import mark_as_autoep_expert, zero3_partitioner
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.sliced_parameters import slice_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_WRAPPED_EXPERTS = ".mlp.experts.local."

Allocate = Callable[[torch.Tensor, torch.device], torch.nn.Parameter]
"""Returns a parameter with memory on a device, in the place of one without memory (device meta)."""


def build_sliced_model(
    config: PreTrainedConfig,
    dims: ParallelDims,
    trust_remote_code: bool,
    device: torch.device,
    ds_config: dict[str, Any],
) -> Any:
    """Return this rank's slice of a Hugging Face causal LM, with undefined values; under ZeRO 3 it is partitioned.

    Raises:
        RuntimeError: the architecture has a non-persistent buffer other than the rotary tables.
    """
    is_zero3 = ds_config["zero_optimization"]["stage"] == 3
    model = slice_model(config, dims, trust_remote_code, is_zero3)
    _allocate_model(model, device, _zero3_allocator(dims, ds_config) if is_zero3 else _allocate_whole)
    if dims.parallel.tensor > 1:
        from longhaul.train.parallel.tensor_parallel import register_gradient_sums

        register_gradient_sums(model, dims)
    return model


def slice_model(
    config: PreTrainedConfig, dims: ParallelDims, trust_remote_code: bool = False, is_zero3: bool = False
) -> Any:
    """Return this rank's slice of a Hugging Face causal LM without memory (device meta)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    if dims.parallel.pipeline > 1:
        from longhaul.train.parallel.pipeline_parallel import keep_own_layers

        keep_own_layers(model, dims)
    if dims.parallel.tensor > 1:
        from longhaul.train.parallel.tensor_parallel import apply_tensor_parallel

        apply_tensor_parallel(model, dims)
    if dims.parallel.expert > 1:
        from longhaul.train.parallel.expert_parallel import apply_expert_parallel

        apply_expert_parallel(model, dims, is_zero3)
    return model


def _allocate_whole(parameter: torch.Tensor, device: torch.device) -> torch.nn.Parameter:
    """Return a parameter with undefined values that keeps the attributes of the given one."""
    allocated: Any = torch.nn.Parameter(torch.empty_like(parameter, device=device))
    allocated.__dict__.update(parameter.__dict__)
    return allocated


def _zero3_allocator(dims: ParallelDims, ds_config: dict[str, Any]) -> Allocate:
    """Return an allocator for ZeRO 3: it partitions each parameter over data-parallel ranks before it allocates the next."""
    dtype, partition = zero3_partitioner(ds_config, dims.group("data") if dims.parallel.tensor > 1 else None)

    def allocate(parameter: torch.Tensor, device: torch.device) -> torch.nn.Parameter:
        allocated: Any = _allocate_whole(parameter.to(dtype), device)
        allocated.__dict__.update(parameter.__dict__)
        if group_name := getattr(allocated, "group_name", None):
            mark_as_autoep_expert(allocated, group_name, dims.group("expert_data"))
        partition(allocated)
        return allocated

    return allocate


def _allocate_model(model: Any, device: torch.device, allocate: Allocate) -> None:
    """Allocate parameters and persistent buffers, and compute the rotary tables. A tied parameter is allocated once."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    persistent = torch.nn.Module.state_dict(model).keys()
    allocated: dict[int, torch.nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in allocated:
                allocated[id(parameter)] = allocate(parameter, device)
            setattr(module, key, allocated[id(parameter)])
        for key, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if f"{name}.{key}".removeprefix(".") not in persistent:
                raise RuntimeError(
                    f"{name}.{key} is a non-persistent buffer: no checkpoint holds it, and longhaul cannot compute it"
                )
            setattr(module, key, torch.zeros_like(buffer, device=device))


def parameter_slices(module: torch.nn.Module) -> Iterator[tuple[TensorSlice, torch.nn.Parameter]]:
    """Yield every parameter of a model or PipelineModule with its slice of the Hugging Face tensor; tied ones once."""
    for name, parameter in module.named_parameters():
        yield slice_of(hugging_face_name(module, name), parameter), parameter


def buffer_slices(module: torch.nn.Module) -> Iterator[tuple[TensorSlice, torch.Tensor]]:
    """Yield every persistent buffer, with its slice of the Hugging Face tensor."""
    persistent = torch.nn.Module.state_dict(module).keys()
    for name, buffer in module.named_buffers():
        if name in persistent:
            yield slice_of(hugging_face_name(module, name), buffer), buffer


def hugging_face_name(module: torch.nn.Module, name: str) -> str:
    """Return transformers' name of a parameter or buffer, without the modules that this package has inserted."""
    if hasattr(module, "tied_modules"):  # a PipelineModule
        from longhaul.train.parallel.pipeline_parallel import hugging_face_name_in_pipeline

        name = hugging_face_name_in_pipeline(name)
    return name.replace(_WRAPPED_EXPERTS, ".mlp.experts.")
