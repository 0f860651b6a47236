"""The command `longhaul`: help with an example for every verb that people type, version, shell completion."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from longhaul import __version__
from longhaul.cli import app

GROUPS = ("data", "site", "fabric")


def printed(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    return done.output


def verbs(*group: str) -> list[tuple[str, ...]]:
    """Return the words of the verbs that the help of a group lists."""
    listed = re.findall(r"^│ ([a-z]+) ", printed(*group, "--help").rpartition("Commands")[2], flags=re.MULTILINE)
    return [(*group, word) for word in listed if word not in GROUPS]


VERBS = [*verbs(), *(verb for group in GROUPS for verb in verbs(group))]


def test_verbs_for_people_are_listed_and_those_of_jobs_are_hidden():
    first = {"plan", "run", "status", "report", "verify", "retry", "fetch"}
    assert first <= {verb[0] for verb in verbs()} and "job" not in {verb[0] for verb in verbs()}
    assert ("data", "inspect") in VERBS and ("site", "check") in VERBS and ("fabric", "explain") in VERBS
    assert "render" in printed("job", "--help")


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_a_verb_ends_with_an_example_of_it(verb: tuple[str, ...]):
    assert f"Example: longhaul {' '.join(verb)} " in printed(*verb, "--help")


def test_version():
    assert printed("--version") == f"longhaul {__version__}\n"


def test_completion_can_be_installed():
    assert "--install-completion" in printed("--help")


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        (("status",), "results/<run>"),
        (("retry",), "results/<run>/stages/<stage>"),
        (("data", "inspect"), "results/<run>/data/<dataset>.json"),
    ],
)
def test_help_shows_the_placeholders_of_a_path(verb: tuple[str, ...], path: str):
    """Outside of backticks, Markdown drops <run> as if it were HTML."""
    assert path in printed(*verb, "--help")
