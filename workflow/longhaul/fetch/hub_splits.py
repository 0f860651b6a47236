"""A split of a hub data set, as `datasets` understands it: which files it is, and its first rows without their download."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from longhaul.artifacts.files import atomic_path, content_hash, file_sha256
from longhaul.config.dataset_config import Dataset, HubDataset
from longhaul.errors import UserError


def split_files(source: HubDataset, commit: str) -> list[str]:
    """The files that `datasets` reads for a configuration and split: by the card's `configs`, else by its patterns of names.

    Raises:
        UserError: there is no such configuration or split.
    """
    configuration = _configuration(source, commit)
    splits = configuration.data_files or {}
    if source.split not in splits:
        raise UserError(
            f"dataset {source.id} at {commit}, configuration {configuration.name}, has no split {source.split!r}",
            f"its splits are {', '.join(map(str, splits))}",
        )
    root = f"hf://datasets/{source.id}@{commit}/"
    return [str(file).removeprefix(root) for file in splits[source.split]]


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


def stream(source: HubDataset, commit: str, dataset: Dataset, out: Path) -> dict[str, Any]:
    """Writes the columns that are read of the split's first `max_documents` rows, and says what is in the file.

    It is named by all that decides its rows, and one that is there is not streamed again.

    Raises:
        UserError: no such configuration, split or column, or a value that JSON has no word for.
    """
    columns = _columns(dataset)
    wanted = [source.id, commit, source.name, source.split, source.max_documents, columns]
    path = out.with_stem(f"{out.stem}-{content_hash(wanted)}")
    if not path.exists():
        split_files(source, commit)
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as lines:
            for number, row in enumerate(_rows(source, commit)):
                lines.write(_line(row, columns, f"dataset {source.id} at {commit}, row {number + 1}"))
    with path.open("rb") as lines:
        count = sum(1 for _ in lines)
    return {"path": str(path.parent), "files": [str(path)], "documents": count, "sha256": file_sha256(path)}


def _columns(dataset: Dataset) -> list[str]:
    columns = dataset.columns
    if dataset.kind == "text":
        return [columns.text]
    return [columns.prompt, columns.completion] if columns.prompt and columns.completion else [columns.messages]


def _rows(source: HubDataset, commit: str) -> Any:
    from datasets import load_dataset

    with TemporaryDirectory() as cache:
        split = load_dataset(
            source.id, source.name, revision=commit, split=source.split, streaming=True, cache_dir=cache
        )
        yield from split.take(source.max_documents or 0)


def _line(row: dict[str, Any], columns: list[str], where: str) -> str:
    try:
        return json.dumps({column: row[column] for column in columns}, ensure_ascii=False) + "\n"
    except KeyError as error:
        raise UserError(f"{where}: there is no column {error}", f"its columns are {', '.join(row)}") from None
    except TypeError as error:
        raise UserError(f"{where}: {error}", "name columns of text") from None
