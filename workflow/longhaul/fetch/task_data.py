"""Downloads the datasets of evaluation tasks at a pinned revision, and stores them where jobs without a network read them."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longhaul.artifacts.atomic_files import content_hash, file_sha256, write_json
from longhaul.artifacts.compare_hashes import wrong_files
from longhaul.artifacts.paths import RunPaths
from longhaul.artifacts.task_data_lock import (
    PinnedDataset,
    TaskDataLock,
    at_commit,
    dataset_request,
    hub_source,
    reads_local_files,
)
from longhaul.artifacts.typed_json import Sha256, read_typed_json
from longhaul.compat.lm_eval import build_tasks
from longhaul.config.load_config import LoadedConfig
from longhaul.errors import UserError, first_line
from longhaul.planning.evaluation_tasks import check_one_place, own_task

_INSTALL = "pip install 'longhaul[evaluate]' where longhaul runs"


def pin_task_data(loaded: LoadedConfig, stage: str, task: str) -> None:
    """Store every dataset that a task of a stage loads, and write its lock; a whole stored dataset is not downloaded again.

    Each dataset is in a folder beside the lock, named by a hash of repository, revision and options. A record of the files'
    hashes is beside the folder, and is written last.

    Raises:
        UserError: lm_eval is not installed, the task does not exist, cannot be built or has a metric that is code of the Hub, or
            its data cannot be downloaded.
    """
    key = f"stages.{stage}.evaluate"
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{key} needs the package lm_eval", _INSTALL)
    lock = RunPaths(loaded.config.run).task_data(stage, task)
    recorder = _Recorder(lock.with_suffix(""), f"{key}, task {task}")
    own = own_task(loaded, next(found for found in loaded.config.stages if found.name == stage), task)
    try:
        build_tasks([task], {task: own.config} if own else {}, recorder.load)
    except KeyError:
        raise UserError(
            f"{key}.tasks: lm_eval has no task or group {task!r}",
            f"list the names: lm_eval ls tasks; or define it in {key}.files",
        ) from None
    TaskDataLock(list(recorder.found.values())).write(lock)


class _Recorder:
    """Downloads what a task loads, and remembers it.

    where: the task, for messages
    """

    def __init__(self, folder: Path, where: str) -> None:
        from datasets import load_dataset

        self.found: dict[str, PinnedDataset] = {}
        self._folder, self._where = folder, where
        self._download: Callable[..., Any] = load_dataset

    def load(self, path: str, name: str | None = None, **options: Any) -> Any:
        """Return a dataset as datasets.load_dataset does, and store it unless it consists of local files."""
        from huggingface_hub import HfApi

        check_one_place(self._where, path, options)
        if reads_local_files(path, options):
            return self._download(path=path, name=name, **options)
        request = dataset_request(path, name, options)
        if request not in self.found:
            repository, revision = hub_source(path, options)
            with _download_errors_named(self._where, repository):
                commit = str(HfApi().dataset_info(repository, revision=str(revision)).sha)
                self.found[request] = self._store(request, path, name, options, commit)
        return _open(self.found[request]["path"])

    def _store(self, request: str, path: str, name: str | None, options: dict[str, Any], commit: str) -> PinnedDataset:
        folder = self._folder / content_hash([request, commit])
        record = folder.with_suffix(".json")
        if not _is_whole(folder, record):
            shutil.rmtree(folder, ignore_errors=True)  # damaged, or of a fetch that was killed
            self._download(path=path, name=name, **at_commit(path, options, commit)).save_to_disk(folder)
            files = {str(file.relative_to(folder)): file_sha256(file) for file in folder.rglob("*") if file.is_file()}
            write_json(record, dict(sorted(files.items())))
        files = read_typed_json(record, dict[str, Sha256])
        return PinnedDataset(request=request, revision=commit, path=str(folder), files=files)


def _is_whole(folder: Path, record: Path) -> bool:
    """Return whether a stored dataset has the files of its record."""
    files = read_typed_json(record, dict[str, Sha256]) if record.exists() else {}
    return bool(files) and not any(wrong_files({folder / file: sha256 for file, sha256 in files.items()}))


@contextmanager
def _download_errors_named(where: str, repository: str) -> Iterator[None]:
    """Raise UserError in place of errors of the Hub, of the network, and of `datasets`, which has types of its own."""
    import httpx2  # the HTTP client of huggingface_hub
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (httpx2.HTTPError, DatasetsError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{where}: cannot download the dataset {repository} of the Hub: {first_line(error.__cause__ or error)}",
            "check its name and options in the task, the network, and `hf auth login` where the dataset asks for it",
        ) from None


def _open(folder: str) -> Any:
    from datasets import load_from_disk

    return load_from_disk(folder)
