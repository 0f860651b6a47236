"""Reads every file of every dataset, checkpoint and export of a run and compares it with the hash stated when it was written."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from longhaul.artifacts.files import file_sha256, read_json
from longhaul.artifacts.schemas import DataManifest, Export
from longhaul.planning import Plan
from longhaul.train.checkpoint import folders as store

_HASHING_THREADS = 8


@dataclass(frozen=True)
class Verdict:
    """What came of one folder; `damage` names its first bad file and is empty when all is well."""

    of: str  # the dataset or stage
    folder: Path
    files: int
    size_bytes: int
    damage: str


def verify(plan: Plan, weights_roots: dict[str, Path], results: Path) -> list[Verdict]:
    """One verdict per dataset, per checkpoint in every weights folder of every stage, and per export.

    weights_roots: stage -> the folder that its weights folders lie in
    results: results/<run>
    """
    verdicts = []
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        for name, dataset in plan.config.datasets.items():
            manifest = results / "data" / f"{name}.json"
            if manifest.exists() and not dataset.mixture:  # a mixture's shards are those of its parts
                verdicts.append(_data(DataManifest.read(manifest), pool))
        for stage in plan.stages:
            for folder in _checkpoints(weights_roots[stage.name]):
                verdicts.append(_checkpoint(stage.name, folder, pool))
            export = results / "export" / f"{stage.name}.json"
            if export.exists():
                verdicts.append(_export(stage.name, Export.read(export), pool))
    return verdicts


def _checkpoints(weights_root: Path) -> Iterator[Path]:
    """Those set aside as damaged are there to be looked at: they count."""
    for weights in sorted(path for path in weights_root.glob("*") if (path / "checkpoints").is_dir()):
        yield from store.step_folders(weights).values()
        yield from sorted(weights.glob("checkpoints/step-*.corrupt*"))


def _checkpoint(stage: str, folder: Path, pool: ThreadPoolExecutor) -> Verdict:
    if wrong := store.wrong_sizes(folder):
        return Verdict(stage, folder, 0, 0, wrong)
    files = read_json(folder / store.MANIFEST)["files"]
    found = pool.map(lambda item: next(store.wrong_hashes(folder, [item]), ""), files.items())
    size = sum(entry["bytes"] for entry in files.values())
    return Verdict(stage, folder, len(files), size, next(filter(None, found), ""))


def _data(manifest: DataManifest, pool: ThreadPoolExecutor) -> Verdict:
    shards = [shard for split in manifest.splits.values() for shard in split["shards"]]
    files = {f"{shard['prefix']}.{ending}": sha256 for shard in shards for ending, sha256 in shard["sha256"].items()}
    return _files(manifest.dataset, Path(manifest.path), files, pool)


def _export(stage: str, export: Export, pool: ThreadPoolExecutor) -> Verdict:
    return _files(stage, Path(export.path), export.files, pool)


def _files(of: str, folder: Path, files: dict[str, str], pool: ThreadPoolExecutor) -> Verdict:
    """files: name in the folder -> sha256."""

    def damage(item: tuple[str, str]) -> str:
        name, sha256 = item
        try:
            return "" if file_sha256(folder / name) == sha256 else f"{name} has not the hash that was stated"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"

    found = list(pool.map(damage, files.items()))
    size = sum((folder / name).stat().st_size for name in files if (folder / name).exists())
    return Verdict(of, folder, len(files), size, next(filter(None, found), ""))


def print_verdicts(verdicts: list[Verdict]) -> None:
    """The table for people."""
    table = Table("of", "folder", "files", "MB", "result")
    for verdict in verdicts:
        size = f"{verdict.size_bytes / 1e6:,.1f}"
        table.add_row(verdict.of, str(verdict.folder), str(verdict.files), size, verdict.damage or "whole")
    # A path that is cut or wrapped cannot be copied.
    Console(width=240, soft_wrap=True).print(table)
    damaged = sum(bool(verdict.damage) for verdict in verdicts)
    print(f"{len(verdicts)} folders, {damaged} damaged", flush=True)
