"""Reading of events.jsonl and history.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def read_events(path: Path) -> list[Event]:
    """Return the complete lines of history.jsonl or events.jsonl; [] if there is no file.

    A process that is killed while it writes leaves an incomplete line. Such a line is skipped.
    """
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
