"""Divides a stage's time into queue, stopped, start-up, training, validation, saving, lost work, restarts and fault detection.
Each second counts once.

Two files are read:
history.jsonl (supervisor) an attempt begins with `running` or `restarted`; `waiting`, `failed` and `done` end it.
events.jsonl (trainer)     `training`: the first step of an attempt may begin. `saved`: a checkpoint was written; the event holds
                           the seconds since the one before. `work_lost`: steps that are trained again. `bad_step`: a step
                           that is not kept.

Goodput is the share of the time that went into training steps which were kept. Google and Meta define it so in reports on
their training runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from longhaul.artifacts.line_record_fields import Event, read_events
from longhaul.artifacts.paths import JobFolder, WeightsFolder

ATTEMPT_BEGINS = ("running", "restarted")


@dataclass(frozen=True)
class Goodput:
    """Parts of a stage's wall-clock time in seconds, from the submission of its first job to its end."""

    queue: float
    stopped: float  # from a failure to the next submission
    start_up: float  # from the start of the first attempt to its first step
    training: float  # steps that were kept
    validation: float
    saving: float
    lost_work: float  # steps that were trained again, or not kept
    restarts: float  # start-up of later attempts
    fault_detection: float  # the rest: from a fault to its detection, and the end of processes

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def shares(self) -> dict[str, float]:
        """Return each part divided by the total; empty where the total is 0."""
        return {name: seconds / self.total for name, seconds in asdict(self).items()} if self.total else {}

    @property
    def goodput(self) -> float:
        return self.training / self.total if self.total else 0.0


def read_goodput(stage: Path, weights: Path) -> Goodput | None:
    """Return the parts of a stage's time, or None when the stage has no history.

    A stage may have run again with other settings after it was done. Then only the later run counts.

    stage: the stage's job folder; weights: its weights folder
    """
    history = _after_last_done(read_events(JobFolder(stage).history))
    if not history:
        return None
    begins_s = _submitted_s(history[0])
    events = [event for event in read_events(WeightsFolder(weights).events) if event["time_s"] >= begins_s]
    return account(history, events)


def account(history: list[Event], events: list[Event]) -> Goodput:
    """Divide the time between the first submission and the last event of the history.

    history: the supervisor's events, oldest first; events: the trainer's events since the first submission
    """
    total = history[-1]["time_s"] - _submitted_s(history[0])
    start_ups = list(start_up_times(history, events))
    parts = {
        **_between_attempts(history),
        "start_up": start_ups[0] if start_ups else 0.0,
        "restarts": sum(start_ups[1:]),
        **_training(events),
    }
    return Goodput(**parts, fault_detection=max(0.0, total - sum(parts.values())))


def _submitted_s(event: Event) -> float:
    """Return when the event's job was submitted, or when the event happened where the job was not queued."""
    return event.get("queued_since_s") or event["time_s"]


def _after_last_done(history: list[Event]) -> list[Event]:
    """Return the events after the last `done` that is followed by another event."""
    done = [index for index, event in enumerate(history[:-1]) if event["event"] == "done"]
    return history[done[-1] + 1 :] if done else history


def _between_attempts(history: list[Event]) -> dict[str, float]:
    """Return {"queue", "stopped"}: the seconds before attempts.

    Queue time runs from a submission, or from a job's return to the queue, to its start. A job that waits for the end of
    another job queues, too.
    """
    queue = stopped = 0.0
    for before, event in pairwise([None, *history]):
        if event is None or event["event"] != "running":
            continue
        since_s = _submitted_s(event)
        if before and before["event"] == "waiting":
            since_s = before["time_s"]
        elif before:
            since_s = max(since_s, before["time_s"])
            stopped += since_s - before["time_s"] if before["event"] == "failed" else 0.0
        queue += max(0.0, event["time_s"] - since_s)
    return {"queue": queue, "stopped": stopped}


def start_up_times(history: list[Event], events: list[Event]) -> Iterable[float]:
    """Yield for each attempt the seconds until its first step may begin, or until its end where it had no step."""
    first_steps = [event["time_s"] for event in events if event["event"] == "training"]
    for event, after in pairwise([*history, None]):
        if event and event["event"] in ATTEMPT_BEGINS:
            ends_s = max(event["time_s"], _submitted_s(after) if after else event["time_s"])
            step_s = next((s for s in first_steps if event["time_s"] <= s <= ends_s), ends_s)
            yield step_s - event["time_s"]


def _training(events: list[Event]) -> dict[str, float]:
    """Return {"training", "validation", "saving", "lost_work"}.

    A resume from an older checkpoint also loses the steps of the checkpoints after it.
    """
    saves: list[Event] = []
    lost = 0.0
    for event in events:
        if event["event"] == "saved":
            saves.append(event)
        elif event["event"] == "bad_step":
            lost += event.get("seconds", 0.0)
        elif event["event"] == "work_lost":
            lost += event["seconds"]
            saves = [save if save["step"] <= event["to_step"] else {**save, "training_s": 0.0} for save in saves]
    return {
        "training": sum(save["training_s"] for save in saves),
        "validation": sum(save["validation_s"] for save in saves),
        "saving": sum(save["saving_s"] for save in saves),
        "lost_work": lost,
    }
