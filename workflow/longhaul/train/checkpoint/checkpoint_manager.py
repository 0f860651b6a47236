"""Decides which checkpoint to resume from (newest undamaged one), and when a save begins and ends; calls the other modules here.
A checkpoint is either complete or does not exist.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longhaul.artifacts.artifact_schemas import Count, SavedCheckpoint
from longhaul.artifacts.atomic_files import write_json
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.compat.deepspeed import Engine, call_before_update
from longhaul.errors import UserError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint import checkpoint_folders as folders
from longhaul.train.checkpoint.checkpoint_file_writer import WriterThreads
from longhaul.train.checkpoint.host_snapshot import HostMemory
from longhaul.train.checkpoint.load_checkpoint import check_belongs_to, load_checkpoint
from longhaul.train.checkpoint.rank_files import RankFiles
from longhaul.train.checkpoint.retention import last_and_best, validation_loss_of
from longhaul.train.checkpoint.save_checkpoint import CheckpointSave, collect_files
from longhaul.train.checkpoint.saved_layout import Layout, describe_layout, planned_layout
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.monitoring.events import EventWriter


class CheckpointManager:
    """Finds, loads and saves the checkpoints of one weights folder; every method runs on all ranks.

    One save is in flight at a time. Its files are written in the background; `after_step` or `finish_save` ends it.
    """

    def __init__(self, folder: Path, job: TrainSpec, context: DistributedContext, events: EventWriter) -> None:
        self.folder, self._job, self._context, self._events = folder, job, context, events
        self._threads = WriterThreads()
        self._memory = HostMemory(context.device) if job.asynchronous_saves else None
        self._has_reserved = self._delays_updates = False
        self._save: CheckpointSave | None = None
        self._spent_s: dict[str, float] = {}
        self.longest_save_s = 0.0

    def close(self) -> None:
        """End the threads. A save that is still in flight stays unfinished: an error ended the training."""
        self._threads.stop()

    def is_finished(self) -> bool:
        """Return whether the checkpoint of the last planned step exists and is undamaged."""
        newest = self._newest_undamaged()
        return newest is not None and newest[0] == self._job.steps

    def has_any(self) -> bool:
        """Return whether there is a complete checkpoint to resume from."""
        return bool(self._complete())

    def read_longest_save(self) -> None:
        """Read the duration of the longest save of all attempts so far into `longest_save_s`."""
        own = self._events.largest("saved", "durable_s") if self._context.is_main else 0.0
        self.longest_save_s = self._context.broadcast(own)

    @property
    def is_saving(self) -> bool:
        """Whether a save is not yet finished."""
        return self._save is not None

    def resume(self, engine: Engine, is_needed: bool = False) -> TrainingState:
        """Load the newest undamaged checkpoint into the engine; return a new state when there is none.

        Raises:
            UserError: the checkpoint belongs to other weights, a batch is to be skipped on which the stage has trained, or there
                is no checkpoint although `is_needed`.
        """
        self.finish_save()
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

    def after_step(self, engine: Engine) -> None:
        """Take the save in flight one step further. The first call begins to reserve memory for the copies of a save.

        Raises:
            DiskFull: as `start_writing`
        """
        if self._memory and not self._has_reserved:
            self._has_reserved = True
            self._reserve(engine, self._memory)
        self._advance()

    def _reserve(self, engine: Engine, memory: HostMemory) -> None:
        """Begin to reserve what a save needs. Only after the first step all optimizer states exist."""
        self.finish_save()
        measured = RankFiles(self._threads, memory)
        folder = folders.partial_folder(folders.step_folder(self.folder, self._job.steps))  # nothing is written to it
        collect_files(engine, folder, measured, self._context.rank.rank)
        memory.reserve(measured.snapshot_bytes)

    @contextmanager
    def saving(
        self, engine: Engine, state: TrainingState, validation_loss: float | None, has_reference_values: bool
    ) -> Iterator[Path]:
        """Copy engine and state for a save; what the block adds to the folder on rank 0 is part of the checkpoint.

        `start_writing` follows. No other save may be in flight.
        """
        manifest = {
            "step": state.step,
            "validation_loss": validation_loss,
            "has_reference_values": has_reference_values,
        }
        if self._memory and self._memory.is_copied_later and not self._delays_updates:
            self._delays_updates = True
            call_before_update(engine, self._memory.delay_stream)
        save = CheckpointSave(
            self.folder, manifest, self._job, self._context, self._events, self._threads, self._memory
        )
        with save.snapshot(engine, state) as partial:
            yield partial
        self._save = save

    def start_writing(self, spent_s: dict[str, float], copied_at: float) -> None:
        """Begin to write the save in the background; wait for it where saves are synchronous.

        spent_s:   how the time since the last save was spent, for the `saved` event
        copied_at: the value of time.perf_counter() at which `spent_s` ends

        Raises:
            DiskFull: the disk is full. The unfinished save is removed; earlier checkpoints stay.
        """
        self._spent_s = spent_s
        if self._save:
            self._save.start()
        if self._memory is None:
            self._finish_save(copied_at)

    def _advance(self, waiting_since: float | None = None) -> None:
        """Take the save in flight one step further, if its threads are done on all ranks.

        waiting_since: the value of time.perf_counter() since which training waits for this save
        """
        save = self._save
        if save is None:
            return
        self._save = None  # an error ends the save
        if not save.advance():
            self._save = save
            return
        self.longest_save_s = max(self.longest_save_s, save.durable_s)
        waited_s = self._spent_s["saving_s"] + (time.perf_counter() - waiting_since if waiting_since else 0.0)
        spent_s = {**self._spent_s, "saving_s": waited_s, "durable_s": save.durable_s}
        self._events.write("saved", step=save.step, **{key: round(seconds, 3) for key, seconds in spent_s.items()})
        if self._context.is_main:
            times = f"on the disk after {save.durable_s:.2f} s; training waited {waited_s:.2f} s"
            print(f"saved step {save.step}: {times}", flush=True)

    def finish_save(self) -> None:
        """Wait until the save in flight is complete: before the next one, before a load, and before the training ends.

        Raises:
            DiskFull: as `start_writing`
        """
        self._finish_save(time.perf_counter())

    def _finish_save(self, waiting_since: float) -> None:
        while self._save:
            self._save.wait()
            self._advance(waiting_since)

    def last_and_best(self) -> dict[str, SavedCheckpoint]:
        """Return the entries of checkpoint.json for the last and the best checkpoint."""
        return last_and_best(self.folder)

    def _load(self, engine: Engine, step: int, folder: Path) -> TrainingState:
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
            reasons = {folder: folders.wrong_sizes(folder) for folder in folders.step_folders(self.folder).values()}
            for folder, reason in reasons.items():  # none is renamed if one is of another release
                if reason:
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
