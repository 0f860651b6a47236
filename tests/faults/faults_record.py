"""bench/results/faults.txt: a row for each fault case that passed, with the commit at which it passed."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

from bench.machine import RESULTS, describe_machine, write_result
from longhaul.report.goodput import Goodput
from tests.support.pipeline_run import REPOSITORY

_WIDTHS = (44, 11, 7, 9, 9, 8, 9)
_TITLES = ("fault", "while", "lost s", "attempts", "restart s", "goodput", "commit")


@dataclass(frozen=True)
class TableRow:
    """A row of the table.

    lost_s:    time of the run minus that of the undisturbed run
    restart_s: from the last start of the job to its first step
    """

    fault: str
    when: str
    lost_s: str
    attempts: str
    restart_s: str
    goodput: str
    commit: str

    @property
    def key(self) -> tuple[str, str]:
        return self.fault, self.when

    def text(self) -> str:
        return _text(astuple(self))


def passed_row(
    fault: str, when: str, lost_s: float, attempts: int, restart_s: float | None = None, goodput: Goodput | None = None
) -> TableRow:
    """Return the row of a case that passed at the commit that is checked out."""
    restart = "-" if restart_s is None else f"{restart_s:.1f}"
    share = "-" if goodput is None else f"{goodput.goodput:.0%}"
    return TableRow(fault, when, f"{lost_s:.1f}", str(attempts), restart, share, _commit())


def write_table(rows: Sequence[TableRow], cases: Sequence[tuple[str, str]]) -> None:
    """Write the table in the order of `cases`. `rows` replace older rows of the same cases."""
    found = {old.key: old for old in _read()} | {new.key: new for new in rows}
    ordered = [found[key] for key in cases if key in found]
    missing = [" ".join(key) for key in cases if key not in found]
    summary = [f"{len(ordered)} cases: the same bits as the undisturbed run, every step once, no job or process left"]
    summary += [f"not passed yet: {', '.join(missing)}"] if missing else []
    head = ["command: make faults", *describe_machine(("torch", "deepspeed", "snakemake"))[1:]]
    write_result("faults", [*head, *summary, "", _text(_TITLES), *(row.text() for row in ordered)])


def _read() -> list[TableRow]:
    path = RESULTS / "faults.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    table = lines[lines.index("") + 2 :] if "" in lines else []
    edges = [sum(_WIDTHS[:index]) + index for index in range(len(_WIDTHS) + 1)]
    return [TableRow(*(line[a:b].strip() for a, b in pairwise(edges))) for line in table]


def _text(fields: Sequence[str]) -> str:
    first, second, *numbers = (
        f"{text:<{width}}" if index < 2 else f"{text:>{width}}"
        for index, (text, width) in enumerate(zip(fields, _WIDTHS, strict=True))
    )
    return " ".join((first, second, *numbers))


def _commit() -> str:
    words = ["git", "-C", str(REPOSITORY), "rev-parse", "--short=7", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "-"
