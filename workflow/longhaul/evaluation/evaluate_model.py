"""Evaluates one model on one task or group of lm-evaluation-harness, and writes the scores with their standard errors."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from longhaul.artifacts.atomic_files import content_hash
from longhaul.artifacts.compare_hashes import read_export
from longhaul.artifacts.evaluation_result import EvaluationResult, Score
from longhaul.artifacts.task_data_lock import TaskDataLock
from longhaul.compat.lm_eval import build_tasks, no_metrics_of_the_hub
from longhaul.errors import UserError
from longhaul.evaluation.offline_datasets import OfflineDatasets
from longhaul.evaluation.served_model import run_part_of_served_model, served_model
from longhaul.jobs.kinds.evaluate_job import EvaluateSpec
from longhaul.runtime.process_rank import forget_launcher
from longhaul.runtime.rank_placement import computes_on_gpus
from longhaul.serving.engine_version import engine_version
from longhaul.serving.link_server_nodes import NodeLink, node_link

_BOOTSTRAP_SAMPLES = 1000
"""For metrics without a formula of the standard error, such as F1, for which lm_eval's 100,000 take too long.
For BLEU, chrF and TER, lm_eval takes at most 100 of whatever it is given: their standard errors are its own."""


def run(job: EvaluateSpec) -> None:
    """Evaluate the model and write job.out on the first node.

    Raises:
        UserError: lm_eval or the engine is missing, the export is damaged, the task does not exist, its data are missing, or a
            metric is code of the Hub.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluate needs the package lm_eval", "pip install 'longhaul[evaluate]' in the job environment")
    with node_link(job.nodes) as link:
        if link is None or link.rank == 0:
            _score(job, link)
        else:
            run_part_of_served_model(job, _verified_model(job)[0], link)


def _score(job: EvaluateSpec, link: NodeLink | None) -> None:
    """Evaluate the model on the first node, and write job.out."""
    engine = f"{job.serving.engine} {engine_version(job.serving)}" if job.serving else "transformers"
    folder, weights = _verified_model(job)
    pinned = TaskDataLock.read(Path(job.task_data)) if job.task_data else TaskDataLock([])
    with TemporaryDirectory() as cache:
        tasks = _build_tasks(job, OfflineDatasets(pinned.datasets, Path(cache)))
        with served_model(job, folder, link) if job.serving else _loaded_model(job, folder) as model:
            template = model.tokenizer.chat_template if job.chat else None
            results = _evaluate(job, model, tasks, with_chat_template=bool(template))
    EvaluationResult(
        stage=job.stage,
        model=job.model,
        task=job.task,
        path=folder,
        weights=weights,
        scores=read_scores(results),
        settings={
            "limit": job.limit,
            "num_fewshot": job.num_fewshot,
            "batch_size": job.batch_size,
            "chat_template_hash": content_hash(template) if template else None,
            "seed": job.seed,
            "engine": engine,
            **{name: version(name) for name in ("lm_eval", "transformers", "torch")},
        },
        data=pinned.revisions,
    ).write(Path(job.out))


@contextmanager
def _loaded_model(job: EvaluateSpec, folder: str) -> Iterator[Any]:
    """Yield lm_eval's wrapper of the model in a Hugging Face folder, with which transformers computes in this process."""
    from lm_eval.models.huggingface import HFLM

    forget_launcher()
    on_gpu = computes_on_gpus()
    create: Any = HFLM  # its arguments are those of a class that a decorator hides
    yield create(
        pretrained=folder,
        dtype="auto",
        batch_size=job.batch_size,
        device="cuda" if on_gpu else "cpu",
        parallelize=on_gpu and job.gpus > 1,
    )


def _evaluate(job: EvaluateSpec, model: Any, tasks: list[Any], with_chat_template: bool) -> dict[str, Any]:
    """Return the results of lm_eval.simple_evaluate."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    os.environ["DISABLE_MULTIPROC"] = "1"  # else lm_eval forks one process per core for what one process computes
    with no_metrics_of_the_hub(job.task):
        results = simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),  # another one would read 14,000 task files for 8 s
            num_fewshot=job.num_fewshot,
            limit=job.limit,
            apply_chat_template=with_chat_template,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP_SAMPLES,
            random_seed=job.seed,
            numpy_random_seed=job.seed,
            torch_random_seed=job.seed,
            fewshot_random_seed=job.seed,
        )
    if results is None:
        raise RuntimeError("lm_eval gives results on its rank 0 alone; this job must have one rank")
    return dict(results)


def _verified_model(job: EvaluateSpec) -> tuple[str, str | None]:
    """Return the model's folder and a hash of its files' recorded hashes, after a check of the files.

    A pretrained model has no recorded hashes: None.
    """
    if job.export is None:
        return job.pretrained or "", None
    export = read_export(Path(job.export))
    return export.path, content_hash(export.files)


def _build_tasks(job: EvaluateSpec, data: OfflineDatasets) -> list[Any]:
    own = {job.task: job.own_task} if job.own_task else {}
    try:
        return build_tasks([job.task], own, data.load)[job.task]
    except KeyError:
        raise UserError(
            f"lm_eval {version('lm_eval')} has no task or group {job.task!r}", "list the names: lm_eval ls tasks"
        ) from None


def read_scores(results: dict[str, Any]) -> list[Score]:
    """Return the scores in the results of lm_eval.simple_evaluate.

    There, results[task] holds "<metric>,<filter>" and "<metric>_stderr,<filter>", which is "N/A" where there is none.
    """
    scores = []
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        documents = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        better = results.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            scores.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    standard_error=float(error) if isinstance(error, int | float) else None,
                    higher_is_better=better.get(metric),
                    documents=int(documents),
                )
            )
    return scores
