"""Job kind `serve_check`: the check of a server of a stage's export, on the nodes of the section `serve`."""

from __future__ import annotations

from typing import Literal

from longhaul.artifacts.paths import JobId
from longhaul.config.serve_check_config import ServeCheck
from longhaul.config.serve_config import Serve
from longhaul.config.site_serving_config import Serving
from longhaul.jobs.job_kind import JobKind
from longhaul.jobs.job_spec import JobSpec
from longhaul.planning import Plan
from longhaul.planning.serving_plan import server_size
from longhaul.planning.slurm_request import SlurmRequest, gpu_request


class ServeCheckSpec(JobSpec):
    """Starts a server of one export, compares and measures its answers, and stops it."""

    # The plan derives these from the model's size, which it does not know before fetch.
    no_rerun_fields = JobSpec.no_rerun_fields | {"nodes", "tensor", "pipeline", "context_tokens"}

    stage: str
    export: str  # manifest of the export, which names its folder
    dtype: Literal["fp32", "bf16", "fp8"]
    serving: Serving
    serve: Serve
    check: ServeCheck
    nodes: int
    tensor: int
    pipeline: int
    context_tokens: int | None
    out: str


def _build(plan: Plan, job: JobId) -> ServeCheckSpec:
    (name,) = job.names
    stage, planned = plan.stage(name).stage, plan.stage(name).serving
    assert stage.serve_check is not None
    return ServeCheckSpec(
        run=plan.run,
        stage=name,
        export=str(plan.paths.export_manifest(name)),
        dtype=stage.export_dtype,
        serving=plan.site.serving,
        serve=stage.serve or Serve(),
        check=stage.serve_check,
        nodes=planned.layout.nodes if planned else 1,
        tensor=planned.layout.tensor if planned else 1,
        pipeline=planned.layout.pipeline if planned else 1,
        context_tokens=planned.context if planned else None,
        out=str(plan.paths.serve_check(name)),
    )


def _request(plan: Plan, job: JobId) -> SlurmRequest:
    planned = plan.stage(job.names[0])
    assert planned.stage.serve_check is not None
    nodes, gpus = server_size(planned.stage, planned.serving)
    minutes = planned.stage.serve_check.minutes
    return gpu_request(plan.site, place="gpu", nodes=nodes, tasks=1, gpus=gpus, minutes=minutes)


def _starts_another_environment(plan: Plan) -> bool:
    """Return whether the check runs in the Python of the main process.

    Inside of the job's container it could not start the engine's container. For `transformers serve` it needs tokenizers,
    which the controller environment has not.
    """
    return bool(plan.site.serving.python) and plan.site.serving.engine != "transformers"


KIND = JobKind(
    name="serve_check",
    order=11,
    help="start a server of an export, compare its answers, and measure them under load",
    spec=ServeCheckSpec,
    entry_point="longhaul.serving.check_server:run",
    jobs=lambda plan: [JobId("serve_check", (stage.name,)) for stage in plan.stages if stage.stage.serve_check],
    build_spec=_build,
    request=_request,
    wildcards=("stage",),
    outside_environment=_starts_another_environment,
)
