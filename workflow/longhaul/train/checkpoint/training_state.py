"""What of a training is saved beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from longhaul.data.sampling.samples import batch_of_step
from longhaul.errors import UserError

SPIKE_WINDOW_STEPS = 64


@dataclass
class TrainingState:
    """Where a stage stands.

    step:          optimizer steps done
    skipped:       global batches that are never trained on, sorted; the data order follows from it and the step
    recent_losses: of the last steps, for finding spikes
    """

    step: int = 0
    skipped: list[int] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)

    @property
    def next_batch(self) -> int:
        """The global batch of the next step."""
        return batch_of_step(self.step, self.skipped)

    def finish_step(self, loss: float) -> None:
        """One more step is done."""
        self.step += 1
        self.recent_losses = [*self.recent_losses, loss][-SPIKE_WINDOW_STEPS:]

    def become(self, other: TrainingState) -> None:
        """Takes over another state; whoever holds this one sees it."""
        self.step, self.skipped, self.recent_losses = other.step, list(other.skipped), list(other.recent_losses)

    def leave_out(self, batches: set[int]) -> None:
        """Leaves batches out; UserError when one of them was trained on already."""
        new = batches - set(self.skipped)
        if done := sorted(batch for batch in new if batch < self.next_batch):
            raise UserError(
                f"batch {done[0]} cannot be skipped any more: the stage has done {self.step} steps, up to batch "
                f"{self.next_batch - 1}",
                "take it out of skip_batches, or set restart: true to train the stage anew",
            )
        self.skipped = sorted({*self.skipped, *new})
