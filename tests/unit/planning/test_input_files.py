"""Data files that a config names."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.errors import UserError
from longhaul.planning import dataset_files
from tests.support.small_configs import plan_of


def test_a_file_may_be_listed_only_once(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    prose = {"kind": "text", "files": ["*.jsonl"]}
    with pytest.raises(UserError, match=r"datasets.prose.files: .*b.jsonl is the same file as .*a.jsonl"):
        plan_of(tmp_path, {"datasets.prose": prose})
    with pytest.raises(UserError, match=r"a.jsonl is listed twice"):
        plan_of(tmp_path, {"datasets.prose": {**prose, "files": ["a.jsonl", "a.jsonl"]}})


def test_an_empty_file_is_refused_unless_bad_rows_are_skipped(tmp_path: Path):
    (tmp_path / "a.jsonl").touch()
    prose = {"kind": "text", "files": ["a.jsonl"]}
    with pytest.raises(UserError, match=r"datasets.prose.files: .*a.jsonl is empty"):
        plan_of(tmp_path, {"datasets.prose": prose})
    plan_of(tmp_path, {"datasets.prose": {**prose, "bad_rows": "skip"}})


def test_files_are_sorted_within_each_pattern(tmp_path: Path):
    for name in ("b/2.txt", "b/1.txt", "b/.hidden", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    plan = plan_of(tmp_path, {"datasets.prose": {"kind": "text", "files": ["b", "*.txt"]}})
    found = [str(path.relative_to(tmp_path)) for path in dataset_files(plan.loaded, "prose")]
    assert found == ["b/1.txt", "b/2.txt", "a.txt"]
