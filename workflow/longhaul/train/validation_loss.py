"""Computes the validation loss: mean over the loss tokens of the same held-out samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longhaul.data.sampling.samples import Samples
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.batches import validation_batches
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.step_backends import Backend


def validation_loss(backend: Backend, samples: Samples, job: TrainSpec, context: DistributedContext) -> float | None:
    """Return the mean token loss of the held-out samples, None if they have no loss token; every rank calls this."""
    total, tokens = 0.0, 0.0
    for micro in validation_batches(samples, job, context):
        total += backend.evaluate(micro)
        tokens += micro.loss_tokens
    summed, count = context.sum(total), sums_over_samples([tokens], context).item()
    return summed / count if count else None


def sums_over_samples(values: Sequence[float], context: DistributedContext) -> torch.Tensor:
    """Return the sums of what every rank counted in its samples, in fp64; ranks with the same samples count once."""
    return context.sums_on_device([value if context.dims.counts_samples else 0.0 for value in values])
