"""Computes the identity of a stage's weights (all that they depend on), and the name of their folder, a hash of it.

Nothing here imports torch. The trainer and the plan compute both in the same way, so that the plan can say which weights a
config uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longhaul.artifacts.artifact_schemas import Checkpoint, DataManifest, TokenizerManifest
from longhaul.artifacts.atomic_files import content_hash
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.errors import InputError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.checkpoint_folders import MOVE_AWAY, WeightsIdentity, complete_checkpoints
from longhaul.train.lr_schedule import can_extend_steps


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
        raise InputError(
            f"stage {earlier.stage} has no `{which}` checkpoint", f"set stages.{job.stage.name}.from.checkpoint to last"
        )
    entry = earlier.checkpoints[which]
    return StartingCheckpoint(Path(earlier.weights) / entry["path"], entry["sha256"])


def weights_identity(
    job: TrainSpec, data: DataManifest, tokenizer: TokenizerManifest, start: StartingCheckpoint | None
) -> dict[str, object]:
    """Return everything that the weights depend on.

    The length is not part of it, so a stage can be extended. With `restart: true` it is, so that another length trains new
    weights.
    """
    spec = {key: value for key, value in job.spec.items() if key not in ("steps", "epochs") or job.stage.restart}
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


def check_steps(job: TrainSpec, folder: Path) -> None:
    """Raise UserError if the weights in a folder cannot continue under the planned number of steps.

    The trainer calls this before it trains, and the plan calls it before a job is submitted.
    """
    path = WeightsFolder(folder).identity
    if not path.exists():
        return
    planned = read_typed_json(path, WeightsIdentity, MOVE_AWAY).get("steps", job.steps)
    trained = max(complete_checkpoints(folder), default=0)
    if planned == job.steps or trained == 0:
        return
    if job.steps < trained or not can_extend_steps(job.stage.schedule, trained, planned):
        raise InputError(
            f"stage {job.stage.name}: steps changed from {planned} to {job.steps}, but its weights have {trained} steps of a "
            f"{job.stage.schedule.kind} schedule planned for {planned}",
            f"set the length back to {planned} steps, or set restart: true in the stage to train it from its start",
        )
