"""Figures of the README are those that a benchmark wrote; the long list of files is folded at its end."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_the_map_has_every_rule_template_profile_and_environment():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    folders = {path.parent for top in ("templates", "profiles", "envs", "workflow/rules") for path in files_below(top)}
    assert len(folders) >= 8
    for folder in folders:
        table = text.split(f"| **{folder.relative_to(REPOSITORY)}/** | ")[1].split("\n\n")[0]
        described = dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", table, re.MULTILINE))
        assert set(described) == {path.name for path in files_below(folder) if path.parent == folder}
        assert not [words for words in described.values() if len(words) < 10 or "{" in words or "#" in words], described


def files_below(folder: str | Path) -> list[Path]:
    below = (REPOSITORY / folder).rglob("*")
    return [path for path in below if path.is_file() and path.name[0] != "." and path.suffix != ".pyc"]
