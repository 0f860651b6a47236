"""Which folder a stage's weights belong in: a hash of all that they depend on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longhaul.artifacts.files import canonical_json, content_hash, read_json, write_json
from longhaul.artifacts.schemas import Checkpoint, DataManifest, TokenizerManifest
from longhaul.errors import UserError
from longhaul.jobs.specs import TrainSpec
from longhaul.train.checkpoint.folders import complete_checkpoints
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.schedule import may_grow


@dataclass(frozen=True)
class Start:
    """The checkpoint of an earlier stage: its folder and the hash of its manifest."""

    folder: Path
    sha256: str


def starting_checkpoint(job: TrainSpec) -> Start | None:
    """The checkpoint this stage starts from; None when it starts from the model itself."""
    if job.start_checkpoint is None or job.stage.start_from is None:
        return None
    earlier, which = Checkpoint.read(Path(job.start_checkpoint)), job.stage.start_from.checkpoint
    if which not in earlier.checkpoints:
        raise UserError(f"stage {earlier.stage} has no {which} checkpoint", "start from its last one")
    found = earlier.checkpoints[which]
    return Start(Path(earlier.weights) / found["path"], found["sha256"])


def weights_identity(
    job: TrainSpec, data: DataManifest, tokenizer: TokenizerManifest, start: Start | None
) -> dict[str, Any]:
    """What the weights depend on. The number of steps is left out, unless `restart` asks for new weights when it changes."""
    spec = {key: value for key, value in job.spec.items() if key != "steps" or job.stage.restart}
    return {
        "spec": spec,
        "pretrained": job.pretrained,
        "data": data.hash,
        "tokenizer": tokenizer.hash,
        "start": start.sha256 if start else None,
    }


def weights_folder(job: TrainSpec, identity: dict[str, Any]) -> Path:
    """<weights_root>/<hash>."""
    return Path(job.weights_root) / content_hash(identity)


def claim_weights_folder(job: TrainSpec, identity: dict[str, Any], folder: Path, processes: DistributedContext) -> None:
    """Writes what the weights are of; UserError when others lie there, or they may not go on under the planned steps."""
    if processes.is_main:
        _check_identity(folder, identity)
        _check_steps(job, folder)
        write_json(folder / "identity.json", {**identity, "steps": job.steps})
        write_json(folder / "model_config.json", job.model)  # what a conversion builds the model from
    processes.barrier()


def _check_identity(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / "identity.json"
    found = read_json(path) if path.exists() else identity
    differing = [key for key, value in json.loads(canonical_json(identity)).items() if found.get(key) != value]
    if differing:
        raise UserError(
            f"{path} says that the weights there are of another {differing[0]}: {found.get(differing[0])}, not "
            f"{identity[differing[0]]}",
            "the folder was copied or edited: move it away, and the stage is trained in its place",
        )


def _check_steps(job: TrainSpec, folder: Path) -> None:
    if not (folder / "identity.json").exists():
        return
    planned, trained = read_json(folder / "identity.json")["steps"], max(complete_checkpoints(folder), default=0)
    if planned == job.steps or trained == 0:
        return
    if job.steps < trained or not may_grow(job.stage.schedule, trained, planned):
        raise UserError(
            f"stage {job.stage.name}: steps changed from {planned} to {job.steps}, but its weights have {trained} steps of a "
            f"{job.stage.schedule.kind} schedule planned for {planned}",
            f"go back to {planned} steps, or set restart: true in the stage to train it anew",
        )
