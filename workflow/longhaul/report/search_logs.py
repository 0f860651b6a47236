"""Finds known problems in logs: lines that a pattern of known_problems.yaml matches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, NotRequired

import yaml
from pydantic import TypeAdapter
from typing_extensions import TypedDict

KNOWN_PROBLEMS = Path(__file__).with_name("known_problems.yaml")
_LOG_BYTES = 2 * 2**20
"""Largest part of a log that is searched, from its end."""
_LINE_CHARACTERS = 300
_ERROR, _REMEDY = "error: ", "  remedy: "
"""Beginnings of the lines of a UserError."""
NOT_NEEDED = "none is needed"
"""Beginning of the remedy of what longhaul has handled itself."""


class KnownProblem(TypedDict):
    """One entry of known_problems.yaml."""

    name: str
    pattern: str
    cause: str
    remedy: str
    source: str
    follows: NotRequired[bool]
    continues: NotRequired[bool]


@dataclass(frozen=True)
class Finding:
    """One cause.

    evidence:  `file:line: text`, or the record that it was read from
    follows:   it is usually the effect of another problem
    continues: the job continues or starts without any action
    rank:      findings of a lower rank are more special; -1: a record of longhaul names the cause
    """

    job: str
    cause: str
    evidence: str
    remedy: str
    count: int = 1
    follows: bool = False
    continues: bool = False
    rank: int = -1

    @property
    def is_note(self) -> bool:
        """Return whether the run goes on although nobody does anything."""
        return self.continues or self.remedy.startswith(NOT_NEEDED)


@cache
def known_problems() -> tuple[KnownProblem, ...]:
    """Return the entries of known_problems.yaml."""
    entries = yaml.safe_load(KNOWN_PROBLEMS.read_text(encoding="utf-8"))
    return tuple(TypeAdapter(list[KnownProblem]).validate_python(entries))


def search_log(job: str, path: Path, lines: re.Pattern[str] | None = None) -> list[Finding]:
    """Return the known problems that a log shows, each once with its first line. Only the last 2 MiB are searched.

    lines: only lines in which it is found are searched; None: all
    """
    first_line, text = _end_of(path)
    found: dict[str, tuple[KnownProblem, str]] = {}
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), first_line):
        if (lines is None or lines.search(line)) and (problem := match_line(line)):
            counts[problem["name"]] = counts.get(problem["name"], 0) + 1
            found.setdefault(problem["name"], (problem, f"{path}:{number}: {line.strip()[:_LINE_CHARACTERS]}"))
    return [
        Finding(
            job,
            problem["cause"],
            evidence,
            problem["remedy"],
            counts[name],
            problem.get("follows", False),
            problem.get("continues", False),
            known_problems().index(problem),
        )
        for name, (problem, evidence) in found.items()
    ]


def last_error(path: Path) -> tuple[str, str, str] | None:
    """Return cause, `file:line` and remedy of the last error of a verb that a log shows, without the marks before them."""
    first_line, text = _end_of(path)
    lines = text.splitlines()
    found = [index for index, line in enumerate(lines) if line.startswith(_ERROR)]
    if not found:
        return None
    after = lines[found[-1] + 1 :]
    remedy = next((line.removeprefix(_REMEDY) for line in after if line.startswith(_REMEDY)), "")
    return lines[found[-1]].removeprefix(_ERROR)[:_LINE_CHARACTERS], f"{path}:{first_line + found[-1]}", remedy


def match_line(line: str) -> KnownProblem | None:
    """Return the first known problem that a line shows, in the order of the file."""
    if not _any_problem().search(line):
        return None
    return next(problem for problem in known_problems() if _compiled(problem["pattern"]).search(line))


@cache
def _any_problem() -> re.Pattern[str]:
    """Return one expression for all problems: nearly every line of a log is decided with one search."""
    return _compiled("|".join(f"(?:{problem['pattern']})" for problem in known_problems()))


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _end_of(path: Path) -> tuple[int, str]:
    """Return the number of the first line that is searched, and the text from there on."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            start = max(0, size - _LOG_BYTES)
            stream.seek(0)
            skipped = _line_breaks(stream, start)
            return skipped + 1, stream.read().decode("utf-8", errors="replace")
    except OSError:
        return 1, ""


def _line_breaks(stream: BinaryIO, size: int) -> int:
    """Return how many line breaks the next `size` bytes hold."""
    count, left = 0, size
    while left and (part := stream.read(min(left, 2**20))):
        count, left = count + part.count(b"\n"), left - len(part)
    return count
