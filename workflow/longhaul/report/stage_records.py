"""Reads what a stage has recorded so far: weights folder, length in steps; mean loss, speed, MFU of its last steps."""

from __future__ import annotations

import errno
import os
import statistics
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Count
from longhaul.artifacts.line_record_fields import MetricsRow
from longhaul.artifacts.line_records import read_first_records, read_last_records
from longhaul.artifacts.pack_totals import PackTotals
from longhaul.artifacts.paths import JobFolder, WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError

RECENT_STEPS = 50
_LOSS_STEPS = 10
"""Number of steps whose losses are averaged; at most RECENT_STEPS."""
_FIRST_ROWS = 5
"""Rows at the start of a metrics file: validation before the first step, the first step, and what a resume may have left."""
_VALIDATION_WITHIN_BYTES = 16 * 2**20
"""End of a metrics file in which the last validation is searched: about 50,000 steps."""


class _TrainSpecFields(TypedDict):
    """Keys of a stage's job.json that are read here."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    weights_root: str


class _IdentityFields(TypedDict):
    """Keys of identity.json of a weights folder that are read here."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    steps: NotRequired[Count]


class _AttemptSettings(TypedDict):
    """Keys of a line in attempts.jsonl that the speed depends on."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    world_size: int
    nodes: int
    micro_batch_size: int
    activation_checkpointing: str
    zero: dict[str, Any]
    parallel: NotRequired[dict[str, int]]


class _AttemptTime(TypedDict):
    """Key of a line in attempts.jsonl: when the attempt began."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    time: NotRequired[str]


def weights_folder(stage: JobFolder) -> WeightsFolder | None:
    """Return the weights folder that the stage's last attempt wrote to; None before its first attempt."""
    try:
        root = Path(read_typed_json(stage.job_spec, _TrainSpecFields)["weights_root"])
        return last_trained(stage.working_folder() / root)
    except UserError:
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a damaged spec
            return None
        raise


def last_trained(root: Path) -> WeightsFolder | None:
    """Return the weights folder below `root` whose last attempt began last. A copy of a run has other file times."""
    folders = [WeightsFolder(path.parent) for path in root.glob("*/attempts.jsonl")]
    return max(folders, key=_last_begun, default=None) if len(folders) > 1 else next(iter(folders), None)


def _last_begun(weights: WeightsFolder) -> str:
    """Return the time of the last attempt, in UTC as ISO 8601, so that the text sorts by time; "" if there is none."""
    return "".join(attempt.get("time", "") for attempt in read_last_records(weights.attempts, _AttemptTime, 1))


def read_pack_totals(weights: WeightsFolder, layout: str = "*") -> list[PackTotals]:
    """Return the totals of a stage's training packs (data/sampling/sample_sources.py); a mixture has one for each dataset.

    layout: length, seed and truncation in the name of the packs; `*` for all packs
    """
    return [read_typed_json(path, PackTotals) for path in sorted(weights.samples.glob(f"pack-*-train-{layout}.json"))]


def earlier_packs(folder: JobFolder, stage: Stage) -> list[PackTotals]:
    """Return the totals of the packs that an attempt made with this sequence length and truncation; [] where there are none."""
    weights = weights_folder(folder)
    try:
        return read_pack_totals(weights, f"{stage.sequence_length}-*-{stage.truncate}") if weights else []
    except UserError:  # the job that reads them reports it
        return []


def planned_steps(steps: int | None, weights: WeightsFolder | None) -> int | None:
    """Return a stage's number of steps; for a length in epochs (None) what its job recorded, and None before that."""
    if steps is not None or weights is None or not weights.identity.exists():
        return steps
    return read_typed_json(weights.identity, _IdentityFields).get("steps")


def measured(folder: JobFolder, stage: Stage, of: Callable[[list[MetricsRow]], float | None]) -> float | None:
    """Return a value of the last steps of a stage; None where it has not run on this number of GPUs with this layout."""
    weights = weights_folder(folder)
    attempts = read_last_records(weights.attempts, _AttemptSettings, 1) if weights else []
    if weights is None or not attempts or not _is_alike(attempts[-1], stage):
        return None
    return of(recent_steps(weights))


def _is_alike(attempt: _AttemptSettings, stage: Stage) -> bool:
    found = [attempt[key] for key in ("world_size", "nodes", "micro_batch_size", "activation_checkpointing", "zero")]
    wanted = [stage.nodes * stage.gpus_per_node, stage.nodes, stage.micro_batch_size, stage.activation_checkpointing]
    parallel = stage.parallel.model_dump()
    return found == [*wanted, stage.zero.model_dump(mode="json")] and attempt.get("parallel", parallel) == parallel


class MetricsRows(NamedTuple):
    """Lines of metrics.jsonl: the first ones, those of the last steps, and the last validation."""

    first: list[MetricsRow]
    trained: list[MetricsRow]
    validated: list[MetricsRow]


def read_rows(weights: WeightsFolder) -> MetricsRows:
    """Return the lines that the status needs. Only the ends of the file are read."""
    return MetricsRows(
        read_first_records(weights.metrics, MetricsRow, _FIRST_ROWS),
        recent_steps(weights),
        read_last_records(weights.metrics, MetricsRow, 1, b'"validation_loss"', _VALIDATION_WITHIN_BYTES),
    )


def recent_steps(weights: WeightsFolder) -> list[MetricsRow]:
    """Return the lines of the last steps."""
    return read_last_records(weights.metrics, MetricsRow, RECENT_STEPS, containing=b'"loss"')


def step_seconds(rows: list[MetricsRow]) -> float | None:
    """Return the median time of the last steps, waiting for data included."""
    times = [(row.get("step_time_s") or 0.0) + (row.get("data_wait_s") or 0.0) for row in rows[-RECENT_STEPS:]]
    return statistics.median(times) if times else None


def recent_median(rows: list[MetricsRow], name: str) -> float | None:
    """Return the median of a value over the last steps."""
    values = [value for row in rows[-RECENT_STEPS:] if (value := row.get(name)) is not None]
    return statistics.median(values) if values else None


def recent_loss(rows: list[MetricsRow]) -> float | None:
    """Return the mean loss of the last 10 steps, as the loss of one batch is noisy; None without a loss."""
    losses = [loss for row in rows if (loss := row.get("loss")) is not None]
    return statistics.fmean(losses[-_LOSS_STEPS:]) if losses else None


def bytes_below(folder: Path) -> int:
    """Return the size of all files below a folder. A training may remove old checkpoints meanwhile."""
    size = 0
    for name, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):
                size += Path(name, file).stat().st_size
    return size


def line_count(path: Path) -> int:
    """Return the number of lines of a file; 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
