"""Formats `longhaul status` as text: tables, progress lines, final summary; run_status.py computes the values."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from longhaul.errors import printable
from longhaul.report import number_format as text
from longhaul.report.failed_fetches import FailedFetch
from longhaul.report.run_status import (
    DONE,
    FAILED,
    INTERRUPTED,
    QUEUED,
    RUNNING,
    STARTING,
    STARTS_AGAIN,
    UNKNOWN,
    JobStatus,
    Progress,
    RunStatus,
    ServerStatus,
    StageStatus,
)
from longhaul.report.stage_records import RECENT_STEPS

_STYLES = {
    DONE: "green",
    RUNNING: "cyan",
    QUEUED: "yellow",
    FAILED: "red",
    STARTS_AGAIN: "yellow",
    INTERRUPTED: "red",
    UNKNOWN: "red",
}
_STATES_TO_SHOW = (RUNNING, QUEUED, FAILED, STARTS_AGAIN, INTERRUPTED, UNKNOWN)
_BAR_WIDTH = 10
_BAR = ""
_COLUMNS: tuple[str, ...] = ("stage", "state", "step", _BAR, "loss", "validation", "tokens/s", "time left")
_LEFT_OUT_FIRST = (_BAR, "tokens/s", "validation", "time left", "loss", "step")
"""Columns that a narrow terminal has no room for. The lines below the table have most of these values, too."""
_SPACES_BETWEEN_COLUMNS = 2


def status_view(status: RunStatus) -> RenderableType:
    """Return all that `longhaul status` shows."""
    if status.state == STARTING:
        doing = "It reads the config and finds the jobs to run: ask again in some seconds."
        starting = f"Run {status.run}: starting (main process: {status.main_process}). {doing}"
        return Group(*map(_line, [starting, *_unchecked(status)]))
    details = [line for stage in status.stages for line in _stage_details(stage)]
    return Group(
        _headline(status),
        StageTable(status),
        *details,
        *map(_job_line, _jobs_to_show(status)),
        *map(_fetch_line, status.failed_fetches),
        *map(_server_line, status.servers),
        *_notes(status),
    )


def progress_view(status: RunStatus) -> RenderableType:
    """Return what the main process keeps at the bottom of a terminal: the stages, and the jobs that run or wait."""
    time_left = _time_left(status) or _time_unknown(status)
    return Group(StageTable(status), *map(_job_line, _jobs_to_show(status)), *map(_line, time_left))


def start_lines(status: RunStatus) -> list[str]:
    """Return what a run that starts will make, where, and how long its trainings take if something tells it."""
    trains = [f"{stage.name} ({_steps(stage)} steps)" for stage in status.stages if stage.job.state != DONE]
    exports = [job.name.removeprefix("export-") for job in status.jobs if job.kind == "export" and job.state != DONE]
    makes = [
        *([f"trains {', '.join(trains)}"] if trains else []),
        *([f"exports {', '.join(exports)}"] if exports else []),
    ]
    return [
        f"Run {status.run} on site {status.site}{': ' if makes else ''}{'; '.join(makes)}",
        f"Results, logs and report are written to {status.folder}",
        *(_time_left(status, fewest_stages=1) or _time_unknown(status)),
    ]


def _headline(status: RunStatus) -> Text:
    main = f", main process: {status.main_process}" if status.main_process else ""
    return Text.assemble(
        f"Run {status.run} on site {status.site}: ",
        (status.state, _STYLES.get(status.state, "")),
        f" ({status.job_count}{main})",
    )


def _line(words: str) -> Text:
    """Return a text that is shown as it is: names and causes come from files of the run."""
    return Text(printable(words))


class StageTable:
    """The table of stages, with as many columns as fit into the terminal: rich would cut the names of stages instead."""

    def __init__(self, status: RunStatus) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the widest table that fits. It knows its widths: rich would render all cells several times to measure them."""
        # Without progress, the last cells are missing.
        rows = [dict(zip(_COLUMNS, _stage_row(stage), strict=False)) for stage in self._status.stages]
        widths = {title: max([len(title), *(_width(row[title]) for row in rows if title in row)]) for title in _COLUMNS}
        for title in _LEFT_OUT_FIRST:
            if sum(widths.values()) + _SPACES_BETWEEN_COLUMNS * (len(widths) - 1) <= options.max_width:
                break
            del widths[title]
        table = Table(box=None, pad_edge=False, padding=(0, _SPACES_BETWEEN_COLUMNS, 0, 0), header_style="bold")
        for title, width in widths.items():
            table.add_column(title, width=width, no_wrap=True)
        for row in rows:
            table.add_row(*(row.get(title) for title in widths))
        yield table


def _width(cell: Text | ProgressBar) -> int:
    return cell.cell_len if isinstance(cell, Text) else _BAR_WIDTH


def _stage_row(stage: StageStatus) -> list[Text | ProgressBar]:
    state = Text(stage.job.state, _STYLES.get(stage.job.state, "dim"))
    return [_line(stage.name), state, *_stage_cells(stage)]


def _stage_cells(stage: StageStatus) -> list[Text | ProgressBar]:
    progress = stage.progress
    step = progress.step if progress else 0
    cells: list[Text | ProgressBar] = [
        Text(f"{step:,}/{_steps(stage)}"),
        ProgressBar(total=stage.steps or 1, completed=step if stage.steps else 0, width=_BAR_WIDTH),
    ]
    if progress is None:
        return cells
    values = (
        text.nats(progress.loss),
        text.nats(progress.validation_loss),
        text.count(progress.tokens_per_s),
        text.duration(progress.seconds_left),
    )
    return [*cells, *map(Text, values)]


def _steps(stage: StageStatus) -> str:
    if stage.steps is None and stage.estimated_steps:
        return f"~{text.exact(stage.estimated_steps)}"
    return text.exact(stage.steps)


def _stage_details(stage: StageStatus) -> list[Text]:
    """Return a line with values that do not fit into the table; nothing before the first step."""
    progress = stage.progress
    if progress is None:
        return []
    expected = stage.gpu_hours_expected
    details = [
        f"loss {_change(progress.first_loss, progress.loss)}",
        f"validation loss {_change(progress.first_validation_loss, progress.validation_loss)}",
        *([f"{recent_speed(progress)} in the last {RECENT_STEPS} steps"] if progress.tokens_per_s is not None else []),
        *([f"about {text.significant(expected)} GPU-hours in all"] if expected is not None else []),
        f"last save {_last_save(progress.last_saved_step, progress.last_saved_s)}",
        f"{progress.attempts} {'attempt' if progress.attempts == 1 else 'attempts'}",
    ]
    return [_line(f"{stage.name}: {', '.join(details)}")]


def recent_speed(progress: Progress | None) -> str:
    """Return tokens/s and MFU of the last steps for status and report, which has the medians of all steps beside them."""
    if progress is None or progress.tokens_per_s is None:
        return text.MISSING
    mfu = f" and MFU {text.percent(progress.mfu)}" if progress.mfu is not None else ""
    return f"{text.count(progress.tokens_per_s)} tokens/s{mfu}"


def _change(first: float | None, last: float | None) -> str:
    return f"{text.nats(first)} → {text.nats(last)}" if last is not None else text.MISSING


def _last_save(step: int | None, seconds: float | None) -> str:
    if step is None or seconds is None:
        return text.MISSING
    return f"at step {step:,}, {datetime.fromtimestamp(seconds).strftime('%Y-%m-%d %H:%M')}"


def _jobs_to_show(status: RunStatus) -> list[JobStatus]:
    return [job for job in status.jobs if job.state in _STATES_TO_SHOW]


def _job_line(job: JobStatus) -> Text:
    slurm = f" (job {job.slurm_job_id})" if job.slurm_job_id else ""
    line = Text.assemble(
        printable(f"{job.name}{slurm} "),
        (job.state, _STYLES[job.state]),
        printable(f": {job.detail}") if job.detail else "",
    )
    return line.append(printable(f"\n  remedy: {job.remedy}")) if job.remedy else line


def _fetch_line(fetch: FailedFetch) -> Text:
    return Text.assemble(
        printable(f"{fetch.name} "), (FAILED, _STYLES[FAILED]), printable(f": {fetch.cause}\n  remedy: {fetch.remedy}")
    )


def _server_line(server: ServerStatus) -> Text:
    endpoint = server.endpoint
    if endpoint is None:
        return _job_line(server.job)
    answers = (
        f"answers at {endpoint.place}" if endpoint.ready else f"loads the model; it will answer at {endpoint.place}"
    )
    key = f", API key in {endpoint.key_file}" if endpoint.key_file else ", no API key"
    line = _job_line(server.job)
    return line.append(printable(f"\n  {endpoint.engine} {answers}, model {endpoint.model}{key}"))


def _time_left(status: RunStatus, fewest_stages: int = 2) -> list[str]:
    """Return a line with the time that several stages still take; that of a single one stands beside it in a table."""
    left = [stage for stage in status.stages if stage.job.state != DONE]
    if status.training_left_s is None or len(left) < fewest_stages:
        return []
    low, high = (text.duration(seconds) for seconds in status.training_left_s)
    about = low if low == high else f"{low} to {high}"
    stages = f"{len(left)} {'stage' if len(left) == 1 else 'stages'}"
    return [f"Training left in {stages}: about {about}, without queues, validations and saves"]


def _time_unknown(status: RunStatus) -> list[str]:
    """Return a line where nothing tells yet how long the trainings take: the site file has no speed, and no step is measured."""
    left = [stage for stage in status.stages if stage.job.state != DONE]
    is_measured = any(stage.progress and stage.progress.step_s is not None for stage in left)
    if not left or is_measured or status.training_left_s is not None:
        return []
    return [f"Training left: known after the first steps of {left[0].name}"]


def _notes(status: RunStatus) -> list[Text]:
    lines = []
    if status.state == INTERRUPTED:
        lines.append("No main process works on this run. Start it again with the same command: it continues.")
    lines += _unchecked(status)
    if status.queue_problem:
        lines.append(f"Slurm's queue is unknown: {status.queue_problem}")
    if status.quarantined:
        lines.append(f"Quarantined nodes: {', '.join(status.quarantined)}")
    checkpoints = sum(stage.progress.checkpoint_bytes for stage in status.stages if stage.progress)
    lines += _time_left(status)
    lines.append(f"Disk: checkpoints {text.size(checkpoints)}, free {text.size(status.disk_free_bytes)}")
    return [_line(line) for line in [*lines, *_costs(status), *_results(status)]]


def _unchecked(status: RunStatus) -> list[str]:
    if not status.unchecked_host:
        return []
    return [
        f"Whether {status.main_process} still runs cannot be checked from this host: ask on {status.unchecked_host}."
    ]


def progress_lines(status: RunStatus) -> list[str]:
    """Return one line per job that runs or waits, for a log, which shows each failure once, when it happens."""
    stages = {stage.job.name: stage for stage in status.stages}
    is_news = [job for job in _jobs_to_show(status) if job.state not in (FAILED, STARTS_AGAIN)]
    lines = [_progress_line(job, stages.get(job.name)) for job in is_news]
    return [*lines, *_time_left(status)] if lines else []


def _progress_line(job: JobStatus, stage: StageStatus | None) -> str:
    line = f"{job.name} {job.state}" + (f", {job.detail}" if job.detail else "")
    if job.state != RUNNING or stage is None or stage.progress is None:
        return line
    progress = stage.progress
    return (
        f"{line}: step {progress.step:,} of {text.exact(stage.steps)}, loss {text.nats(progress.loss)}, "
        f"{text.count(progress.tokens_per_s)} tokens/s, {text.duration(progress.seconds_left)} left"
    )


def summary_lines(status: RunStatus, seconds: float | None = None) -> list[str]:
    """Return the summary of a run: losses and costs of its stages, the verified models, the report.

    seconds: how long the main process worked on it. It has then made all that it was asked for, which may be a part of the run.
    """
    state = status.state
    if seconds is not None:
        state = f"{state if state == DONE else 'the requested targets are made'} after {text.duration(seconds)}"
    lines = [f"Run {status.run}: {state} ({status.job_count})"]
    lines += [f"  {line}" for fetch in status.failed_fetches for line in _fetch_line(fetch).plain.splitlines()]
    for stage in status.stages:
        if progress := stage.progress:
            lines.append(
                f"  {stage.name}: {progress.step:,} of {text.exact(stage.steps)} steps, "
                f"loss {_change(progress.first_loss, progress.loss)}, "
                f"validation loss {_change(progress.first_validation_loss, progress.validation_loss)}{_learned(stage)}"
            )
    return [*lines, *(f"  {line}" for line in [*_costs(status), *_results(status)])]


def _learned(stage: StageStatus) -> str:
    """Return whether the loss fell enough, for people who do not know which loss is good; "" as long as this is not known."""
    learning = stage.learning
    if learning is None:
        return ""
    level = text.nats(learning.level)
    return f" (it learned: below {level})" if learning.learned else f" (it has not learned: not below {level})"


def _costs(status: RunStatus) -> list[str]:
    used = [stage.gpu_hours for stage in status.stages if stage.gpu_hours is not None]
    planned = sum_of_estimates(stage.gpu_hours_planned for stage in status.stages)
    if not used and not status.other_gpu_hours:
        return []
    of_plan = f" of {text.estimate(planned)} planned for the training steps" if planned else ""
    others = f", and {text.significant(status.other_gpu_hours)} in other jobs" if status.other_gpu_hours else ""
    return [f"GPU-hours: {text.significant(sum(used))}{of_plan}{others}"]


def sum_of_estimates(spans: Iterable[tuple[float, float] | None]) -> tuple[float, float] | None:
    """Return the sums of the lowest and of the highest values; None where nothing was estimated."""
    known = [span for span in spans if span is not None]
    return (sum(low for low, _ in known), sum(high for _, high in known)) if known else None


def _results(status: RunStatus) -> list[str]:
    models = [
        f"Model of {stage.name}, verified: {stage.exported_to}"
        for stage in status.stages
        if stage.exported_to is not None
    ]
    return [*models, *([f"Report: {status.report}"] if status.report else [])]
