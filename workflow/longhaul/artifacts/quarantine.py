"""Reads and changes results/quarantine.json, nodes that later jobs exclude; supervisor.py and decide_after_attempt.py add them,
`longhaul nodes --release` removes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Required

from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Artifact
from longhaul.artifacts.atomic_files import read_json
from longhaul.artifacts.job_state import utc_now
from longhaul.artifacts.typed_json import HostName, is_host_name
from longhaul.errors import UserError


class QuarantinedNode(TypedDict, total=False):
    """One node of the list; only its name is used."""

    node: Required[HostName]
    cause: str
    time: str
    evidence: str


@dataclass(frozen=True)
class Quarantine(Artifact):
    """results/quarantine.json: [{"node", "cause", "time", "evidence"}]. Users may edit the file."""

    hint: ClassVar[str] = "correct the entry, or remove it"

    nodes: list[QuarantinedNode] = field(default_factory=list)

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry["node"] for entry in self.nodes))


def read_quarantine(path: Path) -> Quarantine:
    """Read the list; it is empty if there is no file.

    Raises:
        UserError: the file is not a valid quarantine list, for example after a user's edit.
    """
    return Quarantine.read(path) if path.exists() else Quarantine()


def quarantined_nodes(path: Path) -> tuple[str, ...]:
    """Return the nodes to exclude from a job that is under way. Invalid entries of the file are reported and left out."""
    try:
        return read_quarantine(path).node_names
    except UserError as error:
        names = _valid_names(path)
        print(f"warning: of the quarantined nodes only {', '.join(names) or 'none'} is excluded: {error}", flush=True)
        return names


def quarantine_reasons(path: Path) -> dict[str, str]:
    """Return node -> why it is in the list and which job found that; {} if the file is not a valid list."""
    try:
        nodes = read_quarantine(path).nodes
    except UserError:
        return {}
    return {entry["node"]: _reason(entry) for entry in nodes}


def _reason(entry: QuarantinedNode) -> str:
    evidence = entry.get("evidence")
    return "; ".join(filter(None, (entry.get("cause"), f"found by {evidence}" if evidence else None)))


def _valid_names(path: Path) -> tuple[str, ...]:
    try:
        found = read_json(path)
    except UserError:
        return ()
    entries = found.get("nodes") if isinstance(found, dict) else None
    names = (
        [entry.get("node") for entry in entries or () if isinstance(entry, dict)] if isinstance(entries, list) else []
    )
    return tuple(dict.fromkeys(str(name) for name in names if is_host_name(name)))


def add_to_quarantine(path: Path, causes: Mapping[str, str], evidence: str) -> None:
    """Add nodes that are not in the list yet. causes: node -> why it is added; evidence: the job that found it

    Raises:
        UserError: the file is not a valid list. It is left as it is.
    """
    before = read_quarantine(path)
    listed = before.node_names
    added: list[QuarantinedNode] = [
        {"node": node, "cause": cause, "time": utc_now(), "evidence": evidence}
        for node, cause in causes.items()
        if node not in listed
    ]
    if added:
        Quarantine([*before.nodes, *added]).write(path)


def release_from_quarantine(path: Path, nodes: Iterable[str]) -> None:
    """Remove nodes from the list, so that later jobs may use them again.

    Raises:
        UserError: a node is not in the list, or the file is not a valid list. It is left as it is.
    """
    before, released = read_quarantine(path), set(nodes)
    if unknown := sorted(released - set(before.node_names)):
        listed = ", ".join(before.node_names) or "no node"
        raise UserError(
            f"{', '.join(unknown)}: not in {path}, which lists {listed}", "name a node of the list: longhaul nodes"
        )
    Quarantine([entry for entry in before.nodes if entry["node"] not in released]).write(path)
