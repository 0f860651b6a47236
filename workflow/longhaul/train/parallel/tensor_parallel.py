"""Tensor parallelism: divides attention heads, MLP and expert widths, vocabulary; sums their gradients.

Column-parallel layers divide their output, row-parallel layers their input (Megatron-LM, arXiv:1909.08053, section 3). The
input of a parallel region is copied to all ranks, and its gradients are summed. The output of the region is summed.
Latent attention (MLA) differs in two points:
- The compressions q_a and kv_a stay whole, so their outputs enter the parallel region instead of the layer's input.
- kv_a_proj_with_mqa also returns the rotary part of the key, which all heads share. Each rank has only the gradient from its
  own heads, so this gradient is summed too.

B samples, T tokens, H hidden width, V vocabulary, E experts, I inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from longhaul.train.parallel.autograd_collectives import all_reduced, copy_to_group, name_group, sum_over_group
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.sliced_parameters import decoder_layers, equal_range, slice_parameter

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")


def apply_tensor_parallel(model: Any, dims: ParallelDims) -> None:
    """Reduce every layer of a Hugging Face causal LM to this rank's slices, and add the communication."""
    for layer in decoder_layers(model):
        _slice_attention(layer.self_attn, dims)
        _slice_mlp(layer.mlp, dims)
    _slice_vocabulary(model, dims)


def _slice_attention(attention: Any, dims: ParallelDims) -> None:
    group = name_group(dims.group("tensor"))
    _slice_linears(attention, dims)
    if hasattr(attention, "kv_a_proj_with_mqa"):
        for name in ("q_proj", "q_b_proj", "kv_b_proj"):
            if getattr(attention, name, None) is not None:
                _copy_inputs(getattr(attention, name), group)
        _sum_rotary_gradient(attention.kv_a_proj_with_mqa, attention.qk_rope_head_dim, group)
        return
    _copy_inputs(attention, group)
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            _mark_gradient_to_sum(getattr(attention, name), "weight")


def _slice_mlp(mlp: Any, dims: ParallelDims) -> None:
    if not hasattr(mlp, "experts"):
        _slice_linears(mlp, dims)
        _copy_inputs(mlp, name_group(dims.group("tensor")))
        return
    _slice_experts(mlp.experts, dims)
    if getattr(mlp, "shared_experts", None) is not None:
        _slice_mlp(mlp.shared_experts, dims)


def _slice_linears(module: torch.nn.Module, dims: ParallelDims) -> None:
    for name in COLUMN_PARALLEL:
        if (linear := getattr(module, name, None)) is not None:
            for parameter in ("weight", "bias"):
                if getattr(linear, parameter) is not None:
                    _slice_axis(linear, parameter, 0, dims)
    for name in ROW_PARALLEL:
        if (linear := getattr(module, name, None)) is not None:
            _slice_axis(linear, "weight", 1, dims)
            setattr(module, name, RowParallelLinear(linear.weight, linear.bias, name_group(dims.group("tensor"))))


def _slice_axis(module: torch.nn.Module, name: str, axis: int, dims: ParallelDims) -> None:
    size = getattr(module, name).shape[axis]
    own = equal_range(size, dims.tensor_rank, dims.parallel.tensor)
    _mark_for_gradient_norm(slice_parameter(module, name, {axis: own}))


def _slice_experts(experts: Any, dims: ParallelDims) -> None:
    """Slice the inner width of every expert: gate_up_proj [E, 2I, H] holds gate above up, down_proj is [E, H, I]."""
    width = experts.down_proj.shape[2]
    ((start, stop),) = equal_range(width, dims.tensor_rank, dims.parallel.tensor)
    gate_and_up = ((start, stop), (width + start, width + stop))
    _mark_for_gradient_norm(slice_parameter(experts, "gate_up_proj", {1: gate_and_up}))
    _mark_for_gradient_norm(slice_parameter(experts, "down_proj", {2: ((start, stop),)}))
    # The router's weights are multiplied with partial outputs, so their gradients are partial and must be summed too.
    group = name_group(dims.group("tensor"))
    _copy_inputs(experts, group)
    experts.register_forward_hook(lambda _module, _inputs, output: sum_over_group(output, group))


def _slice_vocabulary(model: Any, dims: ParallelDims) -> None:
    """Slice the rows of embedding and head; tied ones stay one parameter."""
    tied = model.config.tie_word_embeddings
    embedding: Any = model.model.embed_tokens
    head: Any = model.lm_head
    if embedding is not None:
        _slice_axis(embedding, "weight", 0, dims)
        model.model.embed_tokens = VocabularyParallelEmbedding(embedding.weight, dims)
    if head is not None:
        if tied:
            head.weight = model.model.embed_tokens.weight
        else:
            _slice_axis(head, "weight", 0, dims)
        _copy_inputs(head, name_group(dims.group("tensor")))


def _mark_for_gradient_norm(parameter: Any) -> None:
    """Let DeepSpeed count the parameter in the gradient norm of every tensor rank; others count on tensor rank 0 only."""
    parameter.tensor_model_parallel = True


def _copy_inputs(module: torch.nn.Module, group: str) -> None:
    def copy_if_floating(value: object) -> object:
        return copy_to_group(value, group) if torch.is_tensor(value) and value.is_floating_point() else value

    def hook(
        _module: object, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        # Among keyword arguments, only hidden_states has a gradient.
        copied = {key: copy_if_floating(value) if key == "hidden_states" else value for key, value in kwargs.items()}
        return tuple(copy_if_floating(value) for value in args), copied

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _sum_rotary_gradient(projection: torch.nn.Module, rotary: int, group: str) -> None:
    """Sum the gradient of the last `rotary` output columns, which this rank's heads use directly.

    The other columns reach the heads through a layer with copied inputs, which sums their gradient.
    """

    def hook(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        latent, rope = output.split([output.shape[-1] - rotary, rotary], dim=-1)
        return torch.cat([latent, copy_to_group(rope, group)], dim=-1)

    projection.register_forward_hook(hook)


def _mark_gradient_to_sum(module: torch.nn.Module, name: str) -> None:
    """Mark a whole parameter that each rank uses for its own heads, so that its gradient must be summed over tensor ranks."""
    getattr(module, name).sum_over_tensor_ranks = True


def register_gradient_sums(model: torch.nn.Module, dims: ParallelDims) -> None:
    """Register hooks that sum the gradients of marked parameters; call it when the parameters have memory."""

    group = name_group(dims.group("tensor"))

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        return all_reduced(gradient, group)

    for parameter in model.parameters():
        if getattr(parameter, "sum_over_tensor_ranks", False):
            parameter.register_hook(summed)


class RowParallelLinear(torch.nn.Module):
    """x [..., in / ranks] -> the sum over ranks of x · weightᵀ, plus the bias once."""

    def __init__(self, weight: torch.nn.Parameter, bias: torch.nn.Parameter | None, group: str) -> None:
        super().__init__()
        self.weight, self.bias, self.group = weight, bias, group
        self.multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _multiply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        summed = sum_over_group(self.multiply(x, self.weight), self.group)
        return summed if self.bias is None else summed + self.bias


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute x · weightᵀ with the function that F.linear is now: ZeRO 3 replaces it after layers are built.

    DeepSpeed's function keeps the parameter for the backward pass. torch's keeps a view, which holds the gathered weight.
    """
    return F.linear(x, weight)


class VocabularyParallelEmbedding(torch.nn.Module):
    """ids [B, T] -> [B, T, H]; each rank looks up the ids of its own rows, and the sum over ranks completes the result."""

    def __init__(self, weight: torch.nn.Parameter, dims: ParallelDims) -> None:
        super().__init__()
        self.weight, self.group = weight, name_group(dims.group("tensor"))
        self.first_id = dims.tensor_rank * weight.shape[0]

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        local_BT = ids_BT - self.first_id
        of_other_rank_BT = (local_BT < 0) | (local_BT >= self.weight.shape[0])
        rows_BTH = F.embedding(local_BT.masked_fill(of_other_rank_BT, 0), self.weight)
        return sum_over_group(rows_BTH.masked_fill(of_other_rank_BT[..., None], 0.0), self.group)


def gather_vocabulary(logits: torch.Tensor, dims: ParallelDims) -> torch.Tensor:
    """Return whole logits [..., V] from [..., V / ranks] on each tensor rank; without gradient."""
    parts = [torch.empty_like(logits) for _ in range(dims.parallel.tensor)]
    dist.all_gather(parts, logits.contiguous(), group=dims.group("tensor"))
    return torch.cat(parts, -1)
