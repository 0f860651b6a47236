"""Tensor parallelism: attention heads, inner widths of MLPs and experts, and the vocabulary are split over ranks.

Column-parallel layers split their output, row-parallel ones their input (Megatron-LM, arXiv:1909.08053, section 3). What
enters a split region is copied (gradients are summed), what leaves it is summed. Latent attention (MLA) has two things more:
the compressions q_a, kv_a stay whole, so their outputs enter the region, not the layer's input; and the rotary part of the
key, which kv_a_proj_with_mqa gives to all heads at once, gets a partial gradient from each rank's heads.

T tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from longhaul.train.parallel.autograd_collectives import copy_to, reduce_from
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.tensor_slices import decoder_layers, even_part, shard_parameter

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")


def split_tensors(model: Any, dims: ParallelDims) -> None:
    """Gives every layer of a Hugging Face causal LM its tensor-parallel part."""
    for layer in decoder_layers(model):
        _split_attention(layer.self_attn, dims)
        _split_mlp(layer.mlp, dims)
    _split_vocabulary(model, dims)


def _split_attention(attention: Any, dims: ParallelDims) -> None:
    group = dims.group("tensor")
    _split_linears(attention, dims)
    if hasattr(attention, "kv_a_proj_with_mqa"):
        for name in ("q_proj", "q_b_proj", "kv_b_proj"):
            if getattr(attention, name, None) is not None:
                _copy_inputs(getattr(attention, name), group)
        _sum_rotary_gradient(attention.kv_a_proj_with_mqa, attention.qk_rope_head_dim, group)
        return
    _copy_inputs(attention, group)
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            sum_gradient(getattr(attention, name), "weight")


def _split_mlp(mlp: Any, dims: ParallelDims) -> None:
    if not hasattr(mlp, "experts"):
        _split_linears(mlp, dims)
        _copy_inputs(mlp, dims.group("tensor"))
        return
    _split_experts(mlp.experts, dims)
    if getattr(mlp, "shared_experts", None) is not None:
        _split_mlp(mlp.shared_experts, dims)


def _split_linears(module: Any, dims: ParallelDims) -> None:
    for name in COLUMN_PARALLEL:
        if (linear := getattr(module, name, None)) is not None:
            for parameter in ("weight", "bias"):
                if getattr(linear, parameter) is not None:
                    _split(linear, parameter, 0, dims)
    for name in ROW_PARALLEL:
        if (linear := getattr(module, name, None)) is not None:
            _split(linear, "weight", 1, dims)
            setattr(module, name, RowParallel(linear.weight, linear.bias, dims.group("tensor")))


def _split(module: Any, name: str, axis: int, dims: ParallelDims) -> None:
    size = getattr(module, name).shape[axis]
    _mark(shard_parameter(module, name, {axis: even_part(size, dims.tensor_rank, dims.parallel.tensor)}))


def _split_experts(experts: Any, dims: ParallelDims) -> None:
    """Every expert's inner width I: gate_up_proj [E, 2I, H] holds gate above up, down_proj is [E, H, I]."""
    width = experts.down_proj.shape[2]
    ((start, stop),) = even_part(width, dims.tensor_rank, dims.parallel.tensor)
    _mark(shard_parameter(experts, "gate_up_proj", {1: ((start, stop), (width + start, width + stop))}))
    _mark(shard_parameter(experts, "down_proj", {2: ((start, stop),)}))
    # The weights of the chosen experts are multiplied with partial outputs, so their gradient is partial too.
    _copy_inputs(experts, dims.group("tensor"))
    experts.register_forward_hook(lambda _module, _inputs, output: reduce_from(output, dims.group("tensor")))


def _split_vocabulary(model: Any, dims: ParallelDims) -> None:
    """Embedding and head by rows; tied ones stay one parameter."""
    tied = model.config.tie_word_embeddings
    embedding: Any = model.model.embed_tokens
    head: Any = model.lm_head
    if embedding is not None:
        _split(embedding, "weight", 0, dims)
        model.model.embed_tokens = VocabularyParallelEmbedding(embedding.weight, embedding.padding_idx, dims)
    if head is not None:
        if tied:
            head.weight = model.model.embed_tokens.weight
        else:
            _split(head, "weight", 0, dims)
        _copy_inputs(head, dims.group("tensor"))


def _mark(parameter: Any) -> None:
    """DeepSpeed counts it in the gradient norm of every rank, not of the first alone."""
    parameter.tensor_model_parallel = True


def _copy_inputs(module: torch.nn.Module, group: Any) -> None:
    def copied(value: Any) -> Any:
        return copy_to(value, group) if torch.is_tensor(value) and value.is_floating_point() else value

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Of the keywords only hidden_states carries a gradient.
        named = {key: copied(value) if key == "hidden_states" else value for key, value in kwargs.items()}
        return tuple(copied(value) for value in args), named

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _sum_rotary_gradient(projection: torch.nn.Module, rotary: int, group: Any) -> None:
    """The last `rotary` columns of the output go to this rank's heads directly, the others through a copied input."""

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        latent, rope = output.split([output.shape[-1] - rotary, rotary], dim=-1)
        return torch.cat([latent, copy_to(rope, group)], dim=-1)

    projection.register_forward_hook(hook)


def sum_gradient(module: torch.nn.Module, name: str) -> None:
    """Marks a whole parameter that each rank uses for its own heads: its gradient must be summed over tensor ranks."""
    getattr(module, name).sum_over_tensor_ranks = True


def hook_gradients(model: Any, dims: ParallelDims) -> None:
    """Sums the marked gradients, once the parameters have memory."""

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=dims.group("tensor"))
        return total

    for parameter in model.parameters():
        if getattr(parameter, "sum_over_tensor_ranks", False):
            parameter.register_hook(summed)


class RowParallel(torch.nn.Module):
    """x [..., in / ranks] -> the sum over ranks of x · weightᵀ, plus the bias once."""

    def __init__(self, weight: torch.nn.Parameter, bias: torch.nn.Parameter | None, group: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.group = weight, bias, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        summed = reduce_from(F.linear(x, self.weight), self.group)
        return summed if self.bias is None else summed + self.bias


class VocabularyParallelEmbedding(torch.nn.Module):
    """ids [B, T] -> [B, T, H]; each rank looks up the ids of its rows and gives zeros for the others."""

    def __init__(self, weight: torch.nn.Parameter, padding_idx: int | None, dims: ParallelDims) -> None:
        super().__init__()
        self.weight, self.group = weight, dims.group("tensor")
        self.first = dims.tensor_rank * weight.shape[0]
        self.padding = -1 if padding_idx is None else padding_idx

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        local_BT = ids_BT - self.first
        foreign_BT = (local_BT < 0) | (local_BT >= self.weight.shape[0])
        found_BTH = F.embedding(local_BT.masked_fill(foreign_BT, 0), self.weight)
        # As in torch.nn.Embedding, the padding token gets no gradient.
        padding_BT = (ids_BT == self.padding)[..., None]
        found_BTH = torch.where(padding_BT, found_BTH.detach(), found_BTH)
        return reduce_from(found_BTH.masked_fill(foreign_BT[..., None], 0.0), self.group)


def gather_vocabulary(logits: torch.Tensor, dims: ParallelDims) -> torch.Tensor:
    """Logits [..., V / ranks] of every tensor rank, put together; without gradient."""
    parts = [torch.empty_like(logits) for _ in range(dims.parallel.tensor)]
    dist.all_gather(parts, logits.contiguous(), group=dims.group("tensor"))
    return torch.cat(parts, -1)
