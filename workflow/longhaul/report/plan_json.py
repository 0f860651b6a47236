"""Rows and keys of plan.json: what `longhaul plan` and the report show of each stage, dataset and job; GPU-hours."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from longhaul.artifacts.pack_totals import cut_loss_share, left_out_share, share_of_padding
from longhaul.artifacts.paths import JobId
from longhaul.config.data_formats import known_format
from longhaul.config.stage_config import Parallel
from longhaul.data.readers.first_rows import first_rows
from longhaul.jobs.job_kind import job_request, jobs_of
from longhaul.planning import Plan, StagePlan, dataset_files, left_out_files
from longhaul.planning.gpu_hours import HoursEstimate, MfuEstimate, estimate_mfu, stage_features
from longhaul.planning.scale_test_sizes import STEPS, scale_ladder
from longhaul.planning.steps_of_epochs import estimate_epochs, estimate_steps, kept_conversations
from longhaul.report.stage_records import (
    earlier_packs,
    measured,
    planned_steps,
    recent_median,
    step_seconds,
    weights_folder,
)

Row = dict[str, Any]
DATA_PARALLEL = "data parallel"
"""Text for a layout in which no axis has several ranks."""


class StageRow(TypedDict):
    """A stage in plan.json, as far as the report computes with it; it shows the other values as they are."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    name: str
    kind: str
    dataset: str
    steps: int | None
    epochs: NotRequired[float | None]
    estimated_steps: NotRequired[int | None]
    nodes: int
    gpus_per_node: int
    gpu_hours_range: NotRequired[tuple[float, float] | None]
    flops: NotRequired[float | None]  # of all steps
    memory_per_gpu_gib: dict[str, float] | None


class JobRow(TypedDict):
    """A job in plan.json."""

    kind: str
    names: list[str]
    request: dict[str, str]


class PlanFile(TypedDict):
    """The content of plan.json."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    run: str
    site: str
    scheduler: str
    gpu_peak_tflops: NotRequired[float | None]  # of the datasheet, as the site file states it
    stages: Annotated[list[StageRow], Field(min_length=1)]
    jobs: list[JobRow]


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the plan's stages, and its jobs with their Slurm requests."""
    return {
        "run": plan.run,
        "site": plan.site.name,
        "scheduler": plan.site.scheduler,
        "gpu_peak_tflops": plan.site.node.gpu_peak_tflops,
        "stages": [_stage_row(plan, stage) for stage in plan.stages],
        "datasets": [
            _dataset_row(plan, name) for name in sorted(plan.used_datasets) if plan.config.datasets[name].files
        ],
        "jobs": [
            {"kind": job.kind, "names": list(job.names), "request": job_request(plan, job).as_sbatch()}
            for job in planned_jobs(plan)
        ],
        "warnings": list(plan.warnings),
        "scale_test": _scale_test(plan),
        "pretrained_changes": list(plan.pretrained_changes),
        "deferred_checks": list(plan.deferred_checks),
    }


def planned_jobs(plan: Plan) -> list[JobId]:
    """Return the jobs of the run, which dry run, terminal and `longhaul status` count. Rules of the main process are no jobs."""
    return [job for job in jobs_of(plan) if not _is_omitted(plan, job)]


def _is_omitted(plan: Plan, job: JobId) -> bool:
    """Return whether a job of the scale test will not run, because its stage has begun without it."""
    if job.kind != "scale_test" or plan.paths.scale_test(int(job.names[0])).exists():
        return False
    return weights_folder(plan.paths.stage(scale_ladder(plan).stage)) is not None


def _scale_test(plan: Plan) -> Row:
    """Return on how many nodes the first stage is tried before it trains, and which numbers are left out."""
    ladder = scale_ladder(plan)
    left_out = {str(nodes): reason for nodes, reason in ladder.left_out.items()}
    return {"stage": ladder.stage, "nodes": list(ladder.rungs), "steps": STEPS, "left_out": left_out}


def _dataset_row(plan: Plan, name: str) -> Row:
    """Return what is known of a dataset's own files. Raises UserError as first_rows does."""
    files = dataset_files(plan.loaded, name)
    file_format = plan.config.datasets[name].format
    return {
        "name": name,
        "formats": sorted({known_format(path) or "" for path in files} if file_format == "auto" else {file_format}),
        "count": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "files": [str(path) for path in files],
        "left_out": [str(path) for path in left_out_files(plan.loaded, name)],
        **first_rows(plan, name)._asdict(),
    }


def _stage_row(plan: Plan, planned: StagePlan) -> Row:
    stage = planned.stage
    steps = _steps(plan, planned)
    tokens = steps * planned.tokens_per_step if steps else None
    hours, packs = stage_hours(plan, planned), earlier_packs(plan.paths.stage(stage.name), stage)
    padding, kept = share_of_padding(packs), packs or kept_conversations(plan, stage)
    return {
        "name": stage.name,
        "kind": stage.kind,
        "dataset": stage.dataset,
        "from": f"{stage.start_from.stage} ({stage.start_from.checkpoint})" if stage.start_from else None,
        "epochs": stage.epochs,
        "steps": planned.steps,
        "estimated_steps": None if planned.steps else steps,
        "tokens": tokens,
        "estimated_epochs": estimate_epochs(plan, stage, steps, padding or 0.0) if steps else {},
        "padding_share": padding,
        "cut_loss_share": cut_loss_share(kept),
        "left_out_share": left_out_share(kept),
        "sequence_length": stage.sequence_length,
        "global_batch_size": stage.global_batch_size,
        "micro_batch_size": stage.micro_batch_size,
        "activation_checkpointing": stage.activation_checkpointing,
        "accumulation": planned.accumulation,
        "data_parallel": planned.data_parallel,
        "nodes": stage.nodes,
        "gpus_per_node": stage.gpus_per_node,
        "precision": stage.precision,
        "zero_stage": stage.zero.stage,
        "layout": layout_text(stage.parallel),
        "pipeline_bubble": round(planned.pipeline_bubble, 4),
        "warnings": list(planned.warnings),
        "memory_per_gpu_gib": planned.memory.as_gib() if planned.memory else None,
        "flops": _flops(planned, steps),
        "gpu_hours_range": [hours.low, hours.high] if hours else None,
        "gpu_hours_basis": list(hours.basis) if hours else [],
        "gpu_hours_unmeasured": list(hours.unmeasured) if hours else [],
        "gpu_hours_per_allocation": round(planned.world_size * stage.minutes / 60, 2),
        "files_per_checkpoint": planned.files_per_checkpoint,
        "checkpoint_gb": round(planned.checkpoint_bytes / 1e9, 3) if planned.checkpoint_bytes else None,
        "asynchronous_saves": planned.asynchronous_saves,
        "minutes": stage.minutes,
    }


def layout_text(parallel: Parallel) -> str:
    """Return the parallel axes that have several ranks, such as `pipeline 2, tensor 4`."""
    return ", ".join(f"{axis} {size}" for axis, size in parallel.model_dump().items() if size > 1) or DATA_PARALLEL


def _steps(plan: Plan, planned: StagePlan) -> int | None:
    """Return a stage's number of steps; of a length in epochs what its job recorded, else an estimate."""
    recorded = planned_steps(planned.steps, weights_folder(plan.paths.stage(planned.name)))
    return recorded or estimate_steps(plan, planned.stage)


def _flops(planned: StagePlan, steps: int | None) -> float | None:
    if planned.sizes is None or steps is None:
        return None
    return steps * planned.tokens_per_step * planned.sizes.flops_per_token(planned.stage.sequence_length)


def stage_hours(plan: Plan, planned: StagePlan) -> HoursEstimate | None:
    """Return the GPU-hours of a stage's steps: at its own speed if it has run, else at the MFU of similar trainings."""
    node, stage, steps = plan.site.node, planned.stage, _steps(plan, planned)
    flops = _flops(planned, steps)
    if not node.gpus or steps is None:
        return None
    if step_s := measured(plan.paths.stage(stage.name), stage, step_seconds):
        hours = round(steps * step_s * planned.world_size / 3600, 1)
        return HoursEstimate(hours, hours, (f"the steps of stage {stage.name} in this run",))
    mfu = _mfu(plan, planned)
    return mfu.gpu_hours(flops, node.gpu_peak_tflops) if mfu and flops and node.gpu_peak_tflops else None


def _mfu(plan: Plan, planned: StagePlan) -> MfuEstimate | None:
    """Return the MFU of a similar stage of this run, else of similar trainings elsewhere."""
    if planned.sizes is None:
        return None
    features = stage_features(planned.stage, planned.sizes, plan.site)
    for other in plan.stages:
        if other.sizes is None or stage_features(other.stage, other.sizes, plan.site) != features:
            continue
        if found := measured(plan.paths.stage(other.name), other.stage, lambda rows: recent_median(rows, "mfu")):
            return MfuEstimate(found, found, (f"the steps of stage {other.name} in this run",))
    return estimate_mfu(planned.stage, planned.sizes, plan.site)
