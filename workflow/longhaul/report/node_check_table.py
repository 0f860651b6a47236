"""Lists the rows of the report's table of node checks: what is not ok by node, and each other check once for all nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longhaul.artifacts.node_check_row import CheckRow

_ORDER = {"fail": 0, "warn": 1, "unknown": 2, "ok": 3}
_MOST_FINDINGS, _MOST_VALUES = 200, 3


def node_check_rows(rows: Sequence[CheckRow]) -> list[CheckRow]:
    """Return the findings, the worst first, then one row per check with all nodes on which it is ok."""
    findings = sorted((row for row in rows if row["result"] != "ok"), key=lambda row: _ORDER[row["result"]])
    checks: dict[str, list[CheckRow]] = {}
    for row in rows:
        if row["result"] == "ok":
            checks.setdefault(row["check"], []).append(row)
    return [*findings[:_MOST_FINDINGS], *(_one_row(found) for found in checks.values())]


def _one_row(rows: Sequence[CheckRow]) -> CheckRow:
    nodes = list(dict.fromkeys(row["node"] for row in rows))
    return {
        **rows[0],
        "node": nodes[0] if len(nodes) == 1 else f"{len(nodes)} nodes",
        "component": "",
        "value": _joined(row["value"] for row in rows),
        "expected": _joined(row["expected"] for row in rows),
    }


def _joined(values: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(values))
    more = f" and {len(distinct) - _MOST_VALUES} more" if len(distinct) > _MOST_VALUES else ""
    return "; ".join(distinct[:_MOST_VALUES]) + more
