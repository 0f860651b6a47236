"""Computes the hash that names a stage's weights folder, what it covers, and the checkpoint that the stage starts from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longhaul.artifacts.artifact_schemas import Checkpoint, DataManifest, TokenizerManifest
from longhaul.artifacts.atomic_files import canonical_json, content_hash, read_json, write_json
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.config.pretrained_format import DAMAGED_PRETRAINED_HINT
from longhaul.errors import InputError, UserError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.checkpoint_folders import WeightsIdentity, complete_checkpoints
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.lr_schedule import can_extend_steps

_MOVE_AWAY = "the folder was copied or edited: move it away, and the stage is trained in its place"


@dataclass(frozen=True)
class StartingCheckpoint:
    """The checkpoint of an earlier stage from which this stage starts: its folder and the SHA-256 of its manifest."""

    folder: Path
    sha256: str


def find_starting_checkpoint(job: TrainSpec) -> StartingCheckpoint | None:
    """Return the checkpoint from which this stage starts; None when it starts from a pretrained or a random model."""
    if job.start_checkpoint is None or job.stage.start_from is None:
        return None
    earlier, which = Checkpoint.read(Path(job.start_checkpoint)), job.stage.start_from.checkpoint
    if which not in earlier.checkpoints:
        raise InputError(f"stage {earlier.stage} has no `{which}` checkpoint", "set start_from.checkpoint to last")
    entry = earlier.checkpoints[which]
    return StartingCheckpoint(Path(earlier.weights) / entry["path"], entry["sha256"])


def weights_identity(
    job: TrainSpec, data: DataManifest, tokenizer: TokenizerManifest, start: StartingCheckpoint | None
) -> dict[str, object]:
    """Return everything that the weights depend on.

    The number of steps is not part of it, so a stage can be extended. With `restart: true` it is, so that another number of steps
    trains new weights.
    """
    spec = {key: value for key, value in job.spec.items() if key != "steps" or job.stage.restart}
    return {
        "spec": spec,
        "pretrained": job.pretrained,
        "data": data.hash,
        "tokenizer": tokenizer.hash,
        "start": start.sha256 if start else None,
    }


def weights_folder(job: TrainSpec, identity: dict[str, object]) -> Path:
    """Return <weights_root>/<hash>."""
    return Path(job.weights_root) / content_hash(identity)


def claim_weights_folder(
    job: TrainSpec, identity: dict[str, object], folder: Path, context: DistributedContext
) -> None:
    """Write the identity of the weights and the model's config into the folder.

    Raises:
        UserError: the folder holds weights of another identity, or its weights cannot continue under the planned steps.
    """
    if context.is_main:
        _check_identity(folder, identity)
        _check_steps(job, folder)
        write_json(WeightsFolder(folder).identity, {**identity, "steps": job.steps})
        write_json(WeightsFolder(folder).model_config, job.model)  # the export builds the model from it
        _keep_generation_config(job, folder)
    context.barrier()


def _keep_generation_config(job: TrainSpec, folder: Path) -> None:
    """Copy the pretrained model's generation settings for the export; the pretrained folder may be gone by then."""
    base = Path(job.pretrained) / "generation_config.json" if job.pretrained else None
    if base and base.is_file():
        write_json(WeightsFolder(folder).generation_config, read_json(base, DAMAGED_PRETRAINED_HINT))


def _check_identity(folder: Path, identity: dict[str, object]) -> None:
    path = WeightsFolder(folder).identity
    found: Any = read_typed_json(path, WeightsIdentity, _MOVE_AWAY) if path.exists() else identity
    differing = [key for key, value in json.loads(canonical_json(identity)).items() if found.get(key) != value]
    if differing:
        key = differing[0]
        raise UserError(
            f"{path}: `{key}` of these weights is {found.get(key)}, that of the planned weights is {identity[key]}",
            _MOVE_AWAY,
        )


def _check_steps(job: TrainSpec, folder: Path) -> None:
    path = WeightsFolder(folder).identity
    if not path.exists():
        return
    planned = read_typed_json(path, WeightsIdentity, _MOVE_AWAY).get("steps", job.steps)
    trained = max(complete_checkpoints(folder), default=0)
    if planned == job.steps or trained == 0:
        return
    if job.steps < trained or not can_extend_steps(job.stage.schedule, trained, planned):
        raise InputError(
            f"stage {job.stage.name}: steps changed from {planned} to {job.steps}, but its weights have {trained} steps of a "
            f"{job.stage.schedule.kind} schedule planned for {planned}",
            f"set steps back to {planned}, or set restart: true in the stage to train it from its start",
        )
