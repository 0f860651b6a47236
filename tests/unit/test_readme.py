"""Figures of the README are those that a benchmark wrote; the long list of files is folded at its end."""

from __future__ import annotations

import re

from tests.support.pipeline_run import REPOSITORY

ROW = re.compile(r"^\|.*\]\((bench/results/\w+\.txt)\) \|$")


def test_every_figure_stands_in_its_record():
    rows = [
        (line, match[1]) for line in (REPOSITORY / "README.md").read_text().splitlines() if (match := ROW.match(line))
    ]
    assert len(rows) >= 8
    for line, record in rows:
        text = (REPOSITORY / record).read_text()
        for figure in re.findall(r"\*\*(.+?)\*\*", line):
            assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d.])", text), f"{figure} is not in {record}"


def test_the_map_of_the_package_is_folded_and_last():
    """GitHub shows markdown inside of <details> only after an empty line."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    before, part = text.split("## The package, file by file\n")
    assert part.count("<details>\n<summary>Show all files</summary>\n\n") == 1
    assert part.endswith("<!-- end of package map -->\n\n</details>\n")
    assert "](#the-package-file-by-file)" in before.split("## Where do I change")[1]
