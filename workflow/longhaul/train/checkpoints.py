"""Checkpoints that either are complete or do not exist: the manifest is written last.

<weights>/checkpoints/step-00000100/ holds DeepSpeed's files, trainer-rank-*.pt, state.json, proof/ and manifest.json.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from longhaul.artifacts import file_sha256, read_json, write_json
from longhaul.config.models import Parallel
from longhaul.errors import UserError
from longhaul.jobs import StageJob
from longhaul.train.parallel.saving import is_tied, load_engine, write_layout
from longhaul.train.processes import Processes

_MANIFEST = "manifest.json"


@dataclass
class TrainingState:
    """Where a stage stands: steps done, and the steps whose batch changed no weights. The data order follows from it."""

    step: int = 0
    skipped: list[int] = field(default_factory=list)


def complete_checkpoints(weights: Path) -> dict[int, Path]:
    """step -> folder of every checkpoint whose manifest is there and whose files have the sizes it states."""
    found = {}
    for manifest_path in sorted(weights.glob(f"checkpoints/step-*/{_MANIFEST}")):
        folder = manifest_path.parent
        try:
            manifest = json.loads(manifest_path.read_text())
            wrong = [
                name for name, entry in manifest["files"].items() if (folder / name).stat().st_size != entry["bytes"]
            ]
        except (OSError, ValueError, KeyError) as error:
            wrong = [f"{_MANIFEST}: {error}"]
        if wrong:
            print(f"warning: checkpoint {folder} is damaged ({wrong[0]}) and is passed over", flush=True)
        else:
            found[int(folder.name.removeprefix("step-"))] = folder
    return found


class Checkpoints:
    """Saves, finds, loads and thins out the checkpoints of one weights folder; every method runs on all ranks."""

    def __init__(self, folder: Path, job: StageJob, processes: Processes) -> None:
        self.folder, self._job, self._processes = folder, job, processes

    def finished(self) -> bool:
        """Whether the last planned step is already there."""
        return self._job.steps in self._steps()

    def _steps(self) -> dict[int, Path]:
        return self._processes.broadcast(complete_checkpoints(self.folder) if self._processes.is_main else {})

    def resume(self, engine: Any) -> TrainingState:
        """Loads the newest complete checkpoint into the engine; a fresh state when there is none.

        Raises UserError when it was written by another number of ranks, or a file's hash is not the recorded one.
        """
        steps = self._steps()
        if not steps:
            return TrainingState()
        step = max(steps)
        folder = steps[step]
        self._check_loadable(folder)
        load_engine(engine, self._processes.grid, folder)
        own = torch.load(folder / self._rank_file(), weights_only=True)
        torch.set_rng_state(own["cpu_rng"])
        if "cuda_rng" in own:
            torch.cuda.set_rng_state(own["cuda_rng"], self._processes.device)
        if self._processes.is_main:
            print(f"resumed from step {step}", flush=True)
        return TrainingState(**read_json(folder / "state.json"))

    def _check_loadable(self, folder: Path) -> None:
        manifest = read_json(folder / _MANIFEST)
        if manifest["world_size"] != self._job.world_size or manifest["zero_stage"] != self._job.stage.zero.stage:
            raise UserError(
                f"{folder} was written by {manifest['world_size']} ranks with ZeRO {manifest['zero_stage']}; this job has "
                f"{self._job.world_size} ranks with ZeRO {self._job.stage.zero.stage}",
                "finish the stage in the layout it began with",
            )
        self._check_same_axes(folder, manifest)
        share = self._share(sorted(manifest["files"]))
        damaged = [name for name in share if file_sha256(folder / name) != manifest["files"][name]["sha256"]]
        if any(self._processes.gather(damaged)):
            found = [name for names in self._processes.gather(damaged) for name in names]
            raise UserError(
                f"{folder / found[0]} has not the hash that its manifest states",
                f"the file is damaged: remove {folder}; the stage then goes on from the checkpoint before it",
            )

    def _check_same_axes(self, folder: Path, manifest: dict[str, Any]) -> None:
        saved, planned = manifest.get("parallel", Parallel().model_dump()), self._job.stage.parallel.model_dump()
        if saved != planned:
            raise UserError(
                f"{folder} was written with {_axes(saved)}; this job has {_axes(planned)}",
                "finish the stage in the layout it began with; a new stage may start `from` it in any layout",
            )

    def _share(self, names: list[str]) -> list[str]:
        """This rank's part of a list of files: hashing is spread over the ranks."""
        return names[self._processes.rank.rank :: self._processes.rank.world_size]

    def _rank_file(self) -> str:
        return f"trainer-rank-{self._processes.rank.rank:05d}.pt"

    def is_exportable(self, step: int, validation_loss: float | None) -> bool:
        """Whether the save at `step` will be exported, as far as is known now."""
        if "last" in self._job.exportable and step == self._job.steps:
            return True
        best = self._best_losses()
        return (
            "best" in self._job.exportable
            and validation_loss is not None
            and all(validation_loss < loss for loss in best)
        )

    def _best_losses(self) -> list[float]:
        manifests = [read_json(folder / _MANIFEST) for folder in self._steps().values()]
        return [m["validation_loss"] for m in manifests if m["validation_loss"] is not None]

    @contextmanager
    def saving(
        self, engine: Any, state: TrainingState, validation_loss: float | None, exportable: bool
    ) -> Iterator[Path]:
        """Saves engine and state; what the block adds to the folder is part of the checkpoint."""
        folder = self.folder / "checkpoints" / f"step-{state.step:08d}"
        if self._processes.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        self._processes.barrier()
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        if self._processes.grid.is_split:
            write_layout(engine, self._processes.grid, folder, is_tied(self._job), self._processes.gather)
        torch.save(self._own_state(), folder / self._rank_file())
        if self._processes.is_main:
            write_json(folder / "state.json", asdict(state))
        yield folder
        self._processes.barrier()
        hashes = self._hash_files(folder)
        if self._processes.is_main:
            manifest = {
                "step": state.step,
                "validation_loss": validation_loss,
                "zero_stage": self._job.stage.zero.stage,
                "world_size": self._job.world_size,
                "parallel": self._job.stage.parallel.model_dump(),
                "exportable": exportable,
                "files": hashes,
            }
            write_json(folder / _MANIFEST, manifest)
            self._thin_out()
        self._processes.barrier()

    def _own_state(self) -> dict[str, torch.Tensor]:
        state = {"cpu_rng": torch.get_rng_state()}
        if self._processes.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self._processes.device)
        return state

    def _hash_files(self, folder: Path) -> dict[str, dict[str, Any]]:
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        own = {}
        for name in self._share(names):
            path = folder / name
            _fsync(path)
            own[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        return dict(sorted(item for part in self._processes.gather(own) for item in part.items()))

    def _thin_out(self) -> None:
        """Keeps the newest and the best; the best is what a later stage or an export may point to."""
        steps, settings = complete_checkpoints(self.folder), self._job.stage.checkpoints
        keep = set(sorted(steps)[-settings.keep_last :]) | set(self._by_loss(steps)[: settings.keep_best])
        for step in set(steps) - keep:
            # Without its manifest it no longer exists, even if the removal is cut short.
            (steps[step] / _MANIFEST).unlink()
            shutil.rmtree(steps[step])

    @staticmethod
    def _by_loss(steps: dict[int, Path]) -> list[int]:
        """Steps with a validation loss, best first; of equals the earlier."""
        losses = {step: read_json(folder / _MANIFEST)["validation_loss"] for step, folder in steps.items()}
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
                "sha256": file_sha256(steps[step] / _MANIFEST),
                "validation_loss": read_json(steps[step] / _MANIFEST)["validation_loss"],
            }
            for which, step in chosen.items()
        }


def _axes(parallel: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in parallel.items())


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
