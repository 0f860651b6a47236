"""Fields of training_state.json: step, skipped batches, recent losses."""

from __future__ import annotations

from dataclasses import dataclass, field

from longhaul.data.sampling.samples import batch_of_step
from longhaul.errors import UserError


@dataclass
class TrainingState:
    """Progress of a stage.

    step:          optimizer steps done
    skipped:       global batches that are never trained on, sorted; with the step they determine the data order
    recent_losses: losses of the last steps, for finding spikes (detect_bad_steps.py)
    """

    step: int = 0
    skipped: list[int] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)

    @property
    def next_batch(self) -> int:
        """Return the number of the next step's global batch."""
        return batch_of_step(self.step, self.skipped)

    def add_loss(self, loss: float, kept: int) -> None:
        """Add the loss of a good step; the last `kept` ones stay."""
        self.recent_losses = [*self.recent_losses, loss][-kept:]

    def replace_with(self, other: TrainingState) -> None:
        """Take over the values of another state in this object, which several modules share."""
        self.step, self.skipped, self.recent_losses = other.step, list(other.skipped), list(other.recent_losses)

    def skip(self, batches: set[int]) -> None:
        """Add batches to the skipped ones; UserError when the stage has already trained on one of them."""
        new = batches - set(self.skipped)
        if trained := sorted(batch for batch in new if batch < self.next_batch):
            raise UserError(
                f"batch {trained[0]} cannot be skipped any more: the stage has done {self.step} steps, up to batch "
                f"{self.next_batch - 1}",
                "remove it from skip_batches, or set restart: true to train the stage from its start",
            )
        self.skipped = sorted({*self.skipped, *new})
