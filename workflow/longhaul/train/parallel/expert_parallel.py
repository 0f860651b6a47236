"""Expert parallelism: each rank holds some experts, and all-to-all moves tokens to them and back.

transformers' router chooses the experts and its experts module computes them; this module only exchanges the tokens.

T tokens of this rank, K experts for each token, S = T · K rows, sorted by expert, E experts in all, R rows that ranks sent to
this one, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
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
    can_compile_parts = False
    """Whether torch.compile can capture what is computed before, between and after the exchanges (experts_on_gpus.py)."""

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
        rows_SH, counts_E, places = self.sort_rows(hidden_states, top_k_index, self.num_experts)
        sent, received, received_RE = self._exchange_counts(counts_E)
        arrived_RH = all_to_all(rows_SH, sent, received, self.group_name)
        outputs_SH = all_to_all(self._compute(arrived_RH, received_RE), received, sent, self.group_name)
        return self.sum_outputs(outputs_SH, top_k_weights, places).to(hidden_states.dtype)

    def compile_parts(self, compile_part: Callable[..., Any]) -> None:
        """Let `compile_part` compile what is computed between the exchanges.

        The number of rows that arrive differs in each step, so the experts have a graph for any number.
        """
        if self.can_compile_parts:
            self.sort_rows = compile_part(self.sort_rows, dynamic=False)
            self.sum_outputs = compile_part(self.sum_outputs, dynamic=False)
            self.local.forward = compile_part(self.local.forward, dynamic=True)

    @staticmethod
    def sort_rows(
        hidden_TH: torch.Tensor, chosen_TK: torch.Tensor, experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Return (rows [S, H], rows of each expert [E], the places of the rows, for `sum_outputs`)."""
        order_S = chosen_TK.flatten().argsort(stable=True)
        tokens_S = order_S // chosen_TK.shape[1]
        counts_E = torch.bincount(chosen_TK.flatten(), minlength=experts)
        return hidden_TH[tokens_S], counts_E, (order_S, tokens_S)

    @staticmethod
    def sum_outputs(outputs_SH: torch.Tensor, weights_TK: torch.Tensor, places: Any) -> torch.Tensor:
        """Return the weighted sum of the experts' outputs for each token [T, H]."""
        order_S, tokens_S = places
        weighted_SH = outputs_SH * weights_TK.flatten()[order_S, None]
        summed_TH = outputs_SH.new_zeros(len(weights_TK), outputs_SH.shape[1])
        return summed_TH.index_add(0, tokens_S, weighted_SH.to(outputs_SH.dtype))

    def _exchange_counts(self, counts_E: torch.Tensor) -> tuple[list[int], list[int], torch.Tensor]:
        """Return the number of rows for each rank, that from each rank, and that from each [sender, local expert]."""
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=self.group)
        both = torch.stack([counts_E, received_E]).view(2, self.ranks, self.local_experts)
        sent, received = both.sum(2).tolist()  # the CPU waits for the GPU: once, as each wait leaves the GPU idle
        return sent, received, both[1]

    def _compute(self, rows_RH: torch.Tensor, received_RE: torch.Tensor) -> torch.Tensor:
        """Apply this rank's experts to the rows [R, H], which are sorted by sender, then by expert."""
        if not len(rows_RH):
            # Two rows of zeros are computed and dropped: every rank must take part in the backward exchange, and in the
            # collectives that gather and reduce every parameter. torch.compile would make other code for a single row.
            rows_2H = rows_RH.new_zeros(2, rows_RH.shape[1])
            index_2 = torch.zeros(2, dtype=torch.long, device=rows_RH.device)
            return self._compute_rows(torch.cat([rows_RH, rows_2H]), index_2)[:0]
        experts = torch.arange(self.local_experts, device=rows_RH.device).repeat(self.ranks)
        index_R = experts.repeat_interleave(received_RE.flatten(), output_size=len(rows_RH))
        return self._compute_rows(rows_RH, index_R)

    def _compute_rows(self, rows_RH: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
        return self.local(rows_RH, index_R[:, None], rows_RH.new_ones(len(rows_RH), 1))
