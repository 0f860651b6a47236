"""Expert parallelism: each rank holds some experts, and all-to-all moves tokens to them and back.

transformers' router chooses the experts and its experts module computes them; this module only exchanges the tokens.

T tokens of this rank, K experts for each token, E experts in all, R rows that ranks sent to this one, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from longhaul.compat.deepspeed import deepspeed_moe_class, register_expert_groups
from longhaul.train.parallel.autograd_collectives import all_to_all, name_group
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.sliced_parameters import decoder_layers, equal_range, slice_parameter


def apply_expert_parallel(model: Any, dims: ParallelDims, is_zero3: bool = False) -> None:
    """Reduce every mixture of a Hugging Face causal LM to the experts of this rank.

    ZeRO 1 and 2 recognise experts by the class of their module, ZeRO 3 by marks on the parameters (slice_model.py).
    """
    register_expert_groups(_group_name(dims), dims.group("expert"), dims.group("expert_data"))
    kind: Any = ExpertParallel if is_zero3 else deepspeed_moe_class(ExpertParallel)
    for layer in decoder_layers(model):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = kind(layer.mlp.experts, dims)


def _group_name(dims: ParallelDims) -> str:
    return f"ep_size_{dims.parallel.expert}"


class ExpertParallel(torch.nn.Module):
    """Replaces transformers' experts module of E experts; it holds E / ranks of them."""

    breaks_graph = True
    """torch.compile cannot capture it: the sizes of the exchange are known only when the ranks have counted their rows."""

    def __init__(self, experts: Any, dims: ParallelDims) -> None:
        torch.nn.Module.__init__(self)  # not super(): DeepSpeed's MoE would build experts of its own
        self.local, self.group, self.ranks = experts, dims.group("expert"), dims.parallel.expert
        self.group_name = name_group(self.group)
        self.num_experts, self.expert_group_name = experts.num_experts, _group_name(dims)
        self.local_experts = self.num_experts // self.ranks
        for name in ("gate_up_proj", "down_proj"):
            own = equal_range(self.num_experts, dims.expert_rank, self.ranks)
            parameter: Any = slice_parameter(experts, name, {0: own})
            # DeepSpeed's marks of expert parameters.
            parameter.allreduce, parameter.group_name = False, self.expert_group_name
        experts.num_experts = self.local_experts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute the experts as the replaced module does: hidden_states [T, H], index and weights [T, K] -> [T, H]."""
        chosen = top_k_index.shape[1]
        order_TK = top_k_index.flatten().argsort(stable=True)
        tokens_TK = order_TK // chosen
        sent, received_RE = self._exchange_counts(top_k_index)
        received = received_RE.sum(1).tolist()
        rows_RH = all_to_all(hidden_states[tokens_TK], sent, received, self.group_name)
        outputs_TKH = all_to_all(self._compute(rows_RH, received_RE), received, sent, self.group_name)
        weighted_TKH = outputs_TKH * top_k_weights.flatten()[order_TK, None]
        return torch.zeros_like(hidden_states).index_add(0, tokens_TK, weighted_TKH.to(hidden_states.dtype))

    def _exchange_counts(self, top_k_index: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """Return (number of rows that this rank sends to each rank, rows that it receives [sender, local expert])."""
        counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        shape = (self.ranks, self.local_experts)
        return counts.view(shape).sum(1).tolist(), received.view(shape)

    def _compute(self, rows_RH: torch.Tensor, received_RE: torch.Tensor) -> torch.Tensor:
        """Apply this rank's experts to the rows [R, H], which are sorted by sender, then by expert."""
        if not len(rows_RH):
            # One row of zeros is computed and dropped: every rank must take part in the backward exchange, and in the
            # collectives that gather and reduce every parameter.
            row_1H = torch.cat([rows_RH, rows_RH.new_zeros(1, rows_RH.shape[1])])
            return self.local(row_1H, row_1H.new_zeros(1, 1, dtype=torch.long), row_1H.new_zeros(1, 1))[:0]
        experts = torch.arange(self.local_experts, device=rows_RH.device).repeat(self.ranks)
        index_R1 = experts.repeat_interleave(received_RE.flatten())[:, None]
        return self.local(rows_RH, index_R1, rows_RH.new_ones(len(rows_RH), 1))
