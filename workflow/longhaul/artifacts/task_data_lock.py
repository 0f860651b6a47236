"""Fields of task_data/<stage>/<task>.json: what fetch pinned for an evaluation task; and the key under which the job finds it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Artifact
from longhaul.artifacts.atomic_files import canonical_json
from longhaul.artifacts.typed_json import Sha256

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""Values of dataset_path with which `datasets` reads files instead of a repository of the Hub."""


class PinnedDataset(TypedDict):
    """One dataset that an evaluation task loads with datasets.load_dataset.

    request:  canonical JSON of the arguments of load_dataset
    revision: commit of the repository
    path:     folder that datasets.load_from_disk reads
    files:    name in the folder -> SHA-256
    """

    request: str
    revision: str
    path: str
    files: dict[str, Sha256]


@dataclass(frozen=True)
class TaskDataLock(Artifact):
    """`results/<run>/task_data/<stage>/<task>.json`: the datasets of an evaluation task or of a group's tasks."""

    hint: ClassVar[str] = "restore the file, or pin the newest revisions: longhaul fetch"

    datasets: list[PinnedDataset]

    @property
    def revisions(self) -> list[str]:
        """The repositories and their commits: "<repository>@<commit>"."""
        return sorted({f"{json.loads(data['request'])['path']}@{data['revision']}" for data in self.datasets})


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
