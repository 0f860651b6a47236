"""Lists nodes with what checks found about them over time, for `longhaul nodes`: slow, flaky or fit, and the quarantine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longhaul.artifacts.node_results import NodeResult, read_node_results
from longhaul.artifacts.paths import QUARANTINE, RESULTS
from longhaul.artifacts.quarantine import QuarantinedNode, read_quarantine
from longhaul.errors import UserError, printable
from longhaul.report.number_format import MISSING, significant

_ORDER = ("quarantined", "unfit", "flaky", "fit")
_GOOD_RESULTS = 10
"""After this many good results in a row a node is fit again."""


@dataclass(frozen=True)
class NodeHistory:
    """One node. state: quarantined; unfit by its last result; flaky: unfit in one of its last ten results; or fit.

    note: why it is in quarantine, else the problem of its last result that was unfit
    """

    node: str
    state: str
    checks: int
    unfit: int
    last_bandwidth_gbps: float | None
    last_checked_s: float | None
    last_unfit_s: float | None
    note: str


def node_histories(rows: Sequence[NodeResult], quarantined: Sequence[QuarantinedNode]) -> list[NodeHistory]:
    """Return every node that a check or the quarantine names, the worst first. rows: the oldest first."""
    by_node: dict[str, list[NodeResult]] = defaultdict(list)
    for row in rows:
        by_node[row["node"]].append(row)
    causes = {entry["node"]: entry.get("cause", "") for entry in quarantined}
    found = [_history(node, by_node.get(node, []), causes.get(node)) for node in {**by_node, **causes}]
    return sorted(found, key=lambda history: (_ORDER.index(history.state), -history.unfit, history.node))


def _history(node: str, rows: Sequence[NodeResult], cause: str | None) -> NodeHistory:
    unfit = [row for row in rows if row["problem"]]
    rates = [row["bandwidth_gbps"] for row in rows if row["bandwidth_gbps"] is not None]
    return NodeHistory(
        node=node,
        state=_state(rows) if cause is None else "quarantined",
        checks=len(rows),
        unfit=len(unfit),
        last_bandwidth_gbps=rates[-1] if rates else None,
        last_checked_s=rows[-1]["time_s"] if rows else None,
        last_unfit_s=unfit[-1]["time_s"] if unfit else None,
        note=cause if cause is not None else unfit[-1]["problem"] if unfit else "",
    )


def _state(rows: Sequence[NodeResult]) -> str:
    if rows[-1]["problem"]:
        return "unfit"
    return "flaky" if any(row["problem"] for row in rows[-_GOOD_RESULTS:]) else "fit"


def print_nodes(workdir: Path) -> None:
    """Print the nodes of all runs below a working folder.

    Raises:
        UserError: no check has written anything there yet, or a file cannot be read.
    """
    found = node_histories(read_node_results(workdir / RESULTS), read_quarantine(workdir / QUARANTINE).nodes)
    if not found:
        raise UserError(
            f"{workdir / RESULTS} holds no results of nodes",
            "call it in the working folder of a run whose environment check has run",
        )
    table = Table(title="Nodes of all runs in this folder", title_justify="left")
    for column in ("node", "state", "checks", "unfit", "last GB/s", "last check", "last unfit", "cause"):
        table.add_column(column, overflow="fold")
    for history in found:
        table.add_row(*(Text(printable(cell)) for cell in _cells(history)))
    Console(width=140).print(table)


def _cells(history: NodeHistory) -> tuple[str, ...]:
    return (
        history.node,
        history.state,
        str(history.checks),
        str(history.unfit),
        significant(history.last_bandwidth_gbps),
        _time(history.last_checked_s),
        _time(history.last_unfit_s),
        history.note,
    )


def _time(time_s: float | None) -> str:
    return MISSING if time_s is None else datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
