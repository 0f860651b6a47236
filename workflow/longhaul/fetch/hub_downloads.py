"""Resolves hub ids to commits and downloads them; collects the demo's text. Runs where there is internet."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longhaul.artifacts.schemas import Lock
from longhaul.config.dataset_config import Dataset, HubDataset
from longhaul.config.field_types import HubSource
from longhaul.config.load import LoadedConfig
from longhaul.data.demo_corpus import collect
from longhaul.errors import UserError, first_line
from longhaul.fetch.hub_splits import split_files, stream
from longhaul.planning.input_files import model_folder

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
            sources[name] = _dataset(dataset.hub, dataset, folder / f"{name}.jsonl")
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


def _dataset(source: HubDataset, dataset: Dataset, streamed: Path) -> dict[str, Any]:
    """The data files of one configuration and split alone, or their first rows: a data set's others may be terabytes."""
    from huggingface_hub import HfApi, snapshot_download

    with _asking(source, "dataset"):
        commit = str(HfApi().dataset_info(source.id, revision=source.revision).sha)
        if source.max_documents:
            return {"hub": source.id, "revision": commit, **stream(source, commit, dataset, streamed)}
        names = _data_files(source, commit)
        patterns = [glob.escape(name) for name in names]
        path = snapshot_download(source.id, revision=commit, repo_type="dataset", allow_patterns=patterns)
    files = [str(Path(path) / name) for name in names]
    return {"hub": source.id, "revision": commit, "path": str(path), "files": files}


def _data_files(source: HubDataset, commit: str) -> list[str]:
    """The files of a configuration and split; UserError also where longhaul does not read their format."""
    names = split_files(source, commit)
    for name in names:
        if not name.removesuffix(".gz").removesuffix(".zst").endswith(_DATA_ENDINGS):
            raise UserError(
                f"dataset {source.id} at {commit}: {name} is in a format that is not read here",
                f"read are {', '.join(_DATA_ENDINGS)}, with .gz or .zst too; convert the split and give `files`",
            )
    return names


@contextmanager
def _asking(source: HubSource, kind: str) -> Iterator[None]:
    """Turns what the hub and the network answer into a UserError."""
    import httpx2  # what huggingface_hub speaks through; its own errors are subclasses

    try:
        yield
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"cannot fetch {kind} {source.id} at {source.revision} from the hub: {first_line(error)}",
            "check the name, the network and `hf auth login`; or download it elsewhere and give its path",
        ) from None
