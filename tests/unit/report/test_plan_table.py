"""The printed plan shows names from data as they are: they cannot style or move the terminal's text, nor end the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longhaul.report.plan_table import print_plan
from tests.support.small_configs import plan_of


def test_names_of_files_and_columns_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "2000")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a[blue]\u202e.jsonl").write_text(json.dumps({"text": "x", "[/b]": 1, "\x1b[2J\u202e": 2}) + "\n")
    print_plan(plan_of(tmp_path, {"datasets.prose": {"kind": "text", "files": ["data"]}}))
    shown = "".join(capsys.readouterr().out.split())
    assert "nothingreadsthecolumns\\x1b[2J\\u202e,[/b]" in shown
    assert "a[blue]\\u202e.jsonl" in shown
    assert "\x1b" not in shown and "\u202e" not in shown


def test_the_memory_of_a_served_model_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    print_plan(plan_of(tmp_path, {"stages.0.export": "last", "stages.0.serve": {"nodes": 1}}))
    assert "1 node x 1 GPU (tensor 1 x pipeline 1)" in capsys.readouterr().out
