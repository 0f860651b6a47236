"""Builds tasks of lm_eval with datasets from elsewhere than the Hub, without metrics of the Hub, and with sandboxed templates.

lm_eval has no option for any of them. Written for lm_eval 0.4.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from longhaul.compat.jinja_sandbox import TaskTemplates
from longhaul.errors import InputError, UserError, first_line


def build_tasks(
    names: Iterable[str], own: Mapping[str, dict[str, Any]], load_dataset: Callable[..., Any]
) -> dict[str, list[Any]]:
    """Return by name the tasks and groups of lm_eval. Building a task loads its dataset.

    What tasks make of their data is kept in a temporary folder of this process.

    own:          task -> its keys, for tasks of the user; all other names are looked up in lm_eval's own tasks
    load_dataset: has the arguments of datasets.load_dataset, and is called instead of it

    Raises:
        KeyError: lm_eval has no task or group of a name.
        UserError: a task has a metric that is code of the Hub, needs a package that is not installed, or its keys do not fit
            each other or the data.
    """
    from lm_eval.tasks import TaskManager

    _sandbox_templates()
    names = list(names)
    manager = TaskManager(include_defaults=any(name not in own for name in names))
    built: dict[str, list[Any]] = {}
    with _datasets_loaded_with(load_dataset):
        for name in names:
            if name not in own and name not in manager.task_index:
                raise KeyError(name)
            with _missing_packages_named(name), no_metrics_of_the_hub(name), _wrong_keys_named(name):
                found = manager.load([dict(own[name])] if name in own else [name])
            built[name] = list(found.get("groups", {}).values())[:1] or list(found["tasks"].values())
    return built


def _sandbox_templates() -> None:
    """Let templates such as doc_to_text compute no more than a prompt: jinja's sandbox renders them in this process.

    In lm_eval's own environment, a template reaches Python's modules through attributes such as __globals__, and so a shell.
    """
    from lm_eval import utils

    utils.env = TaskTemplates()


@contextmanager
def _datasets_loaded_with(load_dataset: Callable[..., Any]) -> Iterator[None]:
    """Replace datasets.load_dataset in the block.

    Tasks call `datasets.load_dataset(path=…, name=…, **dataset_kwargs)` while they are built (lm_eval/api/task.py). No option of
    the harness pins a revision, or reads the data from somewhere else on a node without a network.
    """
    import datasets

    # Tasks transform documents, also after the block. `datasets` would keep the results as cache-*.arrow files beside the data,
    # which are pinned and may lie where a job cannot write.
    datasets.disable_caching()
    original = datasets.load_dataset
    datasets.load_dataset = load_dataset  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        datasets.load_dataset = original  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def _missing_packages_named(task: str) -> Iterator[None]:
    """Raise UserError in place of ImportError: code of single tasks imports packages that only extras of lm_eval install."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"task {task} needs the package {error.name or error}, which lm_eval installs only with an extra",
            "pip install it where longhaul runs and in the job environment, or remove the task",
        ) from None


@contextmanager
def _wrong_keys_named(task: str) -> Iterator[None]:
    """Raise InputError in place of what lm_eval raises for wrong keys: errors of many types, such as KeyError for a split."""
    try:
        yield
    except (ImportError, OSError, UserError):
        raise
    except Exception as error:
        raise InputError(
            f"lm_eval cannot build task {task} from its keys and its data: {type(error).__name__}: {first_line(error)}",
            "correct the task file; for a task of lm_eval, use another one",
        ) from error


@contextmanager
def no_metrics_of_the_hub(task: str) -> Iterator[None]:
    """Refuse evaluate.load in the block, which downloads Python code from the Hub and runs it.

    lm_eval calls it for metrics that are not in its registry, and ignores that it fails (lm_eval/api/registry.py, get_metric);
    the task then fails after the last answer.

    Raises:
        UserError: evaluate.load was called.
    """
    import evaluate

    original = evaluate.load
    asked: list[str] = []

    def refuse(path: str, *_: object, **__: object) -> None:
        asked.append(path)
        raise RuntimeError(f"the metric {path} is code of the Hub")

    evaluate.load = refuse
    try:
        yield
    finally:
        evaluate.load = original
        if asked:
            raise UserError(
                f"task {task} has the metric {asked[0]}, which is not part of lm_eval: it is Python code that is downloaded from "
                "the Hub and run",
                "use another task, or write a task file with a metric of lm_eval",
            )
