"""Verifies the files that a stage trains from, before the first of them is used. Every rank reads an equal part of them."""

from __future__ import annotations

from pathlib import Path

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.artifacts.atomic_files import file_sha256
from longhaul.artifacts.verified_files import dataset_files, wrong_files
from longhaul.errors import UserError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.checkpoint_folders import MANIFEST, read_manifest
from longhaul.train.checkpoint.weights_folder import StartingCheckpoint
from longhaul.train.distributed_context import DistributedContext


def verify_data(job: TrainSpec, data: DataManifest, context: DistributedContext) -> None:
    """Compare every token shard with its recorded hash. A flipped bit would train other weights under the same data hash.

    Raises:
        UserError: on all ranks, with the first file that is missing or was altered.
    """
    if problem := _first_problem(dataset_files(data), context):
        path = Path(problem.split(" ", 1)[0])
        raise UserError(f"dataset {data.dataset}: {problem}", _make_again(path, data, Path(job.data)))


def _make_again(path: Path, data: DataManifest, manifest: Path) -> str:
    """Return the remedy: a chunk's folder and the manifest go, and the same shards are made again."""
    parts = [DataManifest.from_fields(part["manifest"]) for part in data.mixture] or [data]
    owner = next((part for part in parts if path.is_relative_to(part.path)), data)
    folder = Path(owner.path) / path.relative_to(owner.path).parts[0] if path.is_relative_to(owner.path) else path
    manifests = dict.fromkeys([manifest.with_name(f"{owner.dataset}.json"), manifest])
    return f"restore the file, or make it again: rm -r {folder} {' '.join(map(str, manifests))}; then run again"


def verify_start(start: StartingCheckpoint, context: DistributedContext) -> None:
    """Compare the checkpoint of an earlier stage with its manifest, and the manifest with checkpoint.json.

    Raises:
        UserError: on all ranks, with the first file that is missing or was altered.
    """
    hint = "restore the files, or train the earlier stage again"
    manifest = start.folder / MANIFEST
    if not manifest.exists() or file_sha256(manifest) != start.sha256:
        raise UserError(
            f"{manifest} is missing or is not the one that the earlier stage's checkpoint.json states", hint
        )
    files = {start.folder / name: entry["sha256"] for name, entry in read_manifest(start.folder)["files"].items()}
    if problem := _first_problem(files, context):
        raise UserError(problem, hint)


def _first_problem(files: dict[Path, str], context: DistributedContext) -> str | None:
    rank = context.rank
    own = dict(sorted(files.items())[rank.rank :: rank.world_size])
    found = context.gather(list(wrong_files(own)))
    return next((problem for part in found for problem in part), None)
