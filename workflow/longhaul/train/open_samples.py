"""Opens the samples of a split on all ranks; rank 0 goes first and writes the packs."""

from __future__ import annotations

from pathlib import Path

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.data.sampling.samples import Samples
from longhaul.errors import InputError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.distributed_context import DistributedContext


def open_samples(
    job: TrainSpec, data: DataManifest, split: str, cache: Path, context: DistributedContext
) -> Samples | None:
    """Return the samples of a split; None when it has none. Rank 0 goes first: it writes the packs that the others map.

    Raises:
        UserError: the training split has no document, or as Samples.open.
    """
    if not data.splits.get(split, {}).get("documents"):
        if split == "train":
            raise InputError(
                f"stage {job.stage.name}: the train split of dataset {data.dataset} has no documents",
                "add documents, or reduce validation_fraction",
            )
        return None
    arguments = (data, split, job.stage.kind, job.stage.sequence_length, job.seed, cache)
    if context.is_main:
        Samples.open(*arguments, truncate=job.stage.truncate)
    context.barrier()
    return Samples.open(*arguments, truncate=job.stage.truncate)
