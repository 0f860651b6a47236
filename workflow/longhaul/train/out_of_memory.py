"""Turns a lack of GPU memory into an error that names the next smaller settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longhaul.errors import InputError, first_line
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.planning.memory_remedies import smaller_settings


@contextmanager
def names_smaller_settings(job: TrainSpec) -> Iterator[None]:
    """Run a block.

    Raises:
        InputError: a GPU had too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        stage = job.stage
        raise InputError(
            f"stage {stage.name} on {stage.nodes} x {stage.gpus_per_node} GPUs: out of memory with micro_batch_size "
            f"{stage.micro_batch_size} and activation_checkpointing {stage.activation_checkpointing}: {first_line(error)}",
            smaller_settings(stage),
        ) from error
