"""Saves one checkpoint: order of snapshot, files, manifest and final name, and which files it holds.

A checkpoint holds DeepSpeed's files, trainer-rank-*.pt, training_state.json, the slice index where the model is sliced,
reference/ where it may be exported, and manifest.json. Which thread does what: docs/decisions/047-asynchronous-checkpoints.md.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longhaul.artifacts.atomic_files import file_blake3, write_json
from longhaul.artifacts.shared_file_system import refresh_listing
from longhaul.compat.deepspeed import Engine, save_without_recovery_script
from longhaul.compat.deepspeed_optimizer_states import mapped_optimizer_states
from longhaul.errors import DiskFull, UserError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.checkpoint_file_writer import WriterThreads
from longhaul.train.checkpoint.checkpoint_folders import (
    MANIFEST,
    SCHEMA_VERSION,
    fsync,
    partial_folder,
    publish,
    step_folder,
)
from longhaul.train.checkpoint.extra_rank_state import rank_state, rank_state_file
from longhaul.train.checkpoint.host_snapshot import HostMemory
from longhaul.train.checkpoint.load_checkpoint import TRAINING_STATE
from longhaul.train.checkpoint.rank_files import RankFiles
from longhaul.train.checkpoint.retention import remove_old_checkpoints
from longhaul.train.checkpoint.saved_layout import planned_layout
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.delayed_sum import DelayedSum
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.monitoring.events import EventWriter
from longhaul.train.parallel.slice_index import has_tied_embeddings, write_slice_index

_WAIT_S = 0.05

Manifest = dict[str, Any]


class CheckpointSave:
    """One save of one step, on all ranks. `snapshot`, then `start`, then `advance` after each step until it returns True.

    Threads write the files and give the folder its name. Only `snapshot` and `advance` use collectives; they run on the thread
    that trains.
    """

    def __init__(
        self,
        weights: Path,
        manifest: Manifest,
        job: TrainSpec,
        context: DistributedContext,
        events: EventWriter,
        threads: WriterThreads,
        memory: HostMemory | None,
    ) -> None:
        """Prepare a save.

        manifest: what the manifest says in addition to files and layout; `step` is part of it
        memory:   None writes DeepSpeed's files inside `snapshot`
        """
        self.step = manifest["step"]
        self._weights, self._job, self._context, self._events = weights, job, context, events
        self._folder = step_folder(weights, self.step)
        self._partial = partial_folder(self._folder)
        self._threads = threads
        self._files = RankFiles(threads, memory)
        self._slice_files: list[Path] = []
        self._manifest = manifest
        self._own_entries: Manifest = {}
        self._background: Future[None] = Future()
        self._ranks_done = DelayedSum(context)
        self._is_publishing = False
        self._started, self._ended = time.perf_counter(), 0.0

    @contextmanager
    def snapshot(self, engine: Engine, state: TrainingState) -> Iterator[Path]:
        """Copy engine and state. What the block adds to the yielded folder on rank 0 becomes part of the checkpoint.

        An error of the file system is kept for `advance`, so that all ranks leave the save together.
        """
        with self._files.collect_errors():
            self._create_partial_folder()
        self._context.barrier()
        refresh_listing(self._partial.parent)  # else a node may write into an earlier save of this step
        with mapped_optimizer_states(engine):
            collect_files(engine, self._partial, self._files, self._context.rank.rank)
            self._files.take_snapshot()
            with self._files.collect_errors():
                self._write_state_and_slices(engine, state)
            with self._files.collect_errors():
                yield self._partial

    def start(self) -> None:
        """Begin to write the files in the background."""
        self._background = self._threads.save.submit(self._write_files)

    def wait(self) -> None:
        """Wait a moment for this rank's threads; the caller then calls `advance`, in which no rank waits for another."""
        wait_for_futures([self._background], _WAIT_S)

    def advance(self) -> bool:
        """Return True once the checkpoint has its name. Every rank calls this; it takes the steps that all ranks must agree on.

        On GPUs the ranks' threads count as done one call later, so that no CPU waits for the step that runs.

        Raises:
            DiskFull: the disk is full or a quota is exhausted. The unfinished save is removed; earlier checkpoints stay.
            UserError: another error of the file system.
        """
        is_done = self._background.done()
        if is_done:
            self._background.result()
        if self._ranks_done.next(is_done) < self._context.rank.world_size:
            return False
        self._ranks_done = DelayedSum(self._context)  # what the ranks gave so far says nothing about the publishing
        if failures := [failure for failure in self._context.gather(self._files.failure()) if failure]:
            self._abandon(failures, sum(self._context.gather(self._files.bytes)))
        if self._is_publishing:
            return True
        entries = {name: entry for part in self._context.gather(self._own_entries) for name, entry in part.items()}
        self._is_publishing = True
        if self._context.is_main:
            self._background = self._threads.save.submit(self._publish, entries)
        return False

    @property
    def durable_s(self) -> float:
        """Seconds from the begin of the snapshot until the checkpoint had its name; on rank 0 alone."""
        return self._ended - self._started

    def _write_files(self) -> None:
        """Write this rank's files and hash them."""
        self._files.write()
        own = {self._name(file.path): file.manifest_entry() for file in self._files.files}
        with self._files.collect_errors():
            own |= {self._name(path): _manifest_entry(path) for path in self._slice_files}
        self._own_entries = own

    def _publish(self, entries: Manifest) -> None:
        """Write the manifest, rename the folder and remove old checkpoints; on rank 0.

        entries: name -> size and hash of the files that the ranks wrote; what else is in the folder is added.
        """
        with self._files.collect_errors():
            for path in self._partial.rglob("*"):
                if path.is_file() and self._name(path) not in entries:
                    entries[self._name(path)] = _manifest_entry(path)
            layout = planned_layout(self._job)
            manifest = {
                "schema_version": SCHEMA_VERSION,
                **self._manifest,
                "weights": self._weights.name,
                **layout,
                "files": dict(sorted(entries.items())),
            }
            write_json(self._partial / MANIFEST, manifest)
            fsync(self._partial / MANIFEST)
            publish(self._folder)
            self._ended = time.perf_counter()
            remove_old_checkpoints(self._weights, self._job)

    def _create_partial_folder(self) -> None:
        if self._context.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

    def _write_state_and_slices(self, engine: Engine, state: TrainingState) -> None:
        dims = self._context.dims
        if dims.is_sliced:
            is_tied = has_tied_embeddings(self._job)
            self._slice_files = write_slice_index(engine, dims, self._partial, is_tied, self._context.gather)
        if self._context.is_main:
            write_json(self._partial / TRAINING_STATE, asdict(state))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._partial))

    def _abandon(self, failures: list[tuple[bool, str]], needed_bytes: int) -> None:
        """Remove the save and raise its error on all ranks: a full disk, else that of the first rank, which makes the folder."""
        if self._context.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._context.barrier()
        is_full, text = next((failure for failure in failures if failure[0]), failures[0])
        self._events.write("save_failed", checkpoint=self._partial.name, reason=text, needed_bytes=needed_bytes)
        parent = self._partial.parent
        if is_full:
            raise DiskFull("a checkpoint", parent, needed_bytes, shutil.disk_usage(parent).free)
        raise UserError(
            f"{self._partial} could not be saved: {text}",
            "let this user write there (permissions, ulimit -f), then run the same command again; earlier checkpoints stay",
        )


def collect_files(engine: Engine, folder: Path, files: RankFiles, rank: int) -> None:
    """Give `files` everything that this rank saves of the engine. Every rank calls this."""
    _save_engine(engine, folder, files)
    files.save(rank_state(engine), rank_state_file(folder, rank))


def _save_engine(engine: Engine, folder: Path, writer: RankFiles) -> None:
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


def _manifest_entry(path: Path) -> dict[str, object]:
    fsync(path)
    return {"bytes": path.stat().st_size, "blake3": file_blake3(path)}
