"""Has a trainer compute a wrong loss in named batches, on its last rank alone; the product's code knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from longhaul.train import backend, loop

STEP, LOSSES = loop.Trainer.step, (backend.loss_sum, backend.head_loss_sum)


def poison_batches(
    factors: dict[int, float], before_step: Callable[[loop.Trainer], None] = lambda trainer: None
) -> None:
    """Multiplies the loss of these global batches by their factors; `before_step` is called before each step."""
    at: list[int] = [-1]

    def step(trainer: loop.Trainer, batch: Any) -> bool:
        before_step(trainer)
        at[0] = batch.number
        found = STEP(trainer, batch)
        at[0] = -1
        return found

    def poisoned(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def found(*arguments: Any) -> torch.Tensor:
            dims = arguments[-1]
            return loss(*arguments) * (factors.get(at[0], 1.0) if dims.rank == dims.world_size - 1 else 1.0)

        return found

    loop.Trainer.step = step  # pyright: ignore[reportAttributeAccessIssue]
    backend.loss_sum, backend.head_loss_sum = (poisoned(loss) for loss in LOSSES)
