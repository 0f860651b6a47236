"""Fields of the lines in metrics.jsonl, attempts.jsonl, events.jsonl and history.jsonl; line_records.py reads the lines. Values
that nothing computes with have no fixed type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, FiniteFloat
from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Count
from longhaul.artifacts.line_records import read_records

Time = Annotated[FiniteFloat, Field(ge=0, le=253_000_000_000)]
"""Seconds since 1970, until the year 9987: later dates cannot be shown."""


class MetricsRow(TypedDict):
    """One line of metrics.jsonl: the numbers of an optimizer step, or the validation loss after it. None: not finite.

    time_s: when the line was written, in seconds since 1970
    """

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    step: Count
    validation_loss: NotRequired[float | None]
    loss: NotRequired[float | None]
    grad_norm: NotRequired[float | None]
    lr: NotRequired[float | None]
    tokens_per_s: NotRequired[float | None]
    padding_share: NotRequired[float | None]
    cut_loss_share: NotRequired[float | None]
    step_time_s: NotRequired[float | None]
    data_wait_s: NotRequired[float | None]
    memory_bytes: NotRequired[float | None]
    mfu: NotRequired[float | None]
    gpu_utilisation: NotRequired[float | None]
    time_s: NotRequired[Time]


class Attempt(TypedDict):
    """One line of attempts.jsonl."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    hosts: list[str]
    world_size: NotRequired[int]
    epochs: NotRequired[dict[str, float]]


Seconds = Annotated[float, Field(ge=0, le=1e9)]


class GapRecord(TypedDict):
    """A time in which nothing ran, and the kernels before and after it."""

    seconds: Seconds
    after: str
    before: str


class KernelRecord(TypedDict):
    """All calls of one kernel, or of one operator where the steps ran on a CPU."""

    name: str
    kind: str
    calls: int
    seconds: Seconds


class TimeBreakdown(TypedDict):
    """Time of the profiled steps of one rank, by class of kernel.

    has_kernels:     false where the steps ran on a CPU; then operators take the place of kernels
    covered_s:       by class; a moment in which several classes run counts for one of them, for communication last
    communication_s: includes the time that other classes hide
    """

    has_kernels: bool
    seconds: Annotated[Seconds, Field(gt=0)]
    covered_s: dict[str, Seconds]
    idle_s: Seconds
    communication_s: Seconds
    gaps: list[GapRecord]
    kernels: list[KernelRecord]


class StepProfile(TypedDict):
    """The profile of one rank: `profile/rank-<rank>.json` of a weights folder."""

    rank: int
    host: str
    first_step: int
    steps: Annotated[int, Field(ge=1)]
    breakdown: TimeBreakdown


Event = dict[str, Any]
START_UP_PHASES = ("imports", "rendezvous", "data", "model", "engine", "checkpoint", "validation", "first_step")
"""Parts of an attempt's start, in this order. Event `start_up` has the seconds of each on rank 0, as `<phase>_s`."""
_REQUIRED = {
    "start_up": tuple(f"{phase}_s" for phase in START_UP_PHASES),
    "saved": ("step", "training_s", "validation_s", "saving_s"),
    "work_lost": ("seconds", "to_step"),
}
"""Event -> the values that the report and the trainer compute with."""


class _EventFields(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    time_s: Time
    event: str
    queued_since_s: NotRequired[Time | None]
    seconds: NotRequired[FiniteFloat]
    last_step_s: NotRequired[FiniteFloat]
    step: NotRequired[Count]
    to_step: NotRequired[Count]
    training_s: NotRequired[FiniteFloat]
    validation_s: NotRequired[FiniteFloat]
    saving_s: NotRequired[FiniteFloat]
    durable_s: NotRequired[FiniteFloat]
    imports_s: NotRequired[FiniteFloat]
    rendezvous_s: NotRequired[FiniteFloat]
    data_s: NotRequired[FiniteFloat]
    model_s: NotRequired[FiniteFloat]
    engine_s: NotRequired[FiniteFloat]
    checkpoint_s: NotRequired[FiniteFloat]
    first_step_s: NotRequired[FiniteFloat]


def _require_values(event: Event) -> Event:
    missing = [key for key in _REQUIRED.get(event["event"], ()) if key not in event]
    if missing:
        raise ValueError(f"the event {event['event']} has no `{missing[0]}`")
    return event


_EVENT: Any = Annotated[_EventFields, AfterValidator(_require_values)]


def read_events(path: Path) -> list[Event]:
    """Return the events of history.jsonl or events.jsonl; [] if there is no file. Bad lines are left out."""
    return read_records(path, _EVENT)
