"""The list of nodes that later submissions exclude: results/quarantine.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from longhaul.artifacts.job_state import now
from longhaul.artifacts.schemas import Artifact


@dataclass(frozen=True)
class Quarantine(Artifact):
    """results/quarantine.json: [{"node", "cause", "time", "evidence"}]; a person may edit it."""

    nodes: list[dict[str, str]] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry["node"] for entry in self.nodes))


def read_quarantine(path: Path) -> Quarantine:
    """Raises UserError when a person's edit broke it."""
    return Quarantine.read(path) if path.exists() else Quarantine()


def quarantine(path: Path, nodes: Iterable[str], cause: str, evidence: str) -> None:
    """Adds nodes to the list."""
    before = read_quarantine(path)
    added = [{"node": n, "cause": cause, "time": now(), "evidence": evidence} for n in nodes if n not in before.names]
    if added:
        Quarantine([*before.nodes, *added]).write(path)
