"""Fields of task_data/<stage>/<task>.json: what fetch pinned for an evaluation task; and the key under which the job finds it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Artifact
from longhaul.artifacts.atomic_files import canonical_json
from longhaul.artifacts.typed_json import Sha256

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""Values of dataset_path with which `datasets` reads files instead of a repository of the Hub."""
_FILE_OF_HUB = re.compile(r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/")


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
        requests = [(json.loads(data["request"]), data["revision"]) for data in self.datasets]
        return sorted({f"{hub_source(request['path'], request)[0]}@{commit}" for request, commit in requests})


def reads_local_files(path: str, options: dict[str, Any]) -> bool:
    """Return whether load_dataset(path, **options) reads files of this machine only."""
    return path in LOCAL_FORMATS and not any("://" in file for file in named_files(options))


def named_files(options: dict[str, Any]) -> list[str]:
    """Return the files of load_dataset's data_files: a text, a list, or either of them by split."""
    named = options.get("data_files", [])
    values = list(named.values()) if isinstance(named, dict) else [named]
    return [str(file) for value in values for file in (value if isinstance(value, list | tuple) else [value])]


def rename_files(named: Any, rename: Callable[[str], str]) -> Any:
    """Return load_dataset's data_files with other names: a text, a list, or either of them by split."""
    if isinstance(named, dict):
        return {split: rename_files(files, rename) for split, files in named.items()}
    if isinstance(named, list | tuple):
        return [rename_files(file, rename) for file in named]
    return rename(named) if isinstance(named, str) else named


def hub_source(path: str, options: dict[str, Any]) -> tuple[str, str]:
    """Return the repository of the Hub that load_dataset(path, **options) reads, and the revision that it asks for.

    The repository is `path`, or that of the files hf://datasets/<owner>/<name>/<file>, which some tasks read as json or csv.
    """
    if path in LOCAL_FORMATS and (found := _FILE_OF_HUB.match(next(iter(named_files(options)), ""))):
        return found["repository"], found["revision"] or "main"
    return path, options.get("revision") or "main"


def places_of_data(path: str, options: dict[str, Any]) -> list[str]:
    """Return the places that load_dataset(path, **options) reads: "<repository>@<revision>" of the Hub, or "this machine"."""
    places = set[str]()
    for file in named_files(options) or [""]:
        if found := _FILE_OF_HUB.match(file):
            places.add(f"{found['repository']}@{found['revision'] or 'main'}")
        else:
            places.add("this machine" if path in LOCAL_FORMATS else f"{path}@{options.get('revision') or 'main'}")
    return sorted(places)


def at_commit(path: str, options: dict[str, Any], commit: str) -> dict[str, Any]:
    """Return options of load_dataset that read all of the data at a commit, also for a task that would stream them."""
    whole = {key: value for key, value in options.items() if key != "streaming"}
    if path not in LOCAL_FORMATS:
        return whole | {"revision": commit}
    pinned = rf"hf://datasets/\g<repository>@{commit}/"
    return whole | {"data_files": rename_files(options["data_files"], lambda file: _FILE_OF_HUB.sub(pinned, file))}


def dataset_request(path: str, name: str | None, options: dict[str, Any]) -> str:
    """Return the arguments of load_dataset as canonical JSON. trust_remote_code has no effect since datasets 4."""
    kept = {key: value for key, value in options.items() if value is not None and key != "trust_remote_code"}
    return canonical_json({"path": path, "name": name, **kept})
