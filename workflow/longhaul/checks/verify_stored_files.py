"""Verb `longhaul verify`: reads every file of a run whose hash is recorded, and prints the damaged ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longhaul.artifacts.artifact_schemas import Checkpoint, DataManifest, Export, LockedSource, TokenizerManifest
from longhaul.artifacts.atomic_files import file_sha256
from longhaul.artifacts.compare_hashes import dataset_files
from longhaul.artifacts.pack_totals import recorded_packs
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.task_data_lock import TaskDataLock
from longhaul.errors import UserError, printable
from longhaul.planning import Plan
from longhaul.train.checkpoint.checkpoint_folders import (
    MANIFEST,
    read_manifest,
    step_folders,
    wrong_hashes,
    wrong_sizes,
)

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
    """Return one result for the tokenizer, per streamed dataset, per dataset, and per export.

    Of each stage: one per checkpoint in every weights folder, per folder of packs, and per evaluation task with data of the Hub.
    An artifact that cannot be read counts as damage of what it describes.
    """
    paths = plan.paths
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        results = list(_if_there("tokenizer", paths.tokenizer, lambda path: _verify_tokenizer(path, pool)))
        for name, source in (plan.lock.sources if plan.lock else {}).items():
            if "sha256" in source:
                results.append(_verify_streamed(name, source, pool))
        for name, dataset in plan.config.datasets.items():
            if not dataset.mixture:  # a mixture has no shards of its own
                results += _if_there(name, paths.manifest(name), lambda path: _verify_dataset(path, pool))
        for stage in plan.stages:
            results += _results_of_stage(plan, stage.name, pool)
    return results


def _results_of_stage(plan: Plan, name: str, pool: ThreadPoolExecutor) -> Iterator[FolderIntegrity]:
    paths = plan.paths
    yield from _if_there(name, paths.stage(name).checkpoint, lambda path: _verify_stage(path, pool))
    for folder in _checkpoints(plan.weights_root(name)):
        yield from _if_there(name, folder, lambda path: _verify_checkpoint(name, path, pool))
    for weights in sorted(plan.weights_root(name).glob("*")):
        yield from _if_there(name, WeightsFolder(weights).samples, lambda path: _verify_packs(name, path, pool))
    for lock in paths.task_data_locks(name):
        yield from _if_there(name, lock, lambda path: _verify_task_data(name, path, pool))
    yield from _if_there(name, paths.export_manifest(name), lambda path: _verify_export(path, pool))


def _if_there(name: str, path: Path, verify: Callable[[Path], FolderIntegrity]) -> Iterator[FolderIntegrity]:
    """Yield the result of `verify` if there is an artifact at `path`."""
    if not path.exists():
        return
    try:
        yield verify(path)
    except (UserError, ValueError) as error:
        yield FolderIntegrity(name, path, 0, 0, error.message if isinstance(error, UserError) else f"{path}: {error}")


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


def _verify_tokenizer(path: Path, pool: ThreadPoolExecutor) -> FolderIntegrity:
    manifest = TokenizerManifest.read(path)
    return _verify_files("tokenizer", Path(manifest.path), manifest.files, pool)


def _verify_dataset(path: Path, pool: ThreadPoolExecutor) -> FolderIntegrity:
    manifest = DataManifest.read(path)
    root = Path(manifest.path)
    files = {str(file.relative_to(root)): sha256 for file, sha256 in dataset_files(manifest).items()}
    return _verify_files(manifest.dataset, root, files, pool)


def _verify_stage(path: Path, pool: ThreadPoolExecutor) -> FolderIntegrity:
    """Verify that the checkpoints and configs that checkpoint.json states are the ones on the disk."""
    checkpoint = Checkpoint.read(path)
    manifests = {f"{entry['path']}/{MANIFEST}": entry["sha256"] for entry in checkpoint.checkpoints.values()}
    return _verify_files(checkpoint.stage, Path(checkpoint.weights), manifests | checkpoint.configs, pool)


def _verify_streamed(name: str, source: LockedSource, pool: ThreadPoolExecutor) -> FolderIntegrity:
    """Verify the one file of rows that fetch streamed from the Hub."""
    files = {Path(file).name: source.get("sha256", "") for file in source.get("files", [])}
    return _verify_files(name, Path(source.get("path", "")), files, pool)


def _verify_packs(stage: str, folder: Path, pool: ThreadPoolExecutor) -> FolderIntegrity:
    files = {path.name: sha256 for path, sha256 in sorted(recorded_packs(folder).items())}
    return _verify_files(stage, folder, files, pool)


def _verify_task_data(stage: str, path: Path, pool: ThreadPoolExecutor) -> FolderIntegrity:
    """Verify the datasets of an evaluation task."""
    folder = path.with_suffix("")
    files = {
        os.path.relpath(Path(data["path"], file), folder): sha256
        for data in TaskDataLock.read(path).datasets
        for file, sha256 in data["files"].items()
    }
    return _verify_files(stage, folder, files, pool)


def _verify_export(path: Path, pool: ThreadPoolExecutor) -> FolderIntegrity:
    export = Export.read(path)
    return _verify_files(export.stage, Path(export.path), export.files, pool)


def _verify_files(name: str, folder: Path, files: Mapping[str, str], pool: ThreadPoolExecutor) -> FolderIntegrity:
    """Verify the files of a folder. files: name in the folder -> SHA-256."""

    def damage(entry: tuple[str, str]) -> str:
        file, sha256 = entry
        try:
            return "" if file_sha256(folder / file) == sha256 else f"{file} does not have the hash of the manifest"
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            return f"{file} cannot be read: {getattr(error, 'strerror', error)}"
        except UserError as error:
            return error.message

    damages = list(pool.map(damage, files.items()))
    size = sum((folder / file).stat().st_size for file in files if (folder / file).is_file())
    return FolderIntegrity(name, folder, len(files), size, next(filter(None, damages), ""))


def print_results(results: list[FolderIntegrity]) -> None:
    """Print one line per folder, and the number of damaged folders."""
    table = Table("dataset or stage", "folder", "files", "MB", "result")
    for result in results:
        size = f"{result.size_bytes / 1e6:,.1f}"
        line = (result.name, str(result.folder), str(result.files), size, result.damage or "intact")
        table.add_row(*(Text(printable(cell)) for cell in line))
    # Wide, because a wrapped path cannot be copied.
    Console(width=240, soft_wrap=True).print(table)
    damaged = sum(bool(result.damage) for result in results)
    print(f"{len(results)} folders, {damaged} damaged", flush=True)
