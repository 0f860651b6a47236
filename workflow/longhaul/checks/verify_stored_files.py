"""Reads every file of a run's datasets, checkpoints and exports, and compares it with the hash that was stored with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from longhaul.artifacts.artifact_schemas import DataManifest, Export
from longhaul.artifacts.atomic_files import file_sha256
from longhaul.artifacts.paths import WeightsFolder
from longhaul.planning import Plan
from longhaul.train.checkpoint.checkpoint_folders import read_manifest, step_folders, wrong_hashes, wrong_sizes

_HASHING_THREADS = 8


@dataclass(frozen=True)
class FolderIntegrity:
    """The result for one folder. `damage` describes its first damaged file, and is "" when all files are intact."""

    name: str  # of the dataset or stage
    folder: Path
    files: int
    size_bytes: int
    damage: str


def verify_stored_files(plan: Plan) -> list[FolderIntegrity]:
    """Return one result per dataset, per checkpoint in every weights folder of every stage, and per export."""
    results = []
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        for name, dataset in plan.config.datasets.items():
            manifest = plan.paths.manifest(name)
            if manifest.exists() and not dataset.mixture:  # a mixture has no shards of its own
                results.append(_verify_dataset(DataManifest.read(manifest), pool))
        for stage in plan.stages:
            for folder in _checkpoints(plan.weights_root(stage.name)):
                results.append(_verify_checkpoint(stage.name, folder, pool))
            export = plan.paths.export_manifest(stage.name)
            if export.exists():
                results.append(_verify_export(stage.name, Export.read(export), pool))
    return results


def _checkpoints(weights_root: Path) -> Iterator[Path]:
    """Yield all checkpoints, including those that were renamed because they are damaged."""
    for weights in sorted(weights_root.glob("*")):
        checkpoints = WeightsFolder(weights).checkpoints
        if checkpoints.is_dir():
            yield from step_folders(weights).values()
            yield from sorted(checkpoints.glob("step-*.corrupt*"))


def _verify_checkpoint(stage: str, folder: Path, pool: ThreadPoolExecutor) -> FolderIntegrity:
    if problem := wrong_sizes(folder):
        return FolderIntegrity(stage, folder, 0, 0, problem)
    files = read_manifest(folder)["files"]
    damages = pool.map(lambda entry: next(wrong_hashes(folder, [entry]), ""), files.items())
    size = sum(entry["bytes"] for entry in files.values())
    return FolderIntegrity(stage, folder, len(files), size, next(filter(None, damages), ""))


def _verify_dataset(manifest: DataManifest, pool: ThreadPoolExecutor) -> FolderIntegrity:
    shards = [shard for split in manifest.splits.values() for shard in split["shards"]]
    files = {f"{shard['prefix']}.{ending}": sha256 for shard in shards for ending, sha256 in shard["sha256"].items()}
    return _verify_files(manifest.dataset, Path(manifest.path), files, pool)


def _verify_export(stage: str, export: Export, pool: ThreadPoolExecutor) -> FolderIntegrity:
    return _verify_files(stage, Path(export.path), export.files, pool)


def _verify_files(name: str, folder: Path, files: Mapping[str, str], pool: ThreadPoolExecutor) -> FolderIntegrity:
    """Verify the files of a folder. files: name in the folder -> SHA-256."""

    def damage(entry: tuple[str, str]) -> str:
        file, sha256 = entry
        try:
            return "" if file_sha256(folder / file) == sha256 else f"{file} does not have the SHA-256 of the manifest"
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}"

    damages = list(pool.map(damage, files.items()))
    size = sum((folder / file).stat().st_size for file in files if (folder / file).exists())
    return FolderIntegrity(name, folder, len(files), size, next(filter(None, damages), ""))


def print_results(results: list[FolderIntegrity]) -> None:
    """Print one line per folder, and the number of damaged folders."""
    table = Table("dataset or stage", "folder", "files", "MB", "result")
    for result in results:
        size = f"{result.size_bytes / 1e6:,.1f}"
        table.add_row(result.name, str(result.folder), str(result.files), size, result.damage or "intact")
    # Wide, because a wrapped path cannot be copied.
    Console(width=240, soft_wrap=True).print(table)
    damaged = sum(bool(result.damage) for result in results)
    print(f"{len(results)} folders, {damaged} damaged", flush=True)
