"""Opens the datasets that fetch stored for evaluation tasks; nothing reaches the network, and recorded hashes are checked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longhaul.artifacts.compare_hashes import wrong_files
from longhaul.artifacts.task_data_lock import PinnedDataset, dataset_request, reads_local_files
from longhaul.errors import UserError


class OfflineDatasets:
    """Stands in for datasets.load_dataset in a job.

    cache: a folder of this job alone, because jobs that share `datasets`' own cache could read each other's unfinished files
    """

    def __init__(self, stored: Iterable[PinnedDataset], cache: Path) -> None:
        from datasets import load_dataset

        self._stored = {data["request"]: data for data in stored}
        self._read_local_files, self._cache = load_dataset, str(cache)

    def load(self, path: str, name: str | None = None, **options: Any) -> Any:
        """Return a dataset from local files, or from what fetch stored.

        Raises:
            UserError: fetch did not store this dataset, or its files are damaged.
        """
        from datasets import load_from_disk

        if reads_local_files(path, options):
            return self._read_local_files(path=path, name=name, **options, cache_dir=self._cache)
        data = self._stored.get(dataset_request(path, name, options))
        if data is None:
            raise UserError(
                f"the dataset {path}{f', configuration {name},' if name else ''} of the task is not in the lock of its data",
                "fetch it where there is a network: longhaul fetch CONFIG; then run again",
            )
        folder = Path(data["path"])
        if problem := next(wrong_files({folder / file: sha256 for file, sha256 in data["files"].items()}), None):
            raise UserError(f"task data: {problem}", f"download it again: rm -r {folder}; longhaul fetch CONFIG")
        return load_from_disk(str(folder))
