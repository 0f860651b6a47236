"""Saving of one checkpoint: all its files, then the manifest, then the folder's final name.

A checkpoint holds DeepSpeed's files, trainer-rank-*.pt, training_state.json, the slice index where the model is sliced,
reference/ where it may be exported, and manifest.json.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longhaul.artifacts.atomic_files import file_sha256, write_json
from longhaul.artifacts.shared_file_system import refresh_listing
from longhaul.compat.deepspeed import mapped_optimizer_states, save_without_recovery_script
from longhaul.errors import DiskFull, UserError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.checkpoint_folders import MANIFEST, fsync, partial_folder, publish, step_folder
from longhaul.train.checkpoint.hashed_writer import HashingCheckpointEngine
from longhaul.train.checkpoint.load_checkpoint import TRAINING_STATE
from longhaul.train.checkpoint.rank_state import rank_state, rank_state_file
from longhaul.train.checkpoint.retention import remove_old_checkpoints
from longhaul.train.checkpoint.saved_layout import planned_layout
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.monitoring.events import EventWriter
from longhaul.train.parallel.slice_index import has_tied_embeddings, write_slice_index


class CheckpointSave:
    """One save of one step, on all ranks. Only `write`, then `finish`."""

    def __init__(
        self, weights: Path, step: int, job: TrainSpec, context: DistributedContext, events: EventWriter
    ) -> None:
        self._weights, self._job, self._context, self._events = weights, job, context, events
        self._folder = step_folder(weights, step)
        self._partial = partial_folder(self._folder)
        self._writer = HashingCheckpointEngine()
        self._slice_files: list[Path] = []

    @contextmanager
    def write(self, engine: Any, state: TrainingState) -> Iterator[Path]:
        """Write engine and state. What the block adds to the yielded folder on rank 0 becomes part of the checkpoint.

        An error of the file system is kept for `finish`, so that all ranks leave the save together.
        """
        with self._writer.collect_errors():
            self._create_partial_folder()
        self._context.barrier()
        refresh_listing(self._partial.parent)  # else a node may write into an earlier save of this step
        with mapped_optimizer_states(engine):
            _save_engine(engine, self._partial, self._writer)
            path = rank_state_file(self._partial, self._context.rank.rank)
            self._writer.save(rank_state(engine), path)
            with self._writer.collect_errors():
                self._write_state_and_slices(engine, state)
            with self._writer.collect_errors():
                yield self._partial

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, rename the folder and remove old checkpoints; remove the save if a rank could not write its files.

        Raises:
            DiskFull: the disk is full or a quota is exhausted; earlier checkpoints stay.
            UserError: another error of the file system.
        """
        files = self._manifest_files()
        has_failed = any(self._context.gather(self._writer.failure()))
        if self._context.is_main and not has_failed:
            with self._writer.collect_errors():
                manifest = {**manifest, "weights": self._weights.name, **planned_layout(self._job), "files": files}
                write_json(self._partial / MANIFEST, manifest)
                fsync(self._partial / MANIFEST)
                publish(self._folder)
                remove_old_checkpoints(self._weights, self._job)
        if failures := [failure for failure in self._context.gather(self._writer.failure()) if failure]:
            self._abandon(failures, sum(self._context.gather(self._writer.bytes)))

    def _create_partial_folder(self) -> None:
        if self._context.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

    def _write_state_and_slices(self, engine: Any, state: TrainingState) -> None:
        dims = self._context.dims
        if dims.is_sliced:
            is_tied = has_tied_embeddings(self._job)
            self._slice_files = write_slice_index(engine, dims, self._partial, is_tied, self._context.gather)
        if self._context.is_main:
            write_json(self._partial / TRAINING_STATE, asdict(state))

    def _manifest_files(self) -> dict[str, dict[str, Any]]:
        """Return name -> size and hash of every file: those that each rank wrote, and what else rank 0 finds in the folder."""
        own = {self._name(file.path): file.manifest_entry() for file in self._writer.files}
        with self._writer.collect_errors():
            own |= {self._name(path): _manifest_entry(path) for path in self._slice_files}
        entries = {name: entry for part in self._context.gather(own) for name, entry in part.items()}
        if self._context.is_main:
            with self._writer.collect_errors():
                for path in self._partial.rglob("*"):
                    if path.is_file() and self._name(path) not in entries:
                        entries[self._name(path)] = _manifest_entry(path)
        return dict(sorted(entries.items()))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._partial))

    def _abandon(self, failures: list[tuple[bool, str]], needed_bytes: int) -> None:
        """Remove the save and raise its error on all ranks; a full disk comes first."""
        if self._context.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._context.barrier()
        is_full, text = max(failures)
        self._events.write("save_failed", checkpoint=self._partial.name, reason=text, needed_bytes=needed_bytes)
        parent = self._partial.parent
        if is_full:
            raise DiskFull("a checkpoint", parent, needed_bytes, shutil.disk_usage(parent).free)
        raise UserError(
            f"{self._partial} could not be saved: {text}", "check the file system; earlier checkpoints are unchanged"
        )


def _save_engine(engine: Any, folder: Path, writer: HashingCheckpointEngine) -> None:
    """Run DeepSpeed's own save; all files go through `writer`."""
    save_without_recovery_script(engine)
    usual, engine.checkpoint_engine = engine.checkpoint_engine, writer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    order = [names.get(id(p), "") for group in engine.optimizer.param_groups for p in group["params"]]
    # At ZeRO 0 the optimizer's file identifies the states only by their position.
    client_state = {} if engine.zero_optimization_stage() else {"optimizer_parameters": order}
    try:
        engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state=client_state, save_latest=False)
    finally:
        engine.checkpoint_engine = usual


def _manifest_entry(path: Path) -> dict[str, Any]:
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
