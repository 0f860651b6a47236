"""Builds the key of an evaluation task's dataset in <run>.lock.json, under which fetch stores it and the job finds it."""

from __future__ import annotations

from typing import Any

from longhaul.artifacts.atomic_files import canonical_json

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""Values of dataset_path with which `datasets` reads files instead of a repository of the Hub."""


def reads_local_files(path: str, options: dict[str, Any]) -> bool:
    """Return whether load_dataset(path, **options) reads files of this machine only."""
    return path in LOCAL_FORMATS and not any("://" in file for file in named_files(options))


def named_files(options: dict[str, Any]) -> list[str]:
    """Return the files of load_dataset's data_files: a text, a list, or either of them by split."""
    named = options.get("data_files", [])
    values = list(named.values()) if isinstance(named, dict) else [named]
    return [str(file) for value in values for file in (value if isinstance(value, list | tuple) else [value])]


def dataset_request(path: str, name: str | None, options: dict[str, Any]) -> str:
    """Return the arguments of load_dataset as canonical JSON. trust_remote_code has no effect since datasets 4."""
    kept = {key: value for key, value in options.items() if value is not None and key != "trust_remote_code"}
    return canonical_json({"path": path, "name": name, **kept})
