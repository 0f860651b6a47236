"""Recognises a lack of GPU memory, of PyTorch, NCCL or cuBLAS; the job ends for good, and the error names smaller settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longhaul.errors import InputError, first_line
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.planning.memory_remedies import smaller_settings

_OF_OTHER_LIBRARIES = re.compile(
    r"(CUDA|HIP) (error|failure)[^\n]*out of memory|(CUBLAS|HIPBLAS)_STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""Errors of memory that PyTorch does not allocate: buffers of NCCL, workspaces of cuBLAS, CUDA's context."""


@contextmanager
def names_smaller_settings(job: TrainSpec) -> Iterator[None]:
    """Run a block.

    Raises:
        InputError: a GPU had too little memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or _OF_OTHER_LIBRARIES.search(str(error))):
            raise
        stage = job.stage
        raise InputError(
            f"stage {stage.name} on {stage.nodes} x {stage.gpus_per_node} GPUs: out of memory with micro_batch_size "
            f"{stage.micro_batch_size} and activation_checkpointing {stage.activation_checkpointing}: {_told_by(error)}",
            smaller_settings(stage),
        ) from error


def _told_by(error: RuntimeError) -> str:
    """Return the line that tells of the memory; NCCL's errors begin with the place in PyTorch's source."""
    return next((line for line in str(error).splitlines() if _OF_OTHER_LIBRARIES.search(line)), first_line(error))
