"""Expert parallelism: each rank holds some experts, and all-to-all moves tokens to them and back.

transformers' router chooses the experts and its experts module computes them; this module only exchanges the tokens. A token
goes once to each rank that holds experts of it, with its choices (numbers and weights of its experts). That rank computes its
experts of the token, and sends back their weighted sum. So a token is summed twice: over the experts of a rank, over ranks.
Shared experts, which every token uses, are computed while the tokens are under way.

T tokens of this rank, K experts for each token, M = min(K, ranks); B = T · M rows, sorted by rank, of which the first ones are
sent and the others only fill up; R rows that ranks sent to this one; P pairs of such a row and an expert of this rank, sorted by
expert; H hidden width, C = 2 · K choices: first weights, then numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from longhaul.compat.deepspeed import deepspeed_moe_class, register_expert_groups
from longhaul.compat.transformers import take_over_shared_experts
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.row_exchange import RowExchange
from longhaul.train.parallel.sliced_parameters import decoder_layers, equal_range, slice_parameter
from longhaul.train.parallel.token_dispatch import (
    Places,
    count_choices,
    read_few_rows,
    read_rows,
    sort_some_by_choice,
    sum_few_rows,
    sum_rows,
    sum_weighted_rows,
    summing_dtype,
)


def apply_expert_parallel(model: Any, dims: ParallelDims, is_zero3: bool = False) -> None:
    """Reduce every mixture of a Hugging Face causal LM to the experts of this rank.

    ZeRO 1 and 2 recognise experts by the class of their module, ZeRO 3 by marks on the parameters (slice_model.py).
    """
    register_expert_groups(_group_name(dims), dims.group("expert"), dims.group("expert_data"))
    kind: Any = ExpertParallel if is_zero3 else deepspeed_moe_class(ExpertParallel)
    for layer in decoder_layers(model):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = kind(layer.mlp.experts, dims, take_over_shared_experts(layer.mlp))


def _group_name(dims: ParallelDims) -> str:
    return f"ep_size_{dims.parallel.expert}"


class ExpertParallel(torch.nn.Module):
    """Replaces transformers' experts module of E experts; it holds E / ranks of them.

    shared: the shared experts, whose output is added
    """

    breaks_graph = True
    """torch.compile cannot capture it: the sizes of the exchange are known only when the ranks have counted their rows."""
    can_compile_experts = False
    """Whether torch.compile can capture the forward pass of the experts themselves (experts_on_gpus.py)."""

    def __init__(self, experts: Any, dims: ParallelDims, shared: torch.nn.Module | None = None) -> None:
        torch.nn.Module.__init__(self)  # not super(): DeepSpeed's MoE would build experts of its own
        self.local, self.group, self.ranks = experts, dims.group("expert"), dims.parallel.expert
        self.num_experts, self.expert_group_name = experts.num_experts, _group_name(dims)
        self.local_experts = self.num_experts // self.ranks
        self.first_expert = dims.expert_rank * self.local_experts
        for name in ("gate_up_proj", "down_proj"):
            own = equal_range(self.num_experts, dims.expert_rank, self.ranks)
            parameter: Any = slice_parameter(experts, name, {0: own})
            # DeepSpeed's marks of expert parameters.
            parameter.allreduce, parameter.group_name = False, self.expert_group_name
        experts.num_experts = self.local_experts
        # In a tuple, which hides it from torch: its weights are those of the mixture, not of this module.
        self.shared = () if shared is None else (shared,)
        self.parts = Parts()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute the experts as the replaced module does: hidden_states [T, H], index and weights [T, K] -> [T, H]."""
        places, counts_R2 = self.parts.sort_by_rank(top_k_index, self.local_experts, self.ranks)
        counts = _ExchangedCounts(counts_R2, self.group)
        # The GPU makes the rows while the CPU waits for the counts. Their number is a limit that needs no count.
        rows_BH, choices_BC = self.parts.make_rows(hidden_states, top_k_index, top_k_weights, places)
        sent, received, pairs = counts.wait()
        room = len(rows_BH)
        choices = RowExchange(choices_BC, sent, received, self.group)  # first, as the rows are sorted meanwhile
        rows = RowExchange(rows_BH, sent, received, self.group)
        del rows_BH, choices_BC  # an exchange keeps what is under way; after it, nobody needs the rows that were sent
        of_shared = [shared(hidden_states) for shared in self.shared]  # while the rows are under way
        sums = RowExchange(self._compute(rows, choices, pairs), received, sent, self.group, room)
        return self.parts.sum_over_ranks(sums.wait(), places, *of_shared)

    def compile_parts(self, compile_part: Callable[..., Any]) -> None:
        """Let `compile_part` compile what is computed between the exchanges.

        The number of rows that arrive differs in each step. torch finds out what differs (None), as the other sizes must stay
        constants: it unrolls the sum over the K choices.
        """
        self.parts = Parts(
            compile_part(_sort_by_rank, dynamic=False),
            compile_part(_make_rows, dynamic=False),
            compile_part(_sort_by_expert, dynamic=None),
            compile_part(_read_for_experts, dynamic=None),
            compile_part(_sum_over_experts, dynamic=None),
            compile_part(_sum_over_ranks, dynamic=False),
        )
        for shared in self.shared:
            shared.forward = compile_part(shared.forward, dynamic=False)
        if self.can_compile_experts:
            self.local.forward = compile_part(self.local.forward, dynamic=True)

    def _compute(self, rows: RowExchange, choices: RowExchange, pairs: int) -> torch.Tensor:
        """Return the weighted sum of this rank's experts for each row that arrives [R, H]."""
        choices_RC = choices.wait()
        received = len(choices_RC)
        # A rank without rows computes two rows of zeros and drops them: every rank must take part in the backward exchange, and
        # in the collectives that gather and reduce every parameter. torch.compile would make other code for a single row.
        fill = 2 if received < 2 else 0
        if fill:
            choices_RC = torch.cat([choices_RC, self._choices_of_zeros(choices_RC, fill)])
            pairs += fill * (choices_RC.shape[1] // 2)
        pairs_of_rows = self.parts.sort_by_expert(choices_RC, pairs, self.first_expert, self.local_experts)
        rows_RH = rows.wait()
        if fill:
            rows_RH = torch.cat([rows_RH, rows_RH.new_zeros(fill, rows_RH.shape[1])])
        rows_PH = self.parts.read_for_experts(rows_RH, pairs_of_rows)
        outputs_PH = self.local(rows_PH, pairs_of_rows.expert_P[:, None], rows_PH.new_ones(pairs, 1))
        return self.parts.sum_over_experts(outputs_PH, pairs_of_rows)[:received]

    def _choices_of_zeros(self, choices_RC: torch.Tensor, rows: int) -> torch.Tensor:
        """Return choices for rows of zeros: this rank's first expert, with the weight 0."""
        weights = choices_RC.new_zeros(rows, choices_RC.shape[1] // 2)
        return torch.cat([weights, weights + self.first_expert], 1)


class _ExchangedCounts:
    """Numbers of rows and pairs that each rank sends to each other. The CPU waits for the GPU once in a layer: for them.

    The GPU has nothing to do while it waits for the CPU. So `wait` waits for the copy of the counts alone, and what the GPU is
    given after them keeps it busy.
    """

    def __init__(self, counts_R2: torch.Tensor, group: dist.ProcessGroup | None) -> None:
        received_R2 = torch.empty_like(counts_R2)
        dist.all_to_all_single(received_R2, counts_R2, group=group)
        self._both = torch.stack([counts_R2, received_R2]).to("cpu", non_blocking=True)
        self._is_copied = torch.cuda.Event() if counts_R2.is_cuda else None
        if self._is_copied:
            self._is_copied.record()

    def wait(self) -> tuple[list[int], list[int], int]:
        """Return the number of rows for each rank, that from each rank, and that of the pairs in the latter."""
        if self._is_copied:
            self._is_copied.synchronize()
        (sent, _), (received, pairs) = self._both.transpose(1, 2).tolist()
        return sent, received, sum(pairs)


class PairsOfRows(NamedTuple):
    """The experts of this rank that the received rows chose.

    places:     of the pairs among the choices of the rows
    weights_RK: of all choices
    expert_P:   this rank's number of the expert of each pair
    """

    places: Places
    weights_RK: torch.Tensor
    expert_P: torch.Tensor


def _sort_by_rank(chosen_TK: torch.Tensor, local_experts: int, ranks: int) -> tuple[Places, torch.Tensor]:
    """Return the places of the rows for each rank [B], and the number of rows and pairs for each rank [ranks, 2]."""
    rank_TK, every_rank = chosen_TK // local_experts, torch.arange(ranks, device=chosen_TK.device)
    is_needed_TR = (rank_TK[..., None] == every_rank).any(1)
    needed_TM = torch.where(is_needed_TR, every_rank, ranks)
    if ranks > chosen_TK.shape[1]:
        needed_TM = needed_TM.sort(1).values[:, : chosen_TK.shape[1]]
    counts_R2 = torch.stack([is_needed_TR.sum(0), count_choices(rank_TK, ranks)], 1)
    return sort_some_by_choice(needed_TM, ranks), counts_R2


def _make_rows(
    hidden_TH: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor, places: Places
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of tokens [B, H] and their choices [B, C]."""
    dtype = summing_dtype(weights_TK.dtype)  # fp32 holds the numbers of 16 million experts
    choices_TC = torch.cat([weights_TK.to(dtype), chosen_TK.to(dtype)], 1)
    return read_rows(hidden_TH, places), read_rows(choices_TC, places)


def _sort_by_expert(choices_RC: torch.Tensor, pairs: int, first_expert: int, local_experts: int) -> PairsOfRows:
    """Return the choices that are this rank's experts, sorted by expert. `pairs` is their number, P."""
    weights_RK, number_RK = choices_RC.chunk(2, dim=1)
    expert_RK = number_RK.detach().long() - first_expert
    is_local_RK = (expert_RK >= 0) & (expert_RK < local_experts)
    expert_RK = torch.where(is_local_RK, expert_RK, local_experts)
    order_S, place_RK, has_rests = sort_some_by_choice(expert_RK, local_experts)
    order_P = order_S[:pairs]
    return PairsOfRows(Places(order_P, place_RK, has_rests), weights_RK, expert_RK.flatten()[order_P])


def _read_for_experts(rows_RH: torch.Tensor, pairs: PairsOfRows) -> torch.Tensor:
    """Return the row of each pair [P, H]."""
    if torch.compiler.is_compiling():
        return read_rows(rows_RH, pairs.places)
    return read_few_rows(rows_RH, pairs.places.order_S // pairs.weights_RK.shape[1])


def _sum_over_experts(outputs_PH: torch.Tensor, pairs: PairsOfRows) -> torch.Tensor:
    """Return the weighted sum of the outputs for each row [R, H], in the precision of the outputs."""
    places, weights_RK, _ = pairs
    if torch.compiler.is_compiling():
        return sum_weighted_rows(outputs_PH, weights_RK, places).to(outputs_PH.dtype)
    # Most choices of a row are of other ranks. A compiler reads the outputs of the K choices in one kernel. Without one, they
    # would be a tensor [R, K, H].
    weighted_PH = outputs_PH * weights_RK.flatten()[places.order_S, None]
    row_P = places.order_S // weights_RK.shape[1]
    return sum_few_rows(weighted_PH, row_P, len(weights_RK)).to(outputs_PH.dtype)


def _sum_over_ranks(sums_BH: torch.Tensor, places: Places, *of_shared: torch.Tensor) -> torch.Tensor:
    """Return the sum of each token's rows, and of what shared experts computed [T, H]."""
    return sum(of_shared, start=sum_rows(sums_BH, places))


class Parts(NamedTuple):
    """The functions that compute before, between and after the exchanges. `compile_parts` compiles them."""

    sort_by_rank: Callable[..., tuple[Places, torch.Tensor]] = _sort_by_rank
    make_rows: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _make_rows
    sort_by_expert: Callable[..., PairsOfRows] = _sort_by_expert
    read_for_experts: Callable[..., torch.Tensor] = _read_for_experts
    sum_over_experts: Callable[..., torch.Tensor] = _sum_over_experts
    sum_over_ranks: Callable[..., torch.Tensor] = _sum_over_ranks
