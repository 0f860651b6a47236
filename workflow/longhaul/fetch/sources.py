"""Resolves hub ids to commits and downloads them; collects the demo's text. Runs where there is internet."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from longhaul.artifacts import Lock
from longhaul.config.fields import HubSource
from longhaul.config.load import LoadedConfig
from longhaul.config.models import HubDataset
from longhaul.errors import UserError
from longhaul.fetch.stdlib import collect
from longhaul.plan.sources import model_folder

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
_TOKENIZER = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.jinja", "config.json", "*.model"]
_DATA_ENDINGS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".arrow", ".txt")


def fetch(loaded: LoadedConfig, folder: Path) -> Lock:
    """Downloads every hub source of a config and collects local ones; resumable, and quick when all is there.

    Raises UserError when a repository, revision or split cannot be had.
    """
    config = loaded.config
    sources: dict[str, dict[str, Any]] = {}
    model: dict[str, Any] = {}
    if config.tokenizer.hub:
        sources["tokenizer"] = _snapshot(config.tokenizer.hub, "model", _TOKENIZER)
    pretrained = config.model.pretrained
    if pretrained and pretrained.hub:
        patterns = [*_WEIGHTS, "*.py"] if pretrained.trust_remote_code else _WEIGHTS
        sources["model"] = _snapshot(pretrained.hub, "model", patterns)
        model = model_folder(Path(sources["model"]["path"]), "model.pretrained.hub")
    for name, dataset in config.datasets.items():
        if dataset.hub:
            sources[name] = _dataset(dataset.hub)
        elif dataset.python_stdlib:
            sources[name] = collect(dataset.kind, dataset.python_stdlib, folder / f"{name}.jsonl", dataset.columns)
    return Lock(sources=sources, model=model)


def _snapshot(source: HubSource, kind: str, patterns: list[str]) -> dict[str, Any]:
    """Pins a revision to its commit and downloads the files that match; finished files are not fetched again."""
    from huggingface_hub import HfApi, snapshot_download

    with _asking(source, kind):
        commit = HfApi().repo_info(source.id, revision=source.revision, repo_type=kind).sha
        path = snapshot_download(source.id, revision=commit, repo_type=kind, allow_patterns=patterns)
    return {"hub": source.id, "revision": commit, "path": str(path)}


def _dataset(source: HubDataset) -> dict[str, Any]:
    """The data files of one configuration and split alone: a data set's others may be terabytes."""
    from huggingface_hub import HfApi, snapshot_download

    with _asking(source, "dataset"):
        commit = str(HfApi().dataset_info(source.id, revision=source.revision).sha)
        names = _data_files(source, commit)
        patterns = [glob.escape(name) for name in names]
        path = snapshot_download(source.id, revision=commit, repo_type="dataset", allow_patterns=patterns)
    files = [str(Path(path) / name) for name in names]
    return {"hub": source.id, "revision": commit, "path": str(path), "files": files}


def _data_files(source: HubDataset, commit: str) -> list[str]:
    """The files that `datasets` reads for a configuration and split: by the card's `configs`, else by its patterns of names.

    Raises:
        UserError: there is no such configuration or split, or longhaul does not read its files' format.
    """
    configuration = _configuration(source, commit)
    splits = configuration.data_files or {}
    where = f"dataset {source.id} at {commit}, configuration {configuration.name}"
    if source.split not in splits:
        raise UserError(f"{where}, has no split {source.split!r}", f"its splits are {', '.join(map(str, splits))}")
    root = f"hf://datasets/{source.id}@{commit}/"
    names = [str(file).removeprefix(root) for file in splits[source.split]]
    for name in names:
        if not name.removesuffix(".gz").removesuffix(".zst").endswith(_DATA_ENDINGS):
            raise UserError(
                f"{where}: {name} is in a format that is not read here",
                f"read are {', '.join(_DATA_ENDINGS)}, with .gz or .zst too; convert the split and give `files`",
            )
    return names


def _configuration(source: HubDataset, commit: str) -> Any:
    """The builder configuration that `datasets` makes of the card and the files, no row read: name, and split -> files."""
    from datasets import load_dataset_builder

    try:
        # What an earlier call left in a cache would stand in for an answer of the hub.
        with TemporaryDirectory() as cache:
            return load_dataset_builder(source.id, source.name, revision=commit, cache_dir=cache).config
    except (ValueError, TypeError, RuntimeError) as error:  # a wrong name, no name where several are, a broken card
        reason = " ".join(str(error).split("\n")[:2])
        raise UserError(
            f"dataset {source.id} at {commit}, name {source.name!r}: {reason}",
            "set the dataset's hub `name` to one of its configurations, or download it and give `files`",
        ) from None


@contextmanager
def _asking(source: HubSource, kind: str) -> Iterator[None]:
    """Turns what the hub and the network answer into a UserError."""
    import httpx2  # what huggingface_hub speaks through; its own errors are subclasses

    try:
        yield
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"cannot fetch {kind} {source.id} at {source.revision} from the hub: {_first_line(error)}",
            "check the name, the network and `hf auth login`; or download it elsewhere and give its path",
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
