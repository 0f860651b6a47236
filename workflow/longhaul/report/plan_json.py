"""Rows and keys of plan.json: what `longhaul plan` and the report show of each stage, dataset and job; GPU-hours."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from longhaul.config.data_formats import known_format
from longhaul.config.stage_config import Parallel
from longhaul.data.readers.first_rows import first_rows
from longhaul.jobs.job_kind import job_request, jobs_of
from longhaul.planning import Plan, StagePlan, dataset_files, left_out_files
from longhaul.planning.plan import ASSUMED_MFU

Row = dict[str, Any]
DATA_PARALLEL = "data parallel"
"""Text for a layout in which no axis has several ranks."""


class StageRow(TypedDict):
    """A stage in plan.json, as far as the report computes with it; it shows the other values as they are."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    name: str
    kind: str
    dataset: str
    steps: int
    nodes: int
    gpus_per_node: int
    gpu_hours_estimate: float | None
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
            for job in jobs_of(plan)
        ],
        "pretrained_changes": list(plan.pretrained_changes),
        "deferred_checks": list(plan.deferred_checks),
    }


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
    return {
        "name": stage.name,
        "kind": stage.kind,
        "dataset": stage.dataset,
        "from": f"{stage.start_from.stage} ({stage.start_from.checkpoint})" if stage.start_from else None,
        "steps": planned.steps,
        "tokens": planned.tokens,
        "sequence_length": stage.sequence_length,
        "global_batch_size": stage.global_batch_size,
        "micro_batch_size": stage.micro_batch_size,
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
        "flops": planned.flops,
        "gpu_hours_estimate": gpu_hours(planned.flops, plan.site.node.gpu_peak_tflops),
        "gpu_hours_per_allocation": round(planned.world_size * stage.minutes / 60, 2),
        "files_per_checkpoint": planned.files_per_checkpoint,
        "checkpoint_gb": round(planned.checkpoint_bytes / 1e9, 3) if planned.checkpoint_bytes else None,
        "asynchronous_saves": planned.asynchronous_saves,
        "minutes": stage.minutes,
    }


def layout_text(parallel: Parallel) -> str:
    """Return the parallel axes that have several ranks, such as `pipeline 2, tensor 4`."""
    return ", ".join(f"{axis} {size}" for axis, size in parallel.model_dump().items() if size > 1) or DATA_PARALLEL


def gpu_hours(flops: float | None, peak_tflops: float | None) -> float | None:
    """Return the GPU-hours that `flops` take at a share of ASSUMED_MFU of a GPU's peak; None where either is unknown."""
    if not flops or not peak_tflops:
        return None
    return round(flops / (peak_tflops * 1e12 * ASSUMED_MFU) / 3600, 1)
