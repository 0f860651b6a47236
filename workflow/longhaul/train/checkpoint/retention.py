"""Decides which checkpoints are kept (keep_last, keep_best, referenced ones), and which are "last" and "best"."""

from __future__ import annotations

from pathlib import Path

from longhaul.artifacts.artifact_schemas import SavedCheckpoint
from longhaul.artifacts.atomic_files import file_sha256
from longhaul.errors import UserError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.checkpoint_folders import (
    MANIFEST,
    complete_checkpoints,
    read_manifest,
    referenced_checkpoints,
    remove,
)


def validation_loss_of(checkpoint: Path) -> float | None:
    """Return the validation loss at which a checkpoint was saved; None where nothing was validated."""
    return read_manifest(checkpoint)["validation_loss"]


def rank_by_loss(checkpoints: dict[int, Path]) -> list[int]:
    """Return the steps of the checkpoints with a validation loss, best first; of equal ones the earlier first."""
    losses = {step: validation_loss_of(folder) for step, folder in checkpoints.items()}
    ranked = sorted((loss, step) for step, loss in losses.items() if loss is not None)
    return [step for _, step in ranked]


def remove_old_checkpoints(weights: Path, job: TrainSpec) -> None:
    """Remove the checkpoints that neither checkpoints.keep_last, checkpoints.keep_best nor a reference keeps."""
    checkpoints, settings = complete_checkpoints(weights), job.stage.checkpoints
    keep = set(sorted(checkpoints)[-settings.keep_last :]) | set(rank_by_loss(checkpoints)[: settings.keep_best])
    old = sorted(set(checkpoints) - keep)
    if not old:
        return
    try:
        referenced = referenced_checkpoints(Path(job.weights_root), Path(job.out))
    except UserError as error:
        print(f"warning: no old checkpoint is removed, as one may still be needed: {error}", flush=True)
        return
    for step in old:
        if file_sha256(checkpoints[step] / MANIFEST) not in referenced:
            remove(checkpoints[step])


def last_and_best(weights: Path) -> dict[str, SavedCheckpoint]:
    """Return step, path, SHA-256 of the manifest and validation loss of "last" and, where there was validation, of "best"."""
    checkpoints = complete_checkpoints(weights)
    chosen = {"last": max(checkpoints)}
    if ranked := rank_by_loss(checkpoints):
        chosen["best"] = ranked[0]
    return {
        which: {
            "step": step,
            "path": str(checkpoints[step].relative_to(weights)),
            "sha256": file_sha256(checkpoints[step] / MANIFEST),
            "validation_loss": validation_loss_of(checkpoints[step]),
        }
        for which, step in chosen.items()
    }
