"""Builds rows of the environment check's table from facts, merges and prints them, and writes them as problems and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longhaul.artifacts.node_check_row import CheckRow, Result

_NAMED_FAILURES, _NAMED_PLACES = 20, 4
"""Largest numbers of failures, and of places in a line, that are printed; all of them are in the report's table."""
_PRINTED_ROWS = 100
_COLUMNS = ("result", "node", "component", "check", "value", "expected", "remedy")


@dataclass(frozen=True)
class FactCheck:
    """The expectation of one fact, and the remedy. judge: the fact's value -> result; text: the value as the table shows it."""

    check: str
    fact: str
    expected: str
    judge: Callable[[Any], Result]
    remedy: str
    text: Callable[[Any], str] = str


@dataclass(frozen=True)
class Component:
    """The node, or a part of it, to which rows belong."""

    node: str
    name: str = ""

    def row(self, check: str, value: str, expected: str, result: Result = "ok", remedy: str = "") -> CheckRow:
        """Return a row; only rows that are not ok have a remedy."""
        return {
            "check": check,
            "node": self.node,
            "component": self.name,
            "value": value,
            "expected": expected,
            "result": result,
            "remedy": "" if result == "ok" else remedy,
        }

    def unknown(self, check: str, reason: str, expected: str, remedy: str = "") -> CheckRow:
        """Return the row of a value that the node does not report."""
        return self.row(check, f"not available: {reason}", expected, "unknown", remedy)

    def judged(self, checks: Iterable[FactCheck], facts: Any) -> list[CheckRow]:
        """Return one row per check of an object with facts as attributes; a fact that is None has a reason in `unavailable`."""
        return [self._judged(check, facts) for check in checks]

    def _judged(self, check: FactCheck, facts: Any) -> CheckRow:
        value = getattr(facts, check.fact)
        if value is None:
            reason = facts.unavailable.get(check.fact, "no reason is known")
            return self.unknown(check.check, reason, check.expected)
        return self.row(check.check, check.text(value), check.expected, check.judge(value), check.remedy)


def fail_if(is_bad: Callable[[Any], bool]) -> Callable[[Any], Result]:
    return lambda value: "fail" if is_bad(value) else "ok"


def warn_if(is_bad: Callable[[Any], bool]) -> Callable[[Any], Result]:
    return lambda value: "warn" if is_bad(value) else "ok"


def merge_equal_rows(rows: Sequence[CheckRow]) -> list[CheckRow]:
    """Return the rows with one row for all components of a node that are ok, or unknown, with the same value."""
    merged: dict[tuple[str, ...], CheckRow] = {}
    components: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        alike = ("component", "remedy") if row["result"] in ("ok", "unknown") else ("remedy",)
        key = tuple(str(value) for name, value in row.items() if name not in alike)
        merged.setdefault(key, row)
        components.setdefault(key, []).append(row["component"])
    return [{**row, "component": ", ".join(dict.fromkeys(components[key]))} for key, row in merged.items()]


def problem_lines(rows: Iterable[CheckRow]) -> list[str]:
    """Return one line per finding of result fail; nodes and components with the same finding share a line."""
    return _shared_lines([row for row in rows if row["result"] == "fail"], _NAMED_FAILURES)


def warning_lines(rows: Iterable[CheckRow]) -> list[str]:
    """Return one line per finding of result warn, as problem_lines does."""
    return _shared_lines([row for row in rows if row["result"] == "warn"], _NAMED_PLACES)


def print_checks(rows: Sequence[CheckRow]) -> None:
    """Print the rows that failed or warn, the worst first, what is unknown, and how many checks have which result."""
    shown = [row for result in ("fail", "warn") for row in rows if row["result"] == result]
    console = Console(width=160)
    if shown:
        table = Table(*_COLUMNS, title="Checks that are not ok", title_justify="left")
        for row in shown[:_PRINTED_ROWS]:
            table.add_row(*(escape(row[name]) for name in _COLUMNS))
        console.print(table)
    for line in _shared_lines([row for row in rows if row["result"] == "unknown"], _NAMED_PLACES):
        console.print(f"unknown: {line}", markup=False)
    counts = Counter(row["result"] for row in rows)
    text = ", ".join(f"{counts[result]} {result}" for result in ("ok", "warn", "fail", "unknown"))
    left_out = f"; {len(shown) - _PRINTED_ROWS} rows are in the report only" if len(shown) > _PRINTED_ROWS else ""
    console.print(f"hardware checks: {text}{left_out}", markup=False)


def _shared_lines(rows: Sequence[CheckRow], named: int) -> list[str]:
    """Return one line per check, expected value and remedy, with the first `named` places."""
    findings: dict[tuple[str, str, str], list[CheckRow]] = {}
    for row in rows:
        findings.setdefault((row["check"], row["expected"], row["remedy"]), []).append(row)
    return [_line(found, named) for found in findings.values()]


def _line(rows: Sequence[CheckRow], named: int) -> str:
    """Return `n1: GPU 3, n2: GPU 0: check: value, expected …; remedy`; values that differ are after their places."""
    first, values = rows[0], {row["value"] for row in rows}
    places = [_place(row) + (f" ({row['value']})" if len(values) > 1 else "") for row in rows]
    value = f": {first['value']}" if len(values) == 1 else ""
    remedy = f"; {first['remedy']}" if first["remedy"] else ""
    return f"{_names(places, named)}: {first['check']}{value}, expected {first['expected']}{remedy}"


def _place(row: CheckRow) -> str:
    return ": ".join(name for name in (row["node"], row["component"]) if name)


def _names(places: Sequence[str], named: int) -> str:
    more = len(places) - named
    return ", ".join(places) if more <= 1 else f"{', '.join(places[:named])} and {more} others"
