"""Applies bad_steps.policy after a bad step: stop, skip the batch, or roll back; counts bad steps in a row."""

from __future__ import annotations

from longhaul.compat.deepspeed import Engine
from longhaul.errors import InputError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.batches import Batch
from longhaul.train.checkpoint.checkpoint_manager import CheckpointManager
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.monitoring.events import EventWriter
from longhaul.train.monitoring.metrics import Metrics


class TrainingFailure(InputError):
    """Training cannot continue, although the config is valid. Names the step, the samples and what to try."""

    exit_code = 1


class BadStepPolicy:
    """Applies `bad_steps.policy` of the stage, and counts bad steps in a row."""

    def __init__(
        self,
        job: TrainSpec,
        engine: Engine,
        state: TrainingState,
        checkpoints: CheckpointManager,
        metrics: Metrics,
        events: EventWriter,
    ) -> None:
        self._job, self._settings, self._engine, self._state = job, job.stage.bad_steps, engine, state
        self._checkpoints, self._metrics, self._events = checkpoints, metrics, events
        self._in_a_row = 0

    @property
    def needs_first_checkpoint(self) -> bool:
        """Return whether a bad step returns to a checkpoint, so that there must be one before the first step."""
        return self._settings.policy == "roll_back"

    def note_good_step(self) -> None:
        """End a row of skipped batches. After a roll-back only a save ends the row, as good steps were repeated."""
        if self._settings.policy == "skip":
            self._in_a_row = 0

    def note_save(self) -> None:
        """End a row of bad steps: what was saved is not repeated."""
        self._in_a_row = 0

    def apply(self, batch: Batch, reason: str, seconds: float) -> None:
        """Skip the batch or roll back, and persist the list of skipped batches.

        Raises:
            TrainingFailure: the policy is `stop`, or there were more bad steps in a row than `bad_steps.limit`.
        """
        self._checkpoints.finish_save()  # the training may end here
        step = self._state.step + 1
        self._in_a_row += 1
        self._events.write(
            "bad_step",
            step=step,
            batch=batch.number,
            reason=reason,
            policy=self._settings.policy,
            seconds=round(seconds, 3),
        )
        if self._settings.policy == "stop" or self._in_a_row > self._settings.limit:
            raise self._failure(step, batch, reason)
        if self._settings.policy == "roll_back":
            self._roll_back(batch.number)
        else:
            self._state.skip({batch.number})
            self._metrics.print(f"step {step}: {reason}; batch {batch.number} is skipped")
        self._checkpoints.record_skipped(self._state.skipped)

    def _failure(self, step: int, batch: Batch, reason: str) -> TrainingFailure:
        return TrainingFailure(
            f"step {step}: {reason}; bad_steps.policy is {self._settings.policy}, bad_steps.limit is {self._settings.limit}. "
            f"Batch {batch.number}, samples {batch.ids[:8].tolist()}…",
            "examine these samples, lower the learning rate, lengthen the warm-up, or choose another bad_steps.policy or "
            "limit; the next run resumes from the last checkpoint",
        )

    def _roll_back(self, bad_batch: int) -> None:
        """Load the last checkpoint, and skip the batches from there to the bad one, or only the last of them."""
        reached, window_batches = self._state.step, self._settings.window_batches
        self._state.replace_with(self._checkpoints.resume(self._engine, is_needed=True))
        since_checkpoint = range(self._state.next_batch, bad_batch + 1)
        window = since_checkpoint[-window_batches:] if window_batches else since_checkpoint
        self._state.skip(set(window))
        self._metrics.roll_back(self._state.step)
        batches = f"batches {window[0]} to {window[-1]} are skipped"
        self._metrics.print(f"rolled back from step {reached} to step {self._state.step}; {batches}")
        self._events.write("rolled_back", from_step=reached, to_step=self._state.step, batches=[window[0], window[-1]])
