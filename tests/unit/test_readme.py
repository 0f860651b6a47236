"""Figures of the README are those that a benchmark wrote; the long list of files is folded at its end."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.pipeline_run import REPOSITORY

ROW = re.compile(r"^\|.*\]\((bench/results/\w+\.txt)\) \|$")

MIRROR_OR_DATA = re.compile(r"^bench/results|^tests$|^tests/(unit|golden)")
"""Folders that the map leaves out: records, tests of single modules, rendered files."""


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
    before, part = text.split("## Every file\n")
    assert part.count("<details>\n<summary>Show all files</summary>\n\n") == 1
    assert part.endswith("<!-- end of package map -->\n\n</details>\n")
    assert "](#every-file)" in before.split("## Where do I change")[1]


def test_the_map_has_every_file_outside_of_the_package_and_its_unit_tests():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    tops = ("templates", "profiles", "envs", "workflow/rules", "bench", "tests")
    folders = {path.parent for top in tops for path in files_below(top) if path.name != "__init__.py"}
    folders = {folder for folder in folders if not MIRROR_OR_DATA.search(folder.relative_to(REPOSITORY).as_posix())}
    assert len(folders) >= 17
    for folder in folders:
        table = text.split(f"| **{folder.relative_to(REPOSITORY)}/** | ")[1].split("\n\n")[0]
        described = dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", table, re.MULTILINE))
        present = {path.name for path in files_below(folder) if path.parent == folder and path.name[0] != "_"}
        assert set(described) == present
        assert not [words for words in described.values() if len(words) < 10 or "{" in words or "#" in words], described


def files_below(folder: str | Path) -> list[Path]:
    below = (REPOSITORY / folder).rglob("*")
    return [path for path in below if path.is_file() and path.name[0] != "." and path.suffix != ".pyc"]
