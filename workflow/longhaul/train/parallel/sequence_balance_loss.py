"""The balance loss of every sequence of a mixture of experts (DeepSeek-V3, arXiv:2412.19437, equations 17 to 20).

For a sequence of T tokens and E experts of which a token visits K: f_i is E / (K T) times the tokens that visit expert i, P_i
the mean of their affinity to it, which sums to 1 over experts. The loss is weight times the sum of f_i P_i, averaged over the
sequences of the global batch and summed over layers. It reaches the gradient at each router, so that it works in every
pipeline stage; the loss that is reported stays that of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from longhaul.jobs.specs import TrainSpec
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.tensor_slices import decoder_layers


class _WithLoss(torch.autograd.Function):
    """The same tensor; in the backward pass the loss gets the gradient `slope`, as if it had been added to the step's."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor, slope: float) -> torch.Tensor:
        ctx.slope = torch.full_like(loss, slope)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], ctx.slope, None


class SequenceBalance:
    """Adds the loss to every router of this rank's layers while the model trains; does nothing at weight 0."""

    def __init__(self, model: Any, dims: ParallelDims, job: TrainSpec) -> None:
        self._grid, self._weight = dims, job.stage.sequence_aux_loss_coef
        self._length = job.stage.sequence_length
        self._share = self._weight / job.stage.global_batch_size
        self._total: torch.Tensor | float = 0.0
        for layer in decoder_layers(model) if self._weight else ():
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate.register_forward_hook(self._add_loss)

    def _add_loss(self, router: Any, _inputs: Any, output: Any) -> Any:
        if not router.training:
            return output
        logits_NE, weights_NK, chosen_NK = output
        loss = self._share * self._sum_over_sequences(router, logits_NE, chosen_NK)
        if torch._C._current_graph_task_id() == -1:  # not a second time, when a backward pass recomputes it
            self._total = self._total + loss.detach()
        # DeepSpeed averages over the data ranks, each of which has its own sequences.
        return logits_NE, _WithLoss.apply(weights_NK, loss, float(self._grid.data)), chosen_NK

    def _sum_over_sequences(self, router: Any, logits_NE: torch.Tensor, chosen_NK: torch.Tensor) -> torch.Tensor:
        """Sum of f_i P_i of this rank's sequences, or of its tokens' part of them."""
        experts, own_length = logits_NE.shape[1], self._length // self._grid.parallel.sequence
        scores_NE = _affinities(router, logits_NE.float())
        means_BE = scores_NE.view(-1, own_length, experts).sum(1) / self._length
        visits_BE = F.one_hot(chosen_NK, experts).sum(1).view(-1, own_length, experts).sum(1).float()
        if self._grid.parallel.sequence > 1:
            dist.all_reduce(visits_BE, group=self._grid.group("sequence"))
        return (visits_BE * (experts / chosen_NK.shape[1] / self._length) * means_BE).sum()

    def take(self) -> float:
        """This rank's part of the step's loss, and back to zero; tensor ranks have the same, and the first counts it."""
        total, self._total = float(self._total), 0.0
        return total if self._grid.tensor_rank == 0 else 0.0


def _affinities(router: Any, logits_NE: torch.Tensor) -> torch.Tensor:
    """Of a token to each expert, summing to 1: normalised sigmoids where the router takes those (V3), else the softmax."""
    if not hasattr(router, "e_score_correction_bias"):
        return logits_NE.softmax(-1)
    scores_NE = logits_NE.sigmoid()
    return scores_NE / scores_NE.sum(-1, keepdim=True)
