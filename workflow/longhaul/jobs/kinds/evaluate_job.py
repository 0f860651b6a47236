"""Job kind `evaluate`: one task of lm-evaluation-harness on a stage's export, or on the model that the stage starts from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from longhaul.artifacts.artifact_schemas import TaskData
from longhaul.artifacts.paths import JobId
from longhaul.config.evaluation_config import Evaluation
from longhaul.jobs.job_kind import JobKind
from longhaul.jobs.job_spec import JobSpec
from longhaul.planning import Plan
from longhaul.planning.evaluation_tasks import evaluated_models, read_task_files
from longhaul.planning.slurm_request import SlurmRequest, gpu_request


class EvaluateSpec(JobSpec):
    """Evaluates one model on one task."""

    no_rerun_fields = JobSpec.no_rerun_fields | {"gpus"}

    stage: str
    model: str  # trained | start
    task: str
    export: str | None  # manifest of the export that is evaluated, which names its folder; None: a pretrained model
    pretrained: str | None  # folder of the pretrained model; None: an export
    task_files: tuple[str, ...]  # files of the user that define tasks
    data_files: tuple[str, ...]  # local files that these tasks read
    task_data: tuple[TaskData, ...]  # what fetch downloaded for the run's tasks
    limit: int | None
    num_fewshot: int | None
    batch_size: int
    seed: int
    chat: bool  # prompts are written with the chat template
    gpus: int
    out: str

    def input_texts(self) -> Iterable[str | None]:
        return self.task_files

    def input_data(self) -> Iterable[str]:
        return self.data_files

    def external_paths(self) -> Iterable[str | None]:
        return (*self.task_files, *self.data_files, self.pretrained)


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
    files = read_task_files(plan.loaded, stage)
    return EvaluateSpec(
        run=plan.run,
        stage=name,
        model=model,
        task=task,
        export=str(plan.paths.export_manifest(exported)) if exported else None,
        pretrained=None if exported else plan.pretrained_folder,
        task_files=tuple(str(file.path) for file in files),
        data_files=tuple(str(data) for file in files for data in file.data_files),
        task_data=tuple(plan.lock.tasks if plan.lock else ()),
        limit=evaluation.limit,
        num_fewshot=evaluation.num_fewshot,
        batch_size=evaluation.batch_size,
        seed=evaluation.seed,
        chat=stage.kind == "sft",
        gpus=evaluation.gpus,
        out=str(plan.paths.evaluation(name, model, task)),
    )


def _evaluation(plan: Plan, stage: str) -> Evaluation:
    evaluation = plan.stage(stage).stage.evaluate
    assert evaluation is not None
    return evaluation


def _request(plan: Plan, job: JobId) -> SlurmRequest:
    evaluation = _evaluation(plan, job.names[0])
    return gpu_request(plan.site, place="gpu", nodes=1, tasks=1, gpus=evaluation.gpus, minutes=evaluation.minutes)


def evaluation_inputs(plan: Plan, job: JobId) -> list[Path]:
    """Return the inputs of an evaluation's rule: the export's manifest and the user's files."""
    name, model, _ = job.names
    exported = plan.evaluated_export(name, model)
    files = read_task_files(plan.loaded, plan.stage(name).stage)
    return [
        *([plan.paths.export_manifest(exported)] if exported else []),
        *(path for file in files for path in (file.path, *file.data_files) if path.exists()),
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
