"""Compares files with the hashes in their manifest, for verified_inputs.py (training) and other jobs; reads a verified
tokenizer or export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from longhaul.artifacts.artifact_schemas import DataManifest, Export, TokenizerManifest
from longhaul.artifacts.atomic_files import file_sha256
from longhaul.errors import UserError

_THREADS = 8  # hashes are computed without Python's lock, and several reads at once keep a parallel file system busy

FileHashes = Mapping[Path, str]
"""File -> recorded hash."""


def wrong_files(files: FileHashes, file_hash: Callable[[Path], str] = file_sha256) -> Iterator[str]:
    """Yield what is wrong with each file that cannot be read or has another hash; files are read in parallel.

    file_hash: file_blake3 for files of a checkpoint
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from filter(None, pool.map(lambda path: _problem(path, files[path], file_hash), files))


def _problem(path: Path, recorded: str, file_hash: Callable[[Path], str]) -> str:
    try:
        found = file_hash(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    except UserError as error:
        return error.message
    return "" if found == recorded else f"{path} does not have the hash that was recorded when it was written"


def read_tokenizer(path: Path) -> TokenizerManifest:
    """Read a tokenizer's manifest, and verify the files of its folder.

    Raises:
        UserError: the manifest is invalid, or a file is missing or was altered.
    """
    manifest = TokenizerManifest.read(path)
    if problem := next(wrong_files(tokenizer_files(manifest)), None):
        raise UserError(f"tokenizer: {problem}", f"restore the file, or make the tokenizer again: rm {path}")
    return manifest


def read_export(path: Path) -> Export:
    """Read an export's manifest, and verify the files of its folder.

    The folder is that of the manifest, and not the link to the newest export, which another one may replace meanwhile.

    Raises:
        UserError: the manifest is invalid, or a file is missing or was altered.
    """
    export = Export.read(path)
    if problem := next(wrong_files({Path(export.path) / name: sha256 for name, sha256 in export.files.items()}), None):
        raise UserError(f"the export is damaged: {problem}", f"export it again: rm {path}, then run again")
    return export


def tokenizer_files(manifest: TokenizerManifest) -> dict[Path, str]:
    """Return the files of a tokenizer's folder."""
    return {Path(manifest.path) / name: sha256 for name, sha256 in manifest.files.items()}


def dataset_files(manifest: DataManifest, splits: Iterable[str] | None = None) -> dict[Path, str]:
    """Return the files of a dataset's splits (all, if none are named), or of those of the datasets that a mixture consists of."""
    if manifest.mixture:
        parts = [DataManifest.from_fields(part["manifest"]) for part in manifest.mixture]
        return {path: sha256 for part in parts for path, sha256 in dataset_files(part, splits).items()}
    root, files = Path(manifest.path), {}
    for name in splits or manifest.splits:
        split = manifest.splits[name]
        for shard in split["shards"]:
            files |= {root / f"{shard['prefix']}.{ending}": sha256 for ending, sha256 in shard["sha256"].items()}
        if "filtered_out" in split:
            files[root / split["filtered_out"]] = split.get("filtered_out_sha256", "")
    return files


def damaged_data(problem: str, data: DataManifest, manifest: Path) -> UserError:
    """Return the error for what wrong_files found in a dataset. Its remedy makes the same shards again.

    manifest: path of the dataset's or mixture's manifest, which the remedy deletes with the chunk's folder
    """
    path = Path(problem.split(" ", 1)[0])
    parts = [DataManifest.from_fields(part["manifest"]) for part in data.mixture] or [data]
    owner = next((part for part in parts if path.is_relative_to(part.path)), data)
    folder = Path(owner.path) / path.relative_to(owner.path).parts[0] if path.is_relative_to(owner.path) else path
    manifests = dict.fromkeys([manifest.with_name(f"{owner.dataset}.json"), manifest])
    return UserError(
        f"dataset {data.dataset}: {problem}",
        f"restore the file, or make it again: rm -r {folder} {' '.join(map(str, manifests))}; then run again",
    )
