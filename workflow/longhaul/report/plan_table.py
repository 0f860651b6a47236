"""A plan as a table for people and as JSON for the report."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from longhaul.config.run_config import Parallel
from longhaul.jobs.builders import job_names
from longhaul.planning import Plan, StagePlan
from longhaul.planning.plan import ASSUMED_MFU

Row = dict[str, Any]


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as results/<run>/plan.json holds it: stages and Slurm requests."""
    jobs = [*job_names(plan), *(f"train-{stage.name}" for stage in plan.stages)]
    return {
        "run": plan.run,
        "site": plan.site.name,
        "scheduler": plan.site.scheduler,
        "stages": [_stage_row(plan, stage) for stage in plan.stages],
        "requests": {job: plan.request(job).as_sbatch() for job in jobs},
        "first_weights": list(plan.first_weights),
        "waiting": list(plan.waiting),
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
        "pipeline_bubble": round(planned.bubble, 4),
        "warnings": list(planned.warnings),
        "memory_per_gpu_gib": planned.memory.as_gib() if planned.memory else None,
        "flops": planned.flops,
        "gpu_hours_estimate": gpu_hours(plan, planned),
        "gpu_hours_per_allocation": round(planned.world_size * stage.minutes / 60, 2),
        "files_per_checkpoint": planned.files_per_checkpoint,
        "checkpoint_gb": round(planned.checkpoint_bytes / 1e9, 3) if planned.checkpoint_bytes else None,
        "minutes": stage.minutes,
    }


def layout_text(parallel: Parallel) -> str:
    """The axes that have several ranks."""
    return ", ".join(f"{axis} {size}" for axis, size in parallel.model_dump().items() if size > 1) or "data parallel"


def gpu_hours(plan: Plan, planned: StagePlan) -> float | None:
    """GPU-hours at ASSUMED_MFU of the site's peak; None where either is not known."""
    peak = plan.site.node.gpu_peak_tflops
    return round(planned.flops / (peak * 1e12 * ASSUMED_MFU) / 3600, 1) if peak and planned.flops else None


def print_plan(plan: Plan) -> None:
    """Prints the stages, their memory and the Slurm requests."""
    value = plan_json(plan)
    console = Console(width=None)
    console.print(f"run [bold]{plan.run}[/] at site [bold]{plan.site.name}[/] ({plan.site.scheduler})")
    rows = value["stages"]
    console.print(_table("Stages", ["", *(row["name"] for row in rows)], _stage_lines(rows)))
    if all(row["memory_per_gpu_gib"] for row in rows):
        parts = list(rows[0]["memory_per_gpu_gib"])
        lines = [[part, *(f"{row['memory_per_gpu_gib'][part]:.2f}" for row in rows)] for part in parts]
        console.print(
            _table(
                "Memory per GPU, GiB (host, locked, disk: of the node, per rank)",
                ["", *(r["name"] for r in rows)],
                lines,
            )
        )
    requests = [
        [job, " ".join(f"{k}={v}" if v else k for k, v in asked.items())] for job, asked in value["requests"].items()
    ]
    if plan.site.scheduler == "slurm":
        console.print(_table("Slurm requests", ["job", "sbatch options"], requests))
    for note in plan.first_weights:
        console.print(f"first weights: {note}")
    for warning in (warning for row in rows for warning in row["warnings"]):
        console.print(f"warning: {warning}")
    for check in plan.waiting:
        console.print(f"not known yet: {check}")


def _stage_lines(rows: list[Row]) -> list[list[str]]:
    batch = [
        f"{r['global_batch_size']} = {r['micro_batch_size']} x {r['accumulation']} x {r['data_parallel']}" for r in rows
    ]
    lines = [["global batch = micro x accumulation x data parallel", *batch]]
    keys = [
        "layout",
        "pipeline_bubble",
        "kind",
        "dataset",
        "from",
        "steps",
        "tokens",
        "sequence_length",
        "precision",
        "zero_stage",
        "nodes",
    ]
    keys += [
        "gpus_per_node",
        "gpu_hours_estimate",
        "gpu_hours_per_allocation",
        "minutes",
        "files_per_checkpoint",
        "checkpoint_gb",
    ]
    return lines + [[key.replace("_", " "), *(_text(row[key]) for row in rows)] for key in keys]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(title: str, header: list[str], lines: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table
