"""events.jsonl: what happened to a stage beside its steps. Lines are only ever added, over all legs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from longhaul.artifacts.event_log import read_events


class Events:
    """Writes on the rank that has a file to write to; other ranks' calls do nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / "events.jsonl" if folder else None

    def write(self, event: str, **values: Any) -> None:
        """One line: time in seconds since 1970, the event's name, its values."""
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time_s": round(time.time(), 3), "event": event, **values}) + "\n")

    def longest(self, event: str, key: str) -> float:
        """The largest value of all such events so far; 0 when there is none."""
        rows = read_events(self._path) if self._path else []
        return max((row[key] for row in rows if row["event"] == event), default=0.0)
