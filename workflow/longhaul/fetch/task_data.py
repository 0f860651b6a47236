"""Downloads the datasets of evaluation tasks at a pinned revision, and stores them where jobs without a network read them."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longhaul.artifacts.atomic_files import content_hash, file_sha256, write_json
from longhaul.artifacts.paths import RunPaths
from longhaul.artifacts.task_data_lock import PinnedDataset, TaskDataLock, dataset_request, reads_local_files
from longhaul.artifacts.typed_json import Sha256, read_typed_json
from longhaul.compat.lm_eval import build_tasks
from longhaul.config.load_config import LoadedConfig
from longhaul.errors import UserError, first_line
from longhaul.planning.evaluation_tasks import own_task

_INSTALL = "pip install 'longhaul[evaluate]' where longhaul runs"


def pin_task_data(loaded: LoadedConfig, stage: str, task: str) -> None:
    """Store every dataset that a task of a stage loads, and write its lock; a stored dataset is not downloaded again.

    Each dataset is in a folder beside the lock, named by a hash of repository, revision and options. A record of the files'
    hashes is beside the folder, and is written last.

    Raises:
        UserError: lm_eval is not installed, the task does not exist or has a metric that is code of the Hub, or its data cannot
            be downloaded.
    """
    key = f"stages.{stage}.evaluate"
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{key} needs the package lm_eval", _INSTALL)
    lock = RunPaths(loaded.config.run).task_data(stage, task)
    recorder = _Recorder(lock.with_suffix(""))
    own = own_task(loaded, next(found for found in loaded.config.stages if found.name == stage), task)
    try:
        build_tasks([task], {task: own.config} if own else {}, recorder.load)
    except KeyError:
        raise UserError(
            f"{key}.tasks: lm_eval has no task or group {task!r}",
            f"list the names: lm_eval ls tasks; or define it in {key}.files",
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{key}: cannot download the data of task {task}: {first_line(error)}",
            "check the network, and `hf auth login` where the dataset asks for it",
        ) from None
    TaskDataLock(list(recorder.found.values())).write(lock)


class _Recorder:
    """Downloads what tasks load, and remembers it."""

    def __init__(self, folder: Path) -> None:
        from datasets import load_dataset

        self.found: dict[str, PinnedDataset] = {}
        self._folder = folder
        self._download: Callable[..., Any] = load_dataset

    def load(self, path: str, name: str | None = None, **options: Any) -> Any:
        """Return a dataset as datasets.load_dataset does, and store it unless it consists of local files."""
        if reads_local_files(path, options):
            return self._download(path=path, name=name, **options)
        request = dataset_request(path, name, options)
        if request not in self.found:
            self.found[request] = self._store(request, path, name, options)
        return _open(self.found[request]["path"])

    def _store(self, request: str, path: str, name: str | None, options: dict[str, Any]) -> PinnedDataset:
        from huggingface_hub import HfApi

        commit = str(HfApi().dataset_info(path, revision=options.get("revision", "main")).sha)
        folder = self._folder / content_hash([request, commit])
        record = folder.with_suffix(".json")
        if not (folder.exists() and record.exists()):
            shutil.rmtree(folder, ignore_errors=True)  # of a fetch that was killed
            self._download(path=path, name=name, **(options | {"revision": commit})).save_to_disk(folder)
            files = {str(file.relative_to(folder)): file_sha256(file) for file in folder.rglob("*") if file.is_file()}
            write_json(record, dict(sorted(files.items())))
        files = read_typed_json(record, dict[str, Sha256])
        return PinnedDataset(request=request, revision=commit, path=str(folder), files=files)


def _open(folder: str) -> Any:
    from datasets import load_from_disk

    return load_from_disk(folder)
