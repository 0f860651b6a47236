"""Checkpoints that either are complete or do not exist, found, verified, loaded and thinned out; store.py has the folders.

A checkpoint holds DeepSpeed's files, trainer-rank-*.pt, state.json, proof/ where it is exportable, and manifest.json.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from longhaul.artifacts.files import file_sha256, read_json, write_json
from longhaul.artifacts.shared_file_system import look_again
from longhaul.errors import DiskFull, UserError
from longhaul.jobs.specs import TrainSpec
from longhaul.train.checkpoint import folders as store
from longhaul.train.checkpoint.folders import MANIFEST, complete_checkpoints, partial_folder, step_folder
from longhaul.train.checkpoint.hashed_writer import HashedFiles
from longhaul.train.checkpoint.offloaded_states import states_in_reach
from longhaul.train.checkpoint.resharding import load_other_layout, loss_scale_of, recount_steps, restore_loss_scale
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.monitoring.events import Events
from longhaul.train.parallel.checkpoint_layout import is_tied, load_engine, write_layout

_SKIPPED = "skipped.json"


class Checkpoints:
    """Saves, finds, loads and thins out the checkpoints of one weights folder; every method runs on all ranks."""

    def __init__(self, folder: Path, job: TrainSpec, processes: DistributedContext, events: Events) -> None:
        self.folder, self._job, self._processes, self._events = folder, job, processes, events

    def finished(self) -> bool:
        """Whether the last planned step is already there, and whole."""
        newest = self._newest_whole()
        return newest is not None and newest[0] == self._job.steps

    def longest_save_s(self) -> float:
        """What a save took at most, in any leg so far; 0 when there was none."""
        return self._processes.broadcast(self._events.longest("saved", "saving_s") if self._processes.is_main else 0.0)

    def _steps(self) -> dict[int, Path]:
        return self._processes.broadcast(complete_checkpoints(self.folder) if self._processes.is_main else {})

    def _newest_whole(self) -> tuple[int, Path] | None:
        """The newest checkpoint whose files have their sizes and hashes; newer ones, damaged, are set aside."""
        if self._processes.is_main:
            store.clear_leftovers(self.folder)
            for folder in store.step_folders(self.folder).values():
                if reason := store.wrong_sizes(folder):
                    self._set_aside(folder, reason)
        while steps := self._steps():
            step = max(steps)
            wrong = self._wrong_hashes(steps[step])
            if not wrong:
                return step, steps[step]
            if self._processes.is_main:
                self._set_aside(steps[step], wrong[0])
        return None

    def _set_aside(self, folder: Path, reason: str) -> None:
        store.set_aside(folder, reason)
        self._events.write("checkpoint_damaged", checkpoint=folder.name, reason=reason)

    def _wrong_hashes(self, folder: Path) -> list[str]:
        """Every rank reads its share of the files, whoever wrote them."""
        rank = self._processes.rank
        share = sorted(read_json(folder / MANIFEST)["files"].items())[rank.rank :: rank.world_size]
        found = self._processes.gather(list(store.wrong_hashes(folder, share)))
        return [reason for part in found for reason in part]

    def resume(self, engine: Any, is_needed: bool = False) -> TrainingState:
        """Loads the newest whole checkpoint into the engine; a fresh state when there is none.

        Raises UserError when it belongs to other weights, a batch is to be skipped that was trained on already, or there
        is none although `is_needed`.
        """
        newest = self._newest_whole()
        state = self._load(engine, *newest) if newest else TrainingState()
        if newest is None and is_needed:
            raise UserError(f"{self.folder} holds no whole checkpoint to return to", "run the same command again")
        decided = self._processes.broadcast(self._decided() if self._processes.is_main else [])
        state.leave_out({*decided, *self._job.stage.skip_batches})
        return state

    def _decided(self) -> list[int]:
        """Rank 0 alone reads the list: it also writes it, while others may still be loading."""
        path = self.folder / _SKIPPED
        return read_json(path) if path.exists() else []

    def _load(self, engine: Any, step: int, folder: Path) -> TrainingState:
        manifest = read_json(folder / MANIFEST)
        self._check_same_weights(folder, manifest)
        state = TrainingState(**read_json(folder / "state.json"))
        saved, planned = _layout_of(manifest), self._layout()
        # DeepSpeed's own load forgets a part of what is swapped, and would have all of it in memory at once.
        if saved == planned and not self._job.stage.zero.on_disk:
            load_engine(engine, self._processes.dims, folder)
        else:
            load_other_layout(engine, folder)
            engine.global_steps, engine.global_samples = step, step * self._job.stage.global_batch_size
        recount_steps(engine)
        if saved == planned:
            self._restore_own_state(engine, torch.load(folder / self._rank_file(), weights_only=True))
        else:
            self._seed_own_state(step)
            own = (torch.load(folder / _rank_file(rank), weights_only=True) for rank in range(saved["world_size"]))
            first = next(own)
            restore_loss_scale(engine, first.get("loss_scale"))
            if hasattr(engine, "low_rank"):
                engine.low_rank.load(one["low_rank"] for one in itertools.chain([first], own))
        if self._processes.is_main:
            moved = "" if saved == planned else f", saved with {_words(saved)}; this job has {_words(planned)}"
            print(f"resumed from step {step}{moved}", flush=True)
        self._events.write("resumed", step=step, layout=planned, saved_layout=saved)
        return state

    def _check_same_weights(self, folder: Path, manifest: dict[str, Any]) -> None:
        if manifest.get("weights", self.folder.name) != self.folder.name:
            raise UserError(
                f"{folder} belongs to the weights {manifest['weights']}, not to {self.folder.name}: another model, data or "
                "settings",
                f"move it back to …/{manifest['weights']}/checkpoints",
            )

    def _layout(self) -> dict[str, Any]:
        """What DeepSpeed's own files depend on."""
        zero = self._job.stage.zero
        return {
            "world_size": self._job.world_size,
            "zero_stage": zero.stage,
            "offload_optimizer": zero.offload_optimizer,
            "parallel": self._job.stage.parallel.model_dump(),
        }

    def _restore_own_state(self, engine: Any, own: dict[str, Any]) -> None:
        restore_loss_scale(engine, own.get("loss_scale"))
        if hasattr(engine, "low_rank"):
            engine.low_rank.load([own["low_rank"]])
        torch.set_rng_state(own["cpu_rng"])
        if "cuda_rng" in own:
            torch.cuda.set_rng_state(own["cuda_rng"], self._processes.device)

    def _seed_own_state(self, step: int) -> None:
        """Ranks are others than those that saved, so each begins a random stream that follows from seed, step and rank."""
        text = f"{self._job.seed}/{step}/{self._processes.rank.rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little"))

    def _rank_file(self) -> str:
        return _rank_file(self._processes.rank.rank)

    def record_skipped(self, skipped: list[int]) -> None:
        """Keeps the list before anything follows from it: a leg that ends now must not forget it."""
        if self._processes.is_main:
            write_json(self.folder / _SKIPPED, skipped)
        self._processes.barrier()

    def is_exportable(self, step: int, validation_loss: float | None) -> bool:
        """Whether the save at `step` carries the proof that an export needs: the last one always, as `export` may come later."""
        if step == self._job.steps:
            return True
        best = self._best_losses()
        return (
            "best" in self._job.exportable
            and validation_loss is not None
            and all(validation_loss < loss for loss in best)
        )

    def _best_losses(self) -> list[float]:
        manifests = [read_json(folder / MANIFEST) for folder in self._steps().values()]
        return [m["validation_loss"] for m in manifests if m["validation_loss"] is not None]

    @contextmanager
    def saving(
        self, engine: Any, state: TrainingState, validation_loss: float | None, exportable: bool
    ) -> Iterator[Path]:
        """Saves engine and state; what the block adds to the folder on rank 0 is part of the checkpoint.

        Raises DiskFull when there is no room: the unfinished save is removed, earlier checkpoints stay.
        """
        folder, files = step_folder(self.folder, state.step), HashedFiles()
        partial = partial_folder(folder)
        with files.noting():
            self._make(partial)
        self._processes.barrier()
        look_again(partial.parent)  # else a node may write into an earlier save of this step
        others: list[Path] = []
        with states_in_reach(engine):
            _save_engine(engine, partial, files)
            files.save(self._own_state(engine), partial / self._rank_file())
            with files.noting():
                if self._processes.dims.is_split:
                    others = write_layout(
                        engine, self._processes.dims, partial, is_tied(self._job), self._processes.gather
                    )
                if self._processes.is_main:
                    write_json(partial / "state.json", asdict(state))
            with files.noting():
                yield partial
        manifest = {
            "step": state.step,
            "validation_loss": validation_loss,
            "weights": self.folder.name,
            **self._layout(),
            "exportable": exportable,
        }
        self._finish(folder, files, others, manifest)

    def _make(self, partial: Path) -> None:
        if self._processes.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def _own_state(self, engine: Any) -> dict[str, Any]:
        state: dict[str, Any] = {"cpu_rng": torch.get_rng_state(), "loss_scale": loss_scale_of(engine)}
        if hasattr(engine, "low_rank"):
            state["low_rank"] = engine.low_rank.state()
        if self._processes.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self._processes.device)
        return state

    def _finish(self, folder: Path, files: HashedFiles, others: list[Path], manifest: dict[str, Any]) -> None:
        """Writes the manifest and gives the checkpoint its name, or removes it when a rank could not save its part."""
        partial = partial_folder(folder)
        entries = self._entries(partial, files, others)
        failed = any(self._processes.gather(files.failure()))
        if self._processes.is_main and not failed:
            with files.noting():
                write_json(partial / MANIFEST, manifest | {"files": entries})
                store.fsync(partial / MANIFEST)
                store.publish(folder)
                self._thin_out()
        if failures := [failure for failure in self._processes.gather(files.failure()) if failure]:
            self._give_up(partial, failures, sum(self._processes.gather(files.bytes)))

    def _entries(self, partial: Path, files: HashedFiles, others: list[Path]) -> dict[str, dict[str, Any]]:
        """Name -> size and hash of every file: what each rank wrote, and what is there beside on rank 0's own disk."""
        own = {str(file.path.relative_to(partial)): file.entry() for file in files.files}
        with files.noting():
            own |= {str(path.relative_to(partial)): _hashed(path) for path in others}
        entries = {name: entry for part in self._processes.gather(own) for name, entry in part.items()}
        if self._processes.is_main:
            with files.noting():
                for path in partial.rglob("*"):
                    name = str(path.relative_to(partial))
                    if path.is_file() and name not in entries:
                        entries[name] = _hashed(path)
        return dict(sorted(entries.items()))

    def _give_up(self, partial: Path, failures: list[tuple[bool, str]], needed_bytes: int) -> None:
        if self._processes.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self._processes.barrier()
        is_full, text = max(failures)
        self._events.write("save_failed", checkpoint=partial.name, reason=text, needed_bytes=needed_bytes)
        if is_full:
            raise DiskFull("a checkpoint", partial.parent, needed_bytes, shutil.disk_usage(partial.parent).free)
        raise UserError(
            f"{partial} could not be saved: {text}", "look at the file system; earlier checkpoints are untouched"
        )

    def _thin_out(self) -> None:
        """Keeps the newest, the best, and what a later stage or an export began with."""
        steps, settings = complete_checkpoints(self.folder), self._job.stage.checkpoints
        keep = set(sorted(steps)[-settings.keep_last :]) | set(self._by_loss(steps)[: settings.keep_best])
        if not set(steps) - keep:
            return
        needed = store.pointed_to(Path(self._job.weights_root), Path(self._job.out))
        for step in sorted(set(steps) - keep):
            if file_sha256(steps[step] / MANIFEST) not in needed:
                store.remove(steps[step])

    @staticmethod
    def _by_loss(steps: dict[int, Path]) -> list[int]:
        """Steps with a validation loss, best first; of equals the earlier."""
        losses = {step: read_json(folder / MANIFEST)["validation_loss"] for step, folder in steps.items()}
        return sorted((step for step in steps if losses[step] is not None), key=lambda step: (losses[step], step))

    def last_and_best(self) -> dict[str, dict[str, Any]]:
        """Of "last" and, where there is a validation loss, "best": step, path, sha256 of the manifest, validation loss."""
        steps = complete_checkpoints(self.folder)
        chosen = {"last": max(steps)}
        if ranked := self._by_loss(steps):
            chosen["best"] = ranked[0]
        return {
            which: {
                "step": step,
                "path": str(steps[step].relative_to(self.folder)),
                "sha256": file_sha256(steps[step] / MANIFEST),
                "validation_loss": read_json(steps[step] / MANIFEST)["validation_loss"],
            }
            for which, step in chosen.items()
        }


def _save_engine(engine: Any, folder: Path, files: HashedFiles) -> None:
    """DeepSpeed's own save, through `files`. Its script for reading the result is left out: `longhaul convert` reads it."""
    usual, engine.checkpoint_engine = engine.checkpoint_engine, files
    engine._copy_recovery_script = lambda _folder: None
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    order = [names.get(id(p), "") for group in engine.optimizer.param_groups for p in group["params"]]
    # ZeRO 0 names the states by their place in the optimizer alone.
    client_state = {} if engine.zero_optimization_stage() else {"optimizer_parameters": order}
    try:
        engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state=client_state, save_latest=False)
    finally:
        engine.checkpoint_engine = usual


def _hashed(path: Path) -> dict[str, Any]:
    store.fsync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _rank_file(rank: int) -> str:
    return f"trainer-rank-{rank:05d}.pt"


def _layout_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in ("world_size", "zero_stage", "offload_optimizer", "parallel")}


def _words(layout: dict[str, Any]) -> str:
    split = [f"{axis} {size}" for axis, size in layout["parallel"].items() if size > 1]
    return f"{layout['world_size']} ranks, ZeRO {layout['zero_stage']}" + "".join(f", {text}" for text in split)
