"""Resolves hub ids to commits, chooses which files of a repository are downloaded, and returns the content of the lock file.
Needs internet access.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from longhaul.artifacts.artifact_schemas import Lock, LockedSource
from longhaul.artifacts.atomic_files import writable_file
from longhaul.artifacts.paths import RunPaths
from longhaul.config.dataset_config import Dataset, HubDataset
from longhaul.config.field_types import HubSource
from longhaul.config.load_config import LoadedConfig
from longhaul.data.demo_corpus import write_demo_corpus
from longhaul.data.tokenizers.tokenizer_keys import check_tokenizer_keys
from longhaul.errors import UserError, first_line
from longhaul.fetch.hub_splits import list_split_files, stream_rows
from longhaul.planning import build_plan
from longhaul.planning.check_files_exist import model_config, read_model_folder
from longhaul.planning.check_pretrained_weights import check_pretrained_weights

_MODEL_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
_TOKENIZER_PATTERNS = [
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
    "config.json",
    "*.model",
]
_DATA_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".arrow", ".txt")


def pin_sources(loaded: LoadedConfig) -> None:
    """Download every hub source of a config, write the demo's corpus and the lock, and print which checks it made possible.

    Raises:
        UserError: a source cannot be downloaded, or the plan with it is refused.
    """
    paths = RunPaths(loaded.config.run)
    deferred = build_plan(loaded).deferred_checks
    lock = _fetch(loaded, paths.fetched)
    build_plan(loaded, lock)
    lock.write(writable_file(paths.lock))
    for check in deferred:
        print(f"checked now: {check}")


def _fetch(loaded: LoadedConfig, folder: Path) -> Lock:
    """Download every hub source and write the demo's corpus to a folder; return the content of the lock file.

    Files that are already complete are not downloaded again.

    Raises:
        UserError: a repository, revision or split does not exist or cannot be downloaded.
    """
    config = loaded.config
    sources: dict[str, dict[str, Any]] = {}
    model: dict[str, Any] = {}
    if config.tokenizer.hub:
        sources["tokenizer"] = _download_snapshot(config.tokenizer.hub, "model", _TOKENIZER_PATTERNS)
        check_tokenizer_keys(Path(sources["tokenizer"]["path"]))
    pretrained = config.model.pretrained
    if pretrained and pretrained.hub:
        patterns = [*_MODEL_PATTERNS, "*.py"] if pretrained.trust_remote_code else _MODEL_PATTERNS
        sources["model"] = _download_snapshot(pretrained.hub, "model", patterns)
        folder_of_model = Path(sources["model"]["path"])
        model = read_model_folder(folder_of_model, "model.pretrained.hub")
        model_config(loaded, Lock(model=model))  # refuses sizes and formats with which its tensors cannot be compared
        check_pretrained_weights(folder_of_model, model)
    for name, dataset in config.datasets.items():
        if dataset.hub:
            sources[name] = _download_dataset(dataset.hub, dataset, folder / f"{name}.jsonl")
        elif dataset.python_stdlib:
            sources[name] = write_demo_corpus(
                dataset.kind, dataset.python_stdlib, folder / f"{name}.jsonl", dataset.columns
            )
    return Lock(sources=cast(dict[str, LockedSource], sources), model=model)


def _download_snapshot(source: HubSource, kind: str, patterns: list[str]) -> dict[str, Any]:
    """Resolve a revision to its commit and download the files that match; complete files are not downloaded again."""
    from huggingface_hub import HfApi, snapshot_download

    with _hub_errors_as_user_errors(source, kind):
        commit = HfApi().repo_info(source.id, revision=source.revision, repo_type=kind).sha
        path = snapshot_download(source.id, revision=commit, repo_type=kind, allow_patterns=patterns)
    return {"hub": source.id, "revision": commit, "path": str(path)}


def _download_dataset(source: HubDataset, dataset: Dataset, streamed: Path) -> dict[str, Any]:
    """Download only the files of one configuration and split, or stream their first rows.

    The other files of a dataset may be terabytes.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _hub_errors_as_user_errors(source, "dataset"):
        commit = str(HfApi().dataset_info(source.id, revision=source.revision).sha)
        if source.max_documents:
            return {"hub": source.id, "revision": commit, **stream_rows(source, commit, dataset, streamed)}
        names = _supported_files(source, commit)
        patterns = [glob.escape(name) for name in names]
        path = snapshot_download(source.id, revision=commit, repo_type="dataset", allow_patterns=patterns)
    files = [str(Path(path) / name) for name in names]
    return {"hub": source.id, "revision": commit, "path": str(path), "files": files}


def _supported_files(source: HubDataset, commit: str) -> list[str]:
    """Return the files of a configuration and split; UserError where longhaul does not support their format."""
    names = list_split_files(source, commit)
    for name in names:
        if not name.removesuffix(".gz").removesuffix(".zst").endswith(_DATA_SUFFIXES):
            raise UserError(
                f"dataset {source.id} at {commit}: the format of {name} is not supported",
                f"supported are {', '.join(_DATA_SUFFIXES)}, also with .gz or .zst; convert the split and set `files`",
            )
    return names


@contextmanager
def _hub_errors_as_user_errors(source: HubSource, kind: str) -> Iterator[None]:
    """Convert errors of the hub and of the network to UserError."""
    import httpx2  # the HTTP client of huggingface_hub, whose errors are subclasses of HTTPError

    try:
        yield
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"cannot fetch {kind} {source.id} at {source.revision} from the hub: {first_line(error)}",
            "check the name, the network and `hf auth login`; or download it elsewhere and set its path",
        ) from None
