"""Counts the samples of a stage with `epochs` once, and gives the job its number of steps."""

from __future__ import annotations

from typing import Any

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.planning.check_feasibility import check_number_of_steps
from longhaul.planning.steps_of_epochs import steps_of_epochs
from longhaul.train.checkpoint.checkpoint_folders import MOVE_AWAY, WeightsIdentity
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.open_samples import open_samples
from longhaul.train.verified_inputs import verify_data


def with_counted_steps(
    job: TrainSpec, data: DataManifest, folder: WeightsFolder, context: DistributedContext
) -> TrainSpec:
    """Return the job with its number of steps. Every rank calls this.

    The first attempt counts the samples of the verified data. identity.json of the weights folder, whose name holds the hash of
    the data, records the result, and later attempts read it there.

    Raises:
        UserError: the data were altered or have no sample, or the steps do not fit the learning-rate schedule.
    """
    epochs = job.stage.epochs
    if epochs is None:
        return job
    steps = context.broadcast(_recorded_steps(folder, epochs) if context.is_main else None)
    if steps is None:
        verify_data(job, data, folder, context)
        samples = open_samples(job, data, "train", folder.samples, context)
        steps = steps_of_epochs(epochs, samples.distinct_count if samples else 0, job.stage.global_batch_size)
    check_number_of_steps(job.stage, steps)
    return job.model_copy(update={"planned_steps": steps})


def _recorded_steps(folder: WeightsFolder, epochs: float) -> int | None:
    """Return the steps of these epochs that an earlier attempt counted."""
    if not folder.identity.exists():
        return None
    found: Any = read_typed_json(folder.identity, WeightsIdentity, MOVE_AWAY)
    return found.get("steps") if found.get("epochs") == epochs else None
