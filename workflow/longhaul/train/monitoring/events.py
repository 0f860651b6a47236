"""Appends events to events.jsonl: training began, saved, save_failed, resumed, rolled_back, work_lost, checkpoint_damaged. Lines
are only appended.
"""

from __future__ import annotations

import time
from pathlib import Path

from longhaul.artifacts.line_record_fields import read_events
from longhaul.artifacts.line_records import append_record
from longhaul.artifacts.paths import WeightsFolder


class EventWriter:
    """Appends events. Only rank 0 has a weights folder to write to; calls of other ranks do nothing."""

    def __init__(self, weights: Path | None) -> None:
        self._path = WeightsFolder(weights).events if weights else None

    def write(self, event: str, **values: object) -> None:
        """Append one line: the time in seconds since 1970, the event's name, and its values."""
        if self._path is None:
            return
        append_record(self._path, {"time_s": round(time.time(), 3), "event": event, **values})

    def largest(self, event: str, key: str) -> float:
        """Return the largest value of `key` in all events of that name so far; 0 where none has it."""
        rows = read_events(self._path) if self._path else []
        return max((row.get(key, 0.0) for row in rows if row["event"] == event), default=0.0)
