"""Figures of the README are those that a benchmark wrote."""

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
