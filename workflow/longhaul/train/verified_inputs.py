"""Verifies, on all ranks together, the shards, packs and starting checkpoint of a stage before it trains; remembers the result.

All ranks together read each file once: every rank hashes an equal part of them. The weights folder records what was verified,
so later attempts of the stage only ask for sizes and times of change, and hash the files again if one of these differs.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.artifacts.atomic_files import file_blake3, file_sha256, write_text
from longhaul.artifacts.compare_hashes import FileHashes, damaged_data, dataset_files, wrong_files
from longhaul.artifacts.pack_totals import delete_packs_hint, recorded_packs
from longhaul.artifacts.paths import WeightsFolder
from longhaul.errors import UserError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.checkpoint_folders import MANIFEST, read_manifest
from longhaul.train.checkpoint.weights_identity import StartingCheckpoint
from longhaul.train.distributed_context import DistributedContext


def verify_data(job: TrainSpec, data: DataManifest, weights: WeightsFolder, context: DistributedContext) -> None:
    """Compare every token shard with its recorded hash. A flipped bit would train other weights under the same data hash.

    Raises:
        UserError: on all ranks, with the first file that is missing or was altered.
    """
    files = dataset_files(data)
    state, record = _file_states(files, context), weights.verified_data
    if context.broadcast(context.is_main and record.exists() and record.read_text() == state):
        return
    began_s = time.monotonic()
    if problem := _first_problem(files, context):
        raise damaged_data(problem, data, Path(job.data))
    if context.is_main:
        print(
            f"compared {len(files)} files of the data with their hashes in {time.monotonic() - began_s:.1f} s",
            flush=True,
        )
        write_text(record, state)


def verify_packs(folder: Path, context: DistributedContext) -> None:
    """Compare the pack files of a stage with their recorded hashes. A flipped bit would repeat conversations and skip others.

    Raises:
        UserError: on all ranks, with the first file that is missing or was altered.
    """
    if problem := _first_problem(recorded_packs(folder), context):
        raise UserError(problem, delete_packs_hint(Path(problem.split(" ", 1)[0])))


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
    files = {start.folder / name: entry["blake3"] for name, entry in read_manifest(start.folder)["files"].items()}
    if problem := _first_problem(files, context, file_blake3):
        raise UserError(problem, hint)


def _file_states(files: FileHashes, context: DistributedContext) -> str:
    """Return a hash over name, recorded hash, size and time of change of all files; the number of ranks does not matter."""
    sums = context.gather(sum(_file_state(path, sha256) for path, sha256 in own_part(files, context)))
    return f"{sum(sums) % 2**256:064x}\n"


def _file_state(path: Path, sha256: str) -> int:
    try:
        found = path.stat()
        facts = f"{path}|{sha256}|{found.st_size}|{found.st_ctime_ns}"
    except OSError:  # the hashing names it
        facts = f"{path}|missing"
    return int.from_bytes(hashlib.sha256(facts.encode()).digest(), "big")


def _first_problem(
    files: FileHashes, context: DistributedContext, file_hash: Callable[[Path], str] = file_sha256
) -> str | None:
    found = context.gather(list(wrong_files(dict(own_part(files, context)), file_hash)))
    return next((problem for part in found for problem in part), None)


def own_part(files: FileHashes, context: DistributedContext) -> list[tuple[Path, str]]:
    """Return this rank's part of the files. A rank gets large and small files alike: each suffix is divided by itself."""
    rank = context.rank
    ordered = sorted(files.items(), key=lambda entry: (entry[0].suffix, entry[0]))
    return ordered[rank.rank :: rank.world_size]
