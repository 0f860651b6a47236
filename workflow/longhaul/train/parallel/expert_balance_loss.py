"""Adds the balance loss of experts per sequence to the router's gradient (sequence_aux_loss_coef, DeepSeek-V3).

For a sequence of T tokens, and E experts of which each token uses K: f_i is E / (K T) times the number of tokens for which
expert i is among the K largest scores, and P_i is the mean affinity of the tokens to it; the affinities of a token are its
scores, divided by their sum. Neither the bias that balances the load nor the limit on groups has a part in it: a token may use
other experts. The loss is coefficient x sum of f_i P_i, averaged over the sequences of the global batch and summed over layers.
A sequence is one row of a batch, which may hold several conversations; padding is no token of it.

The loss enters at the gradient of each router, so that it works on every pipeline rank. The reported loss is that of the
tokens only.

N tokens of a micro batch, B sequences, S their length, E experts, K experts for each token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.parallel.autograd_collectives import all_reduced, name_group
from longhaul.train.parallel.count_once_per_forward_pass import record_in_forward_pass
from longhaul.train.parallel.padding_tokens import TextTokens
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.sliced_parameters import decoder_layers

RouterOutput = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Results of transformers' routers: logits [N, E], weights [N, K] and numbers [N, K] of the chosen experts."""


class _AttachLoss(torch.autograd.Function):
    """Returns the tensor unchanged; the loss gets the gradient `slope`, as if slope x loss were added to the step's loss.

    The loss is added to `total`.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor, total: torch.Tensor, slope: float) -> torch.Tensor:
        ctx.slope = slope
        ctx.save_for_backward(loss)
        return record_in_forward_pass(tensor, loss, total)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0], torch.full_like(ctx.saved_tensors[0], ctx.slope), None, None


class SequenceBalanceLoss:
    """Adds the loss to every router of this rank's layers while the model trains; a coefficient of 0 disables it."""

    def __init__(self, model: Any, dims: ParallelDims, job: TrainSpec, device: torch.device) -> None:
        self._dims, self._ranks = dims, dims.parallel.sequence
        self._group = name_group(dims.group("sequence"))
        self._sequence_length = job.stage.sequence_length
        self._scale = job.stage.sequence_aux_loss_coef / job.stage.global_batch_size
        self._total = torch.zeros((), device=device)
        for layer in decoder_layers(model) if self._scale else ():
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate.register_forward_hook(partial(self._add_loss, TextTokens(layer, self._sequence_length)))

    def _add_loss(
        self, text: TextTokens, router: torch.nn.Module, _inputs: object, output: RouterOutput
    ) -> RouterOutput:
        if not router.training:
            return output
        logits_NE, weights_NK, chosen_NK = output
        scores_NE, is_text_N = _scores(router, logits_NE.float()), text.mask(len(logits_NE))
        loss = self._scale * self._sum_over_sequences(scores_NE, is_text_N, chosen_NK.shape[1])
        # DeepSpeed averages gradients over the data ranks, and each of them has other sequences.
        slope = float(self._dims.data)
        return logits_NE, _AttachLoss.apply(weights_NK, loss, self._total, slope), chosen_NK

    def _sum_over_sequences(self, scores_NE: torch.Tensor, is_text_N: torch.Tensor, used: int) -> torch.Tensor:
        """Return the sum of f_i P_i over this rank's sequences; under sequence parallelism, its tokens' part of the sum.

        used: K, the experts for each token
        """
        experts, local_length = scores_NE.shape[1], self._sequence_length // self._ranks
        is_text_N1 = is_text_N[:, None]
        visits_NE = F.one_hot(scores_NE.topk(used).indices, experts).sum(1) * is_text_N1
        affinities_NE = scores_NE / scores_NE.sum(-1, keepdim=True) * is_text_N1
        visits_BE = visits_NE.view(-1, local_length, experts).sum(1).float()
        tokens_B1 = is_text_N.view(-1, local_length).sum(1, keepdim=True).float()
        if self._ranks > 1:
            visits_BE, tokens_B1 = all_reduced(visits_BE, self._group), all_reduced(tokens_B1, self._group)
        tokens_B1 = tokens_B1.clamp(min=1)
        means_BE = affinities_NE.view(-1, local_length, experts).sum(1) / tokens_B1
        return (visits_BE * experts / (used * tokens_B1) * means_BE).sum()

    def pop_loss(self) -> torch.Tensor:
        """Return this rank's part of the step's balance loss, a scalar, and reset it to 0.

        Tensor ranks compute equal losses; all but the first return 0.
        """
        total = self._total.clone()
        self._total.zero_()
        return total if self._dims.tensor_rank == 0 else torch.zeros_like(total)


def _scores(router: torch.nn.Module, logits_NE: torch.Tensor) -> torch.Tensor:
    """Return each token's scores of the experts: sigmoids if the router has a correction bias (DeepSeek-V3), else the softmax."""
    return logits_NE.sigmoid() if hasattr(router, "e_score_correction_bias") else logits_NE.softmax(-1)
