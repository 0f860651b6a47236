"""What the docs point to exists: the "where do I change …?" table, and every relative link."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted(REPOSITORY.glob("docs/**/*.md")),
    REPOSITORY / "config" / "README.md",
]


def test_the_table_of_changes_names_places_that_exist():
    table = (REPOSITORY / "CONTRIBUTING.md").read_text().split("## Where do I change")[1].split("##")[0]
    named = [
        path for row in table.splitlines() if row.startswith("| ") for path in re.findall(r"`([\w./]+/[\w./]*)`", row)
    ]
    assert len(named) > 25
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (page.parent / link).exists()] == []
