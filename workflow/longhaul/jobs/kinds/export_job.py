"""Declares the export of a stage's checkpoint (last or best) as a Hugging Face folder."""

from __future__ import annotations

from longhaul.artifacts.atomic_files import content_hash
from longhaul.artifacts.paths import JobId
from longhaul.jobs.job_kind import JobKind
from longhaul.jobs.job_spec import JobSpec
from longhaul.planning import Plan
from longhaul.planning.slurm_request import cpu_request


class ExportSpec(JobSpec):
    """Exports and verifies one checkpoint of one stage."""

    no_rerun_fields = JobSpec.no_rerun_fields | {"config_hash"}

    stage: str
    checkpoint: str  # the stage's checkpoint.json
    which: str  # last | best
    dtype: str  # fp32 | bf16 | fp8
    tokenizer: str
    config_hash: str
    pretrained_changes: tuple[str, ...]  # how the first weights differ from those in the pretrained folder, in words
    chat: bool  # the export must contain a chat template
    folder: str  # results/<run>/export/<stage>: holds a folder per export, and the link `latest`
    out: str  # results/<run>/export/<stage>.json


def _build(plan: Plan, job: JobId) -> ExportSpec:
    (name,) = job.names
    stage = plan.stage(name).stage
    return ExportSpec(
        run=plan.run,
        stage=name,
        checkpoint=str(plan.paths.stage(name).checkpoint),
        which=stage.export,
        dtype=stage.export_dtype,
        tokenizer=str(plan.paths.tokenizer),
        config_hash=content_hash(plan.config.model_dump(mode="json")),
        pretrained_changes=plan.pretrained_changes,
        chat=stage.kind == "sft",
        folder=str(plan.paths.exports(name)),
        out=str(plan.paths.export_manifest(name)),
    )


KIND = JobKind(
    name="export",
    order=9,
    help="export a checkpoint as a Hugging Face folder, and verify it",
    spec=ExportSpec,
    entry_point="longhaul.export.export_checkpoint:run",
    jobs=lambda plan: [JobId("export", (name,)) for name in plan.exported],
    build_spec=_build,
    request=lambda plan, job: cpu_request(plan.site, plan.config.data_minutes),
    wildcards=("stage",),
    uses_unrequested_gpu=True,  # the logits, which differ in their last bits between a GPU and a CPU
)
