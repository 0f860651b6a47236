"""Claims the weights folder of a stage: writes what its weights depend on, and refuses weights of something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longhaul.artifacts.atomic_files import canonical_json, read_json, write_json
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.config.pretrained_format import DAMAGED_PRETRAINED_HINT
from longhaul.errors import UserError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.checkpoint_folders import MOVE_AWAY, WeightsIdentity
from longhaul.train.checkpoint.weights_identity import check_steps
from longhaul.train.distributed_context import DistributedContext


def claim_weights_folder(
    job: TrainSpec, identity: dict[str, object], folder: Path, context: DistributedContext
) -> None:
    """Write the identity of the weights and the model's config into the folder.

    Raises:
        UserError: the folder holds weights of another identity, or its weights cannot continue under the planned steps.
    """
    if context.is_main:
        _check_identity(folder, identity)
        check_steps(job, folder)
        length = {"steps": job.steps, **({"epochs": job.stage.epochs} if job.stage.epochs else {})}
        write_json(WeightsFolder(folder).identity, {**identity, **length})
        write_json(WeightsFolder(folder).model_config, job.model)  # the export builds the model from it
        _keep_generation_config(job, folder)
    context.barrier()


def _keep_generation_config(job: TrainSpec, folder: Path) -> None:
    """Copy the pretrained model's generation settings for the export; the pretrained folder may no longer exist then."""
    base = Path(job.pretrained) / "generation_config.json" if job.pretrained else None
    if base and base.is_file():
        write_json(WeightsFolder(folder).generation_config, read_json(base, DAMAGED_PRETRAINED_HINT))


def _check_identity(folder: Path, identity: dict[str, object]) -> None:
    path = WeightsFolder(folder).identity
    found: Any = read_typed_json(path, WeightsIdentity, MOVE_AWAY) if path.exists() else identity
    differing = [key for key, value in json.loads(canonical_json(identity)).items() if found.get(key) != value]
    if differing:
        key = differing[0]
        raise UserError(
            f"{path}: `{key}` of these weights is {found.get(key)}, that of the planned weights is {identity[key]}",
            MOVE_AWAY,
        )
