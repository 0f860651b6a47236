"""Builds tasks of lm_eval with datasets from elsewhere than the Hub, for which it has no option. Written for lm_eval 0.4.13."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def build_tasks(
    names: Iterable[str], own: Mapping[str, dict[str, Any]], load_dataset: Callable[..., Any]
) -> dict[str, list[Any]]:
    """Return by name the tasks and groups of lm_eval. Building a task loads its dataset.

    own:          task -> its keys, for tasks of the user; all other names are looked up in lm_eval's own tasks
    load_dataset: has the arguments of datasets.load_dataset, and is called instead of it

    Raises:
        KeyError: lm_eval has no task or group of a name.
    """
    from lm_eval.tasks import TaskManager

    names = list(names)
    manager = TaskManager(include_defaults=any(name not in own for name in names))
    built: dict[str, list[Any]] = {}
    with _datasets_loaded_with(load_dataset):
        for name in names:
            found = manager.load([dict(own[name])] if name in own else [name])
            built[name] = list(found.get("groups", {}).values())[:1] or list(found["tasks"].values())
    return built


@contextmanager
def _datasets_loaded_with(load_dataset: Callable[..., Any]) -> Iterator[None]:
    """Replace datasets.load_dataset in the block.

    Tasks call `datasets.load_dataset(path=…, name=…, **dataset_kwargs)` while they are built (lm_eval/api/task.py). No option of
    the harness pins a revision, or reads the data from somewhere else on a node without a network.
    """
    import datasets

    original = datasets.load_dataset
    datasets.load_dataset = load_dataset  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        datasets.load_dataset = original  # pyright: ignore[reportPrivateImportUsage]
