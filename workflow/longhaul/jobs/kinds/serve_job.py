"""Declares the job that serves a stage's export. `longhaul serve` submits it; no rule does."""

from __future__ import annotations

from longhaul.artifacts.paths import SERVE_KIND, JobId
from longhaul.config.serve_config import Serve
from longhaul.config.site_serving_config import Serving
from longhaul.jobs.job_kind import JobKind
from longhaul.jobs.job_spec import JobSpec
from longhaul.planning import Plan, model_config
from longhaul.planning.serving_memory import ExportDtype
from longhaul.planning.serving_plan import ServingPlan, plan_serving
from longhaul.planning.slurm_request import SlurmRequest, gpu_request

_RESTARTS = 3


class ServeSpec(JobSpec):
    """Serves one export. It has one process per node, which starts the engine there."""

    stage: str
    export: str  # manifest of the export, which names its folder
    dtype: ExportDtype
    serving: Serving
    model_name: str  # what requests call the model
    nodes: int
    tensor: int
    pipeline: int
    expert_parallel: bool
    context: int
    max_running_requests: int | None  # None: as the engine chooses
    port: int | None  # None: a free one
    start_timeout_s: int
    drain_s: int  # time for accepted requests, before the allocation ends
    key_file: str | None
    folder: str  # the job's folder
    local: bool  # without Slurm: the server listens on 127.0.0.1


def serving_plan(plan: Plan, stage: str) -> ServingPlan:
    """Return the plan of a stage's server, with the defaults of section `serve` where the stage has none."""
    planned = plan.stage(stage)
    if planned.serving:
        return planned.serving
    model = model_config(plan.loaded, plan.lock)
    assert model is not None, "the job needs what fetch recorded"
    return plan_serving(planned.stage, model, plan.site)


def _build(plan: Plan, job: JobId) -> ServeSpec:
    (name,) = job.names
    planned, folder = serving_plan(plan, name), plan.paths.job(job)
    serve = plan.stage(name).stage.serve or Serve()
    has_key = plan.site.serving.engine != "transformers"
    return ServeSpec(
        run=plan.run,
        stage=name,
        export=str(plan.paths.export_manifest(name)),
        dtype=plan.stage(name).stage.export_dtype,
        serving=plan.site.serving,
        model_name=f"{plan.run}-{name}",
        nodes=planned.layout.nodes,
        tensor=planned.layout.tensor,
        pipeline=planned.layout.pipeline,
        expert_parallel=serve.expert_parallel,
        context=planned.context,
        max_running_requests=serve.max_running_requests,
        port=serve.port,
        start_timeout_s=serve.start_timeout_s,
        drain_s=serve.drain_s,
        key_file=str(folder.api_key) if has_key else None,
        folder=str(folder.path),
        local=plan.site.scheduler == "local",
    )


def _request(plan: Plan, job: JobId) -> SlurmRequest:
    planned = serving_plan(plan, job.names[0])
    layout = planned.layout
    return gpu_request(
        plan.site, place="gpu", nodes=layout.nodes, tasks=1, gpus=layout.gpus_per_node, minutes=planned.minutes
    )


KIND = JobKind(
    name=SERVE_KIND,
    order=11,
    help="serve an exported model",
    spec=ServeSpec,
    entry_point="longhaul.serving.run_server:run",
    jobs=lambda plan: [JobId(SERVE_KIND, (name,)) for name in plan.exported],
    build_spec=_build,
    request=_request,
    wildcards=("stage",),
    max_restarts=lambda plan, job: _RESTARTS,
    # The site may name another Python for the engine, for example in a container of its own.
    outside_environment=lambda plan: bool(plan.site.serving.python),
    on_demand=True,
)
