"""Computes the validation loss: chooses the held-out samples, always the same, and takes the mean over their loss tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from longhaul.data.sampling.sample_format import IGNORED_LABEL
from longhaul.data.sampling.samples import Samples
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.batches import MicroBatch, collate
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.step_backends import Backend


def validation_loss(backend: Backend, samples: Samples, job: TrainSpec, context: DistributedContext) -> float | None:
    """Return the mean token loss of the held-out samples, None if they have no loss token; every rank calls this."""
    total, tokens = 0.0, 0.0
    for micro in _validation_batches(samples, job, context):
        total += backend.evaluate(micro)
        tokens += micro.loss_tokens
    summed, count = context.sum(total), sums_over_samples([tokens], context).item()
    return summed / count if count else None


def sums_over_samples(values: Sequence[float], context: DistributedContext) -> torch.Tensor:
    """Return the sums of what every rank counted in its samples, in fp64; ranks with the same samples count once."""
    return context.sums_on_device([value if context.dims.counts_samples else 0.0 for value in values])


def _validation_batches(samples: Samples, job: TrainSpec, context: DistributedContext) -> Iterator[MicroBatch]:
    """Yield this rank's micro batches of the first `validation.max_samples` samples.

    All ranks yield equally many, as ZeRO 3 gathers weights in each forward pass. Samples past the last one have no loss tokens.
    """
    count = min(len(samples), job.stage.validation.max_samples)
    micro = job.stage.micro_batch_size
    for first in range(0, count, micro * job.data_parallel):
        own_ids = np.arange(micro) + first + context.dims.sample_rank * micro
        batch = collate(samples, np.minimum(own_ids, count - 1))
        batch.labels[torch.from_numpy(own_ids >= count)] = IGNORED_LABEL
        yield batch
