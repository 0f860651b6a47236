"""Expert parallelism: each rank holds some experts of every mixture, and tokens travel to their experts and back.

Routing stays with transformers' router, computing with its experts module; only the way between is here. T tokens of this
rank, K experts a token, E experts in all, R rows that other ranks sent here, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE

from longhaul.train.parallel.autograd_collectives import all_to_all
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.tensor_slices import decoder_layers, even_part, shard_parameter


def split_experts(model: Any, dims: ParallelDims, partitioned: bool = False) -> None:
    """Gives every mixture of a Hugging Face causal LM the experts of this rank, which ZeRO-3 is to partition or not."""
    _register_groups(dims)
    kind = ExpertParallel if partitioned else ExpertParallelMoE
    for layer in decoder_layers(model):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = kind(layer.mlp.experts, dims)


def _register_groups(dims: ParallelDims) -> None:
    """Tells DeepSpeed the groups, by the name that its optimizers look them up with."""
    from deepspeed.utils import groups

    name = group_name(dims)
    groups._EXPERT_PARALLEL_GROUP[name] = dims.group("expert")
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = dims.group("expert_data")


def group_name(dims: ParallelDims) -> str:
    return f"ep_size_{dims.parallel.expert}"


class ExpertParallel(torch.nn.Module):
    """Stands in for a transformers experts module of E experts, E / ranks of which are here."""

    def __init__(self, experts: Any, dims: ParallelDims) -> None:
        torch.nn.Module.__init__(self)
        self.local, self.group, self.ranks = experts, dims.group("expert"), dims.parallel.expert
        self.num_experts, self.expert_group_name = experts.num_experts, group_name(dims)
        self.here = self.num_experts // self.ranks
        for name in ("gate_up_proj", "down_proj"):
            part = even_part(self.num_experts, dims.expert_rank, self.ranks)
            parameter: Any = shard_parameter(experts, name, {0: part})
            parameter.allreduce, parameter.group_name = False, self.expert_group_name
        experts.num_experts = self.here

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, K] -> [T, H], as the module it stands in for."""
        chosen = top_k_index.shape[1]
        order_TK = top_k_index.flatten().argsort(stable=True)
        tokens_TK = order_TK // chosen
        sent, received_RE = self._exchange_counts(top_k_index)
        received = received_RE.sum(1).tolist()
        rows_RH = all_to_all(hidden_states[tokens_TK], sent, received, self.group)
        outputs_TKH = all_to_all(self._compute(rows_RH, received_RE), received, sent, self.group)
        weighted_TKH = outputs_TKH * top_k_weights.flatten()[order_TK, None]
        return torch.zeros_like(hidden_states).index_add(0, tokens_TK, weighted_TKH.to(hidden_states.dtype))

    def _exchange_counts(self, top_k_index: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """(rows this rank sends to each other, rows it receives [sender, expert of this rank])."""
        counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        return counts.view(self.ranks, self.here).sum(1).tolist(), received.view(self.ranks, self.here)

    def _compute(self, rows_RH: torch.Tensor, received_RE: torch.Tensor) -> torch.Tensor:
        """This rank's experts on the rows [R, H], which come sorted by sender, then by expert."""
        if not len(rows_RH):
            # Every rank takes part in the backward exchange, and in what is gathered and reduced of every parameter.
            row_1H = torch.cat([rows_RH, rows_RH.new_zeros(1, rows_RH.shape[1])])
            return self.local(row_1H, row_1H.new_zeros(1, 1, dtype=torch.long), row_1H.new_zeros(1, 1))[:0]
        experts = torch.arange(self.here, device=rows_RH.device).repeat(self.ranks)
        index_R1 = experts.repeat_interleave(received_RE.flatten())[:, None]
        return self.local(rows_RH, index_R1, rows_RH.new_ones(len(rows_RH), 1))


class ExpertParallelMoE(ExpertParallel, MoE):
    """A DeepSpeed MoE by name alone: it is how ZeRO 1 and 2 know that some gradients are averaged over fewer ranks.

    ZeRO 3 refuses an MoE, and goes by marks of the parameters (split.py).
    """

    # DeepSpeed would look for a file of each; the optimizer's files hold them.
    num_local_experts = 0

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups are there already."""
