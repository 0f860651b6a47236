"""The checkpoints of one weights folder: found, verified, loaded, saved. Each is either complete or does not exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longhaul.artifacts.artifact_schemas import Count, SavedCheckpoint
from longhaul.artifacts.atomic_files import write_json
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.errors import UserError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint import checkpoint_folders as folders
from longhaul.train.checkpoint.load_checkpoint import check_belongs_to, load_checkpoint
from longhaul.train.checkpoint.retention import last_and_best, validation_loss_of
from longhaul.train.checkpoint.save_checkpoint import CheckpointSave
from longhaul.train.checkpoint.saved_layout import Layout, describe_layout, planned_layout
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.monitoring.events import EventWriter


class CheckpointManager:
    """Finds, loads and saves the checkpoints of one weights folder; every method runs on all ranks."""

    def __init__(self, folder: Path, job: TrainSpec, context: DistributedContext, events: EventWriter) -> None:
        self.folder, self._job, self._context, self._events = folder, job, context, events

    def is_finished(self) -> bool:
        """Return whether the checkpoint of the last planned step exists and is undamaged."""
        newest = self._newest_undamaged()
        return newest is not None and newest[0] == self._job.steps

    def has_any(self) -> bool:
        """Return whether there is a complete checkpoint to resume from."""
        return bool(self._complete())

    def longest_save_s(self) -> float:
        """Return the duration of the longest save of all attempts so far; 0 when there was none."""
        return self._context.broadcast(self._events.largest("saved", "saving_s") if self._context.is_main else 0.0)

    def resume(self, engine: Any, is_needed: bool = False) -> TrainingState:
        """Load the newest undamaged checkpoint into the engine; return a new state when there is none.

        Raises:
            UserError: the checkpoint belongs to other weights, a batch is to be skipped on which the stage has trained, or there
                is no checkpoint although `is_needed`.
        """
        newest = self._newest_undamaged()
        state = self._load(engine, *newest) if newest else TrainingState()
        if newest is None and is_needed:
            raise UserError(f"{self.folder} has no undamaged checkpoint to roll back to", "run the same command again")
        skipped = self._context.broadcast(self._recorded_skipped() if self._context.is_main else [])
        state.skip({*skipped, *self._job.stage.skip_batches})
        return state

    def record_skipped(self, skipped: list[int]) -> None:
        """Persist the list of skipped batches at once: an attempt that ends now must not lose it."""
        if self._context.is_main:
            write_json(WeightsFolder(self.folder).skipped_batches, skipped)
        self._context.barrier()

    def needs_reference_values(self, step: int, validation_loss: float | None) -> bool:
        """Return whether the save at `step` may be exported: the last one always, a new best one where `best` is exported."""
        if step == self._job.steps:
            return True
        losses = self._validation_losses()
        return (
            "best" in self._job.exported_checkpoints
            and validation_loss is not None
            and all(validation_loss < loss for loss in losses)
        )

    @contextmanager
    def saving(
        self, engine: Any, state: TrainingState, validation_loss: float | None, has_reference_values: bool
    ) -> Iterator[Path]:
        """Save engine and state; what the block adds to the folder on rank 0 is part of the checkpoint.

        Raises:
            DiskFull: the disk is full. The unfinished save is removed; earlier checkpoints stay.
        """
        save = CheckpointSave(self.folder, state.step, self._job, self._context, self._events)
        with save.write(engine, state) as partial:
            yield partial
        save.finish(
            {"step": state.step, "validation_loss": validation_loss, "has_reference_values": has_reference_values}
        )

    def last_and_best(self) -> dict[str, SavedCheckpoint]:
        """Return the entries of checkpoint.json for the last and the best checkpoint."""
        return last_and_best(self.folder)

    def _load(self, engine: Any, step: int, folder: Path) -> TrainingState:
        check_belongs_to(self.folder, folder)
        state, saved_layout = load_checkpoint(engine, self._job, folder, self._context)
        self._record_resume(step, saved_layout)
        return state

    def _record_resume(self, step: int, saved: Layout) -> None:
        planned = planned_layout(self._job)
        if self._context.is_main:
            same = saved == planned
            resharded = (
                "" if same else f", saved with {describe_layout(saved)}; this job has {describe_layout(planned)}"
            )
            print(f"resumed from step {step}{resharded}", flush=True)
        self._events.write("resumed", step=step, layout=planned, saved_layout=saved)

    def _recorded_skipped(self) -> list[int]:
        """Read the skipped batches; on rank 0 alone, which also writes them while others may still load."""
        path = WeightsFolder(self.folder).skipped_batches
        hint = "write the skipped batches again, such as [12, 40]; those with the event bad_step in events.jsonl"
        return read_typed_json(path, list[Count], hint) if path.exists() else []

    def _validation_losses(self) -> list[float]:
        losses = [validation_loss_of(folder) for folder in self._complete().values()]
        return [loss for loss in losses if loss is not None]

    def _complete(self) -> dict[int, Path]:
        return self._context.broadcast(folders.complete_checkpoints(self.folder) if self._context.is_main else {})

    def _newest_undamaged(self) -> tuple[int, Path] | None:
        """Return step and folder of the newest checkpoint whose files have their sizes and hashes; rename newer damaged ones."""
        if self._context.is_main:
            folders.clear_leftovers(self.folder)
            for folder in folders.step_folders(self.folder).values():
                if reason := folders.wrong_sizes(folder):
                    self._set_aside(folder, reason)
        while checkpoints := self._complete():
            step = max(checkpoints)
            wrong = self._wrong_hashes(checkpoints[step])
            if not wrong:
                return step, checkpoints[step]
            if self._context.is_main:
                self._set_aside(checkpoints[step], wrong[0])
        return None

    def _set_aside(self, folder: Path, reason: str) -> None:
        folders.set_aside(folder, reason)
        self._events.write("checkpoint_damaged", checkpoint=folder.name, reason=reason)

    def _wrong_hashes(self, folder: Path) -> list[str]:
        """Return the problems that all ranks find; each reads an equal part of the files, whichever rank wrote them."""
        rank = self._context.rank
        files = sorted(folders.read_manifest(folder)["files"].items())[rank.rank :: rank.world_size]
        found = self._context.gather(list(folders.wrong_hashes(folder, files)))
        return [reason for part in found for reason in part]
