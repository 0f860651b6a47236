"""Faults of a trainer's last rank: wrong losses of chosen batches, slow and failing writes. The package has no code for them."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

import torch

from longhaul.train import step_backends as backend
from longhaul.train.batches import Batch
from longhaul.train.checkpoint.checkpoint_file_writer import HashedFile
from longhaul.train.trainer import Trainer

STEP, LOSSES = Trainer.step, (backend.loss_sum, backend.head_loss_sum)
CLOSE = HashedFile.close


def poison_batches(factors: dict[int, float], before_step: Callable[[Trainer], None] = lambda trainer: None) -> None:
    """Multiply the loss of these global batches by their factors, and call `before_step` before each step."""
    current: list[int] = [-1]

    def step(trainer: Trainer, batch: Batch) -> bool:
        before_step(trainer)
        current[0] = batch.number
        is_good = STEP(trainer, batch)
        current[0] = -1
        return is_good

    def poisoned(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned_loss(*arguments) -> torch.Tensor:
            dims = arguments[-1]
            is_last_rank = dims.rank == dims.world_size - 1
            return loss(*arguments) * (factors.get(current[0], 1.0) if is_last_rank else 1.0)

        return poisoned_loss

    Trainer.step = step  # pyright: ignore[reportAttributeAccessIssue]
    backend.loss_sum, backend.head_loss_sum = (poisoned(loss) for loss in LOSSES)


def disturb_writes(seconds: float = 0.0, failing_folder: str | None = None) -> None:
    """Let each file of a save take `seconds` longer; the last rank's files below `failing_folder` cannot be written at all."""
    is_last_rank = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def close(file: HashedFile) -> None:
        time.sleep(seconds)
        if is_last_rank and failing_folder and failing_folder in str(file.path):
            file.error = OSError(errno.EIO, "Input/output error", str(file.path))
        CLOSE(file)

    HashedFile.close = close  # pyright: ignore[reportAttributeAccessIssue]
