"""Writes the report as one HTML file: numbers of its tables and diagrams, for templates/report/report.html.j2 with the columns.
The page needs no other file and no network.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from longhaul import __version__
from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.atomic_files import writable_file, write_text
from longhaul.artifacts.line_record_fields import StepProfile
from longhaul.config.shipped_files import data_root
from longhaul.report import number_format as text
from longhaul.report import plotly_figures as figures
from longhaul.report.acceptance import AcceptanceRow, acceptance_rows, bandwidth_row
from longhaul.report.evaluation_table import evaluation_rows
from longhaul.report.node_check_table import node_check_rows
from longhaul.report.run_results import RunResults, StageResults, read_run
from longhaul.report.run_status import StageStatus
from longhaul.report.serve_check_table import serve_check_rows
from longhaul.report.slurm_queue_types import AskQueue
from longhaul.report.stage_records import RECENT_STEPS
from longhaul.report.status_text import recent_speed, sum_of_estimates

TEMPLATES = data_root() / "templates" / "report"


def write_report(folder: Path, out: Path, ask_queue: AskQueue, main_process_ends: bool = False) -> None:
    """Write the report of `folder`, which is results/<run>, to `out`.

    main_process_ends: as in read_status

    Raises:
        UserError: nothing has run yet, an artifact is damaged or of another release, or `out` cannot be written.
    """
    page = render_page(read_run(folder, ask_queue, main_process_ends))
    write_text(writable_file(out), page)


def render_page(results: RunResults) -> str:
    """Return the page as HTML. Values of the run are escaped; figures and the Plotly library are not."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(text, name)
        for name in ("count", "size", "nats", "percent", "duration", "words", "plain", "estimate", "significant")
    }
    return environment.get_template("report.html.j2").render(
        results=results,
        summary=[_summary_row(stage, results) for stage in results.stages],
        used_gpu_hours=_sum_known(stage.gpu_hours for stage in results.status.stages),
        planned_gpu_hours=sum_of_estimates(stage.gpu_hours_planned for stage in results.status.stages),
        acceptance=_acceptance(results),
        stages=[_stage_rows(stage, _status_of(stage, results)) for stage in results.stages],
        exports=[_export_rows(export) for export in results.exports],
        evaluations=evaluation_rows(results.evaluations),
        node_checks=node_check_rows(results.environment.checks if results.environment else []),
        serve_checks=[serve_check_rows(result) for result in results.serve_checks],
        timeline=_embed(figures.timeline_figure(results.timespans)) if results.timespans else "",
        fabric=_fabric_figure(results),
        pairs=_pairs_figure(results),
        # The page contains the whole library, so that it works without internet.
        plotly=Markup(get_plotlyjs()),  # nosec B704  # the library itself
        version=__version__,
    )


def _acceptance(results: RunResults) -> list[AcceptanceRow]:
    peak_tflops = results.plan.get("gpu_peak_tflops")
    rows = [row for stage in results.stages for row in acceptance_rows(stage, results.environment, peak_tflops)]
    has_rows = rows or results.fabric
    return [*rows, bandwidth_row(results.fabric, results.environment)] if has_rows else []


def _fabric_figure(results: RunResults) -> Markup | str:
    measured = results.fabric.results if results.fabric else []
    return _embed(figures.fabric_figure(measured)) if measured else ""


def _pairs_figure(results: RunResults) -> Markup | str:
    fabric = results.fabric
    return _embed(figures.pairs_figure(fabric.hosts, fabric.pairs)) if fabric and fabric.pairs else ""


def _sum_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _summary_row(stage: StageResults, results: RunResults) -> dict[str, object]:
    """Return whether a stage trained, what it cost, and where its model is."""
    status = _status_of(stage, results)
    return {
        "name": stage.name,
        "state": status.job.state,
        "steps": f"{stage.trained_steps:,} of {text.exact(stage.planned_steps)}",
        "losses": _losses(status),
        "level": status.learning.level if status.learning else None,
        "learned": status.learning.learned if status.learning else None,
        "goodput": stage.goodput.goodput if stage.goodput else None,
        "model": status.exported_to,
    }


@dataclass(frozen=True)
class _Losses:
    """First and last losses of a stage, as `longhaul status` shows them; None where they are not known."""

    first: float | None = None
    last: float | None = None
    first_validation: float | None = None
    last_validation: float | None = None


def _losses(status: StageStatus) -> _Losses:
    progress = status.progress
    if progress is None:
        return _Losses()
    return _Losses(progress.first_loss, progress.loss, progress.first_validation_loss, progress.validation_loss)


def _status_of(stage: StageResults, results: RunResults) -> StageStatus:
    return next(found for found in results.status.stages if found.name == stage.name)


def _stage_rows(stage: StageResults, status: StageStatus) -> dict[str, object]:
    """Return {"name", "numbers": {title: text}, "figures"} of a stage."""
    summary, losses = stage.summary, _losses(status)
    numbers = {
        "steps": f"{stage.trained_steps:,} of {text.exact(stage.planned_steps)}",
        "epochs": ", ".join(f"{dataset} {epochs:.2f}" for dataset, epochs in stage.epochs.items()) or text.MISSING,
        "last training loss": text.nats(losses.last),
        "validation loss, start → end": f"{text.nats(losses.first_validation)} → {text.nats(losses.last_validation)}",
        "best validation loss": f"{text.nats(summary.best_validation)} at step {text.count(summary.best_validation_step)}",
        "unigram entropy of the data": text.nats(stage.unigram_entropy_nats),
        "tokens/s without padding, waiting included, median of all steps": text.count(summary.median_tokens_per_s),
        "step time, median of all steps": text.duration(summary.median_step_time_s),
        "model FLOPs utilisation, median of all steps": text.percent(summary.median_mfu),
        f"speed in the last {RECENT_STEPS} steps": recent_speed(status.progress),
        "time spent waiting for data": text.percent(summary.data_wait_share),
        "padding in the packs": text.percent(stage.padding_share),
        "loss tokens cut from long conversations": text.percent(stage.cut_loss_share),
        "planned memory per GPU": text.size(stage.planned_memory_bytes),
        "peak memory per GPU (per process on CPUs)": text.size(summary.peak_memory_bytes),
        "batches skipped after a bad step": text.count(stage.skipped_batches),
        "time in training steps": text.duration(summary.training_time_s),
        "GPU-hours of the training steps, planned → real": _planned_and_real(stage, status),
        "GPU-hours in allocations": text.significant(status.gpu_hours),
        "training waited for a save, median": text.duration(_median([save.waited_s for save in stage.saves])),
        "until a checkpoint was complete, median": text.duration(_median([save.durable_s for save in stage.saves])),
        "attempts": text.count(len(stage.attempts)),
        "last start, from rank 0's process to its first step": _start_up(stage.start_up),
        "hosts": ", ".join(stage.hosts),
    }
    stage_figures = [
        figures.loss_figure(stage, losses.first_validation),
        figures.speed_figure(stage),
        figures.schedule_figure(stage),
    ]
    if stage.goodput and stage.goodput.total:
        numbers["goodput"] = text.percent(stage.goodput.goodput)
        stage_figures.append(figures.goodput_figure(stage.goodput))
    if stage.pair_check:
        stage_figures.append(figures.pairs_figure(stage.pair_check.hosts, stage.pair_check.pairs))
        if slow := [*stage.pair_check.accepted, *stage.pair_check.warnings]:
            numbers["slow between its nodes"] = "; ".join(slow)
    return {
        "name": stage.name,
        "numbers": numbers,
        "figures": [_embed(figure) for figure in stage_figures],
        "profiles": [_profile_rows(profile) for profile in stage.profiles],
    }


def _profile_rows(profile: StepProfile) -> dict[str, object]:
    """Return where the time of a rank's profiled steps went: seconds of a step, and shares of its time."""
    breakdown = profile["breakdown"]
    steps = profile["steps"]
    hidden_s = breakdown["communication_s"] - breakdown["covered_s"].get("communication", 0.0)
    seconds = {**breakdown["covered_s"], "nothing runs": breakdown["idle_s"]}
    return {
        "profile": profile,
        "last_step": profile["first_step"] + steps - 1,
        "parts": [(name, part_s / steps, part_s / breakdown["seconds"]) for name, part_s in seconds.items()],
        "step_s": breakdown["seconds"] / steps,
        "hidden_communication_s": max(0.0, hidden_s) / steps,
        "kernels": [(kernel, kernel["seconds"] / breakdown["seconds"]) for kernel in breakdown["kernels"]],
    }


def _start_up(phases: dict[str, float]) -> str:
    """Return the duration of a start, and of each of its phases."""
    if not phases:
        return text.MISSING
    parts = ", ".join(f"{text.words(phase)} {text.duration(seconds)}" for phase, seconds in phases.items() if seconds)
    return f"{text.duration(sum(phases.values()))}: {parts}"


def _planned_and_real(stage: StageResults, status: StageStatus) -> str:
    """Return the estimate of the plan and what the steps took so far, on the GPUs of the last attempt; nothing on CPUs."""
    if status.gpu_hours is None or stage.summary.training_time_s is None:
        return text.MISSING
    gpus = stage.attempts[-1].get("world_size", 0) if stage.attempts else 0
    done = "" if stage.trained_steps == stage.planned_steps else f" after {stage.trained_steps:,} steps"
    real = text.significant(stage.summary.training_time_s * gpus / 3600)
    return f"{text.estimate(status.gpu_hours_planned)} → {real}{done}"


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _export_rows(export: Export) -> dict[str, object]:
    """Return the export, and its verification as {"<check>: <value's name>": text}."""
    verification = {
        f"{part}: {text.words(key)}": text.plain(value)
        for part, found in export.verification.items()
        for key, value in found.items()
    }
    return {"export": export, "verification": verification}


def _embed(figure: go.Figure) -> Markup:
    """Return a figure's JSON in a script element. `<` is escaped, so that no text can end the element."""
    data = str(figure.to_json()).replace("<", "\\u003c")
    return Markup(f'<div class="figure"><script type="application/json">{data}</script></div>')  # nosec B704  # `<` is escaped above
