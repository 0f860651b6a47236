"""What a stage's time went into, from what its supervisor and its trainer wrote down: every second, once.

history.jsonl (the supervisor): an attempt begins with `running` or `restarted`. events.jsonl (the trainer): `training` when
the first step of an attempt may begin, `saved` with the seconds since the one before, `work_lost` for steps that are done
again. Goodput is the share of training that was kept, as in Google's and Meta's accounts of their training runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from longhaul.artifacts.event_log import Event, read_events

_BEGINS = ("running", "restarted")


@dataclass(frozen=True)
class Goodput:
    """Seconds of a stage's life, from the submission of its first job to its end."""

    queue: float
    stopped: float  # after a failure, until somebody submitted it again
    start_up: float  # of the first attempt: from the job's start to the first step
    training: float  # steps that count
    validation: float
    saving: float
    lost_work: float  # steps that were done again
    restarts: float  # start-ups of later attempts
    noticing: float  # the rest: until a fault was noticed, and leaving

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def shares(self) -> dict[str, float]:
        """Parts of 1."""
        return {name: seconds / self.total for name, seconds in asdict(self).items()} if self.total else {}

    @property
    def goodput(self) -> float:
        return self.training / self.total if self.total else 0.0


def read_goodput(stage: Path, weights: Path) -> Goodput | None:
    """Of a stage's folder and its weights folder; None when nothing was written down."""
    history = _since_last_done(read_events(stage / "history.jsonl"))
    if not history:
        return None
    begins_s = history[0].get("queued_since_s") or history[0]["time_s"]
    events = [event for event in read_events(weights / "events.jsonl") if event["time_s"] >= begins_s]
    return account(history, events)


def account(history: list[Event], events: list[Event]) -> Goodput:
    """Sorts the time between the first submission and the last event into its parts."""
    total = history[-1]["time_s"] - (history[0].get("queued_since_s") or history[0]["time_s"])
    starts = list(start_ups(history, events))
    parts = {
        **_between_attempts(history),
        "start_up": starts[0] if starts else 0.0,
        "restarts": sum(starts[1:]),
        **_training(events),
    }
    return Goodput(**parts, noticing=max(0.0, total - sum(parts.values())))


def _since_last_done(history: list[Event]) -> list[Event]:
    """A stage that is trained anew, with other settings, begins another life."""
    dones = [index for index, event in enumerate(history[:-1]) if event["event"] == "done"]
    return history[dones[-1] + 1 :] if dones else history


def _between_attempts(history: list[Event]) -> dict[str, float]:
    """From a submission, or a job's return into the queue, to its start; a job that waits for another one's end queues, too."""
    queue = stopped = 0.0
    for before, event in pairwise([None, *history]):
        if event is None or event["event"] != "running":
            continue
        since_s = event.get("queued_since_s") or event["time_s"]
        if before and before["event"] == "waiting":
            since_s = before["time_s"]
        elif before:
            since_s = max(since_s, before["time_s"])
            stopped += since_s - before["time_s"] if before["event"] == "failed" else 0.0
        queue += max(0.0, event["time_s"] - since_s)
    return {"queue": queue, "stopped": stopped}


def start_ups(history: list[Event], events: list[Event]) -> Iterable[float]:
    """Of each attempt, until its first step may begin; one that never got there is start-up to its end."""
    first_steps = [event["time_s"] for event in events if event["event"] == "training"]
    for event, after in pairwise([*history, None]):
        if event and event["event"] in _BEGINS:
            ends_s = (after.get("queued_since_s") or after["time_s"]) if after else event["time_s"]
            ends_s = max(event["time_s"], ends_s)
            step_s = next((s for s in first_steps if event["time_s"] <= s <= ends_s), ends_s)
            yield step_s - event["time_s"]


def _training(events: list[Event]) -> dict[str, float]:
    """Steps of saves that a later resume went back behind were lost, too."""
    kept: list[Event] = []
    lost = 0.0
    for event in events:
        if event["event"] == "saved":
            kept.append(event)
        elif event["event"] == "bad_step":
            lost += event.get("seconds", 0.0)
        elif event["event"] == "work_lost":
            lost += event["seconds"]
            kept = [save if save["step"] <= event["to_step"] else {**save, "training_s": 0.0} for save in kept]
    return {
        "training": sum(save["training_s"] for save in kept),
        "validation": sum(save["validation_s"] for save in kept),
        "saving": sum(save["saving_s"] for save in kept),
        "lost_work": lost,
    }
