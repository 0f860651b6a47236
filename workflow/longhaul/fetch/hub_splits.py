"""Lists the files of a hub dataset's configuration and split, and streams its first rows (max_documents)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from longhaul.artifacts.atomic_files import atomic_path, content_hash, file_sha256
from longhaul.config.dataset_config import Dataset, HubDataset
from longhaul.data.readers.columnar_files import without_null_fields
from longhaul.errors import UserError, printable


def list_split_files(source: HubDataset, commit: str) -> list[str]:
    """Return the files that `datasets` reads for a configuration and split.

    The dataset card's `configs` decide; without them, the file name patterns of `datasets` do.

    Raises:
        UserError: the configuration or the split does not exist.
    """
    config = _builder_config(source, commit)
    splits = config.data_files or {}
    if source.split not in splits:
        raise UserError(
            f"dataset {source.id} at {commit}, configuration {config.name}, has no split {source.split!r}",
            f"set the dataset's hub `split` to one of {', '.join(map(str, splits))}",
        )
    root = f"hf://datasets/{source.id}@{commit}/"
    return [str(file).removeprefix(root) for file in splits[source.split]]


def _builder_config(source: HubDataset, commit: str) -> Any:
    """Return the builder configuration of `datasets` for the card and the files: name, and split -> files. Reads no row."""
    from datasets import load_dataset_builder

    try:
        # An empty cache: `datasets` would answer from an earlier call's cache instead of asking the hub.
        with TemporaryDirectory() as cache:
            return load_dataset_builder(source.id, source.name, revision=commit, cache_dir=cache).config
    # Unknown name, no name but several configurations, or an invalid card.
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split("\n")[:2])
        raise UserError(
            f"dataset {source.id} at {commit}, name {source.name!r}: {reason}",
            "set the dataset's hub `name` to one of its configurations, or download it and set `files`",
        ) from None


def stream_rows(source: HubDataset, commit: str, dataset: Dataset, out: Path) -> dict[str, Any]:
    """Write the used columns of the split's first `max_documents` rows; return the file's entry of the lock file.

    The file name contains a hash of everything that decides the rows. An existing file is not streamed again.

    Raises:
        UserError: the configuration, the split or a column does not exist, or JSON cannot represent a value.
    """
    required, optional = dataset.columns.required(dataset.kind), dataset.columns.optional(dataset.kind)
    identity = [source.id, commit, source.name, source.split, source.max_documents, [*required, *optional]]
    path = out.with_stem(f"{out.stem}-{content_hash(identity)}")
    if not path.exists():
        list_split_files(source, commit)
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as lines:
            for number, row in enumerate(_rows(source, commit)):
                columns = [*required, *(name for name in optional if name in row)]
                if not number:
                    _print_unread(source.id, sorted(row.keys() - set(columns)))
                lines.write(_json_line(row, columns, f"dataset {source.id} at {commit}, row {number + 1}"))
    with path.open("rb") as lines:
        count = sum(1 for _ in lines)
    return {"path": str(path.parent), "files": [str(path)], "documents": count, "sha256": file_sha256(path)}


def _print_unread(dataset: str, columns: list[str]) -> None:
    if columns:
        unread = printable(", ".join(columns))
        print(f"dataset {dataset}: nothing reads the columns {unread}", file=sys.stderr, flush=True)


def _rows(source: HubDataset, commit: str) -> Any:
    from datasets import load_dataset

    with TemporaryDirectory() as cache:
        split = load_dataset(
            source.id, source.name, revision=commit, split=source.split, streaming=True, cache_dir=cache
        )
        yield from split.take(source.max_documents or 0)


def _json_line(row: dict[str, Any], columns: list[str], where: str) -> str:
    try:
        return json.dumps({column: without_null_fields(row[column]) for column in columns}, ensure_ascii=False) + "\n"
    except KeyError as error:
        remedy = f"set the dataset's `columns` to some of {', '.join(row)}"
        raise UserError(f"{where}: no column {error}", remedy) from None
    except TypeError as error:
        raise UserError(f"{where}: {error}", "set the dataset's `columns` to text columns") from None
