"""bench/results/faults.txt: a row for every cell of the fault matrix that passed, with the commit it passed at."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

from bench.machine import RESULTS, header, publish
from longhaul.report.goodput import Goodput
from tests.support.chain import REPOSITORY

_WIDTHS = (44, 11, 7, 9, 9, 8, 9)
_TITLES = ("fault", "while", "lost s", "attempts", "restart s", "goodput", "commit")


@dataclass(frozen=True)
class Row:
    """lost_s: beside the undisturbed run. restart_s: from the last start of the job to its first step."""

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


def row(
    fault: str, when: str, lost_s: float, attempts: int, restart_s: float | None = None, goodput: Goodput | None = None
) -> Row:
    """A cell that passed at the commit that is checked out."""
    restart = "-" if restart_s is None else f"{restart_s:.1f}"
    share = "-" if goodput is None else f"{goodput.goodput:.0%}"
    return Row(fault, when, f"{lost_s:.1f}", str(attempts), restart, share, _commit())


def keep(rows: Sequence[Row], cells: Sequence[tuple[str, str]]) -> None:
    """Writes the table anew, in the order of `cells`, with these rows in place of their older ones."""
    found = {old.key: old for old in _read()} | {new.key: new for new in rows}
    ordered = [found[key] for key in cells if key in found]
    missing = [" ".join(key) for key in cells if key not in found]
    said = [f"{len(ordered)} cells: the same bits as the undisturbed run, every step once, no job or process left"]
    said += [f"not seen to pass: {', '.join(missing)}"] if missing else []
    head = ["command: make faults", *header(("torch", "deepspeed", "snakemake"))[1:]]
    publish("faults", [*head, *said, "", _text(_TITLES), *(row.text() for row in ordered)])


def _read() -> list[Row]:
    path = RESULTS / "faults.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    table = lines[lines.index("") + 2 :] if "" in lines else []
    edges = [sum(_WIDTHS[:index]) + index for index in range(len(_WIDTHS) + 1)]
    return [Row(*(line[a:b].strip() for a, b in pairwise(edges))) for line in table]


def _text(cells: Sequence[str]) -> str:
    first, second, *numbers = (
        f"{cell:<{width}}" if index < 2 else f"{cell:>{width}}"
        for index, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
    )
    return " ".join((first, second, *numbers))


def _commit() -> str:
    words = ["git", "-C", str(REPOSITORY), "rev-parse", "--short=7", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "-"
