"""Job kind `evaluate`: one task of lm-evaluation-harness on a stage's export, or on the model that the stage starts from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longhaul.artifacts.paths import JobId
from longhaul.config.evaluation_config import Evaluation
from longhaul.config.serve_config import Serve
from longhaul.config.site_serving_config import Serving
from longhaul.jobs.job_kind import JobKind
from longhaul.jobs.job_spec import JobSpec
from longhaul.planning import Plan
from longhaul.planning.check_inference_servers import has_served_evaluation
from longhaul.planning.evaluation_tasks import evaluated_models, own_task, reads_hub
from longhaul.planning.serving_memory import ExportDtype
from longhaul.planning.serving_plan import server_size
from longhaul.planning.slurm_request import SlurmRequest, gpu_request


class EvaluateSpec(JobSpec):
    """Evaluates one model on one task."""

    # The plan derives the last four from the model's size, which it does not know before fetch.
    no_rerun_fields = JobSpec.no_rerun_fields | {"gpus", "nodes", "tensor", "pipeline", "context_tokens"}

    stage: str
    model: str  # trained | start
    task: str
    export: str | None  # manifest of the export that is evaluated, which names its folder; None: a pretrained model
    pretrained: str | None  # folder of the pretrained model; None: an export
    own_task: dict[str, Any] | None  # keys of the user's task file; None: a task or group of lm_eval
    data_files: tuple[str, ...]  # local files that it reads
    task_data: str | None  # lock of what fetch downloaded for the task; None: it reads local files
    limit: int | None
    num_fewshot: int | None
    batch_size: int
    seed: int
    chat: bool  # prompts are written with the chat template
    gpus: int
    serving: Serving | None  # the engine that serves the model in the job; None: transformers computes
    serve: Serve
    dtype: ExportDtype | None  # of the export; None: a pretrained model
    nodes: int
    tensor: int
    pipeline: int
    context_tokens: int | None
    out: str

    def input_texts(self) -> Iterable[str | None]:
        return (self.task_data,)

    def input_data(self) -> Iterable[str]:
        return self.data_files

    def external_paths(self) -> Iterable[str | None]:
        return (*self.data_files, self.pretrained)


def _jobs(plan: Plan) -> list[JobId]:
    return [
        JobId("evaluate", (stage.name, model, task))
        for stage in plan.stages
        for model in evaluated_models(stage.stage)
        for task in (stage.stage.evaluate.tasks if stage.stage.evaluate else ())
    ]


def _build(plan: Plan, job: JobId) -> EvaluateSpec:
    name, model, task = job.names
    stage = plan.stage(name).stage
    evaluation = _evaluation(plan, name)
    exported = plan.evaluated_export(name, model)
    own = own_task(plan.loaded, stage, task)
    planned, is_served = plan.stage(name).serving, has_served_evaluation(stage)
    return EvaluateSpec(
        run=plan.run,
        stage=name,
        model=model,
        task=task,
        export=str(plan.paths.export_manifest(exported)) if exported else None,
        pretrained=None if exported else plan.pretrained_folder,
        own_task=own.config if own else None,
        data_files=tuple(map(str, own.data_files)) if own else (),
        task_data=str(plan.paths.task_data(name, task)) if reads_hub(own) else None,
        limit=evaluation.limit,
        num_fewshot=evaluation.num_fewshot,
        batch_size=evaluation.batch_size,
        seed=evaluation.seed,
        chat=stage.kind == "sft",
        gpus=evaluation.gpus,
        serving=plan.site.serving if is_served else None,
        serve=(stage.serve if is_served else None) or Serve(),
        dtype=plan.stage(exported).stage.export_dtype if exported else None,
        nodes=planned.layout.nodes if planned and is_served else 1,
        tensor=planned.layout.tensor if planned else 1,
        pipeline=planned.layout.pipeline if planned else 1,
        context_tokens=planned.context if planned else None,
        out=str(plan.paths.evaluation(name, model, task)),
    )


def _evaluation(plan: Plan, stage: str) -> Evaluation:
    evaluation = plan.stage(stage).stage.evaluate
    assert evaluation is not None
    return evaluation


def _request(plan: Plan, job: JobId) -> SlurmRequest:
    stage, planned = plan.stage(job.names[0]).stage, plan.stage(job.names[0]).serving
    evaluation = _evaluation(plan, job.names[0])
    nodes, gpus = server_size(stage, planned) if has_served_evaluation(stage) else (1, evaluation.gpus)
    return gpu_request(plan.site, place="gpu", nodes=nodes, tasks=1, gpus=gpus, minutes=evaluation.minutes)


def evaluation_inputs(plan: Plan, job: JobId) -> list[Path]:
    """Return the inputs of an evaluation's rule: the export's manifest, the lock of the task's data, the user's files of it."""
    name, model, task = job.names
    exported = plan.evaluated_export(name, model)
    own = own_task(plan.loaded, plan.stage(name).stage, task)
    return [
        *([plan.paths.export_manifest(exported)] if exported else []),
        *([plan.paths.task_data(name, task)] if reads_hub(own) else []),
        *(path for path in ((own.path, *own.data_files) if own else ()) if path.exists()),
    ]


KIND = JobKind(
    name="evaluate",
    order=10,
    help="evaluate a model on a task of lm-evaluation-harness",
    spec=EvaluateSpec,
    entry_point="longhaul.evaluation.evaluate_model:run",
    jobs=_jobs,
    build_spec=_build,
    request=_request,
    wildcards=("stage", "model", "task"),
)
