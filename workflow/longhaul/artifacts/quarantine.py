"""The list of nodes that later submissions exclude: results/quarantine.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from longhaul.artifacts.artifact_schemas import Artifact
from longhaul.artifacts.job_state import utc_now


@dataclass(frozen=True)
class Quarantine(Artifact):
    """results/quarantine.json: [{"node", "cause", "time", "evidence"}]. Users may edit the file."""

    nodes: list[dict[str, str]] = field(default_factory=list)

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry["node"] for entry in self.nodes))


def read_quarantine(path: Path) -> Quarantine:
    """Read the list; it is empty if there is no file.

    Raises:
        UserError: the file is not a valid quarantine list, for example after a user's edit.
    """
    return Quarantine.read(path) if path.exists() else Quarantine()


def add_to_quarantine(path: Path, nodes: Iterable[str], cause: str, evidence: str) -> None:
    """Add those of `nodes` that are not in the list yet."""
    before = read_quarantine(path)
    listed = before.node_names
    added = [
        {"node": node, "cause": cause, "time": utc_now(), "evidence": evidence} for node in nodes if node not in listed
    ]
    if added:
        Quarantine([*before.nodes, *added]).write(path)
