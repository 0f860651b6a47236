"""The report's table of node checks names each finding, and each check that is ok once for all nodes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import EnvironmentReport, failed_path
from longhaul.artifacts.node_check_row import CheckRow
from longhaul.report import html_page
from longhaul.report.html_page import render_page
from longhaul.report.node_check_table import node_check_rows
from longhaul.report.run_results import read_run
from tests.support.finished_run_files import write_finished_run


def row(node: str, result: Any = "ok", check: str = "ECC", value: str = "on", component: str = "GPU 0") -> CheckRow:
    remedy = "" if result == "ok" else "reset the GPU"
    return {"check": check, "node": node, "component": component, "value": value, "expected": "on", "result": result,
            "remedy": remedy}  # fmt: skip


def test_findings_come_first_and_other_checks_once():
    rows = [row("n1"), row("n2"), row("n3", "warn", value="off"), row("n1", check="MIG", value="a"), row("n4", "unknown"),
            row("n2", "fail", value="gone", component="GPU 7")]  # fmt: skip
    found = [
        (line["result"], line["check"], line["node"], line["component"], line["value"])
        for line in node_check_rows(rows)
    ]
    assert found == [
        ("fail", "ECC", "n2", "GPU 7", "gone"),
        ("warn", "ECC", "n3", "GPU 0", "off"),
        ("unknown", "ECC", "n4", "GPU 0", "on"),
        ("ok", "ECC", "2 nodes", "", "on"),
        ("ok", "MIG", "n1", "", "a"),
    ]


def test_a_thousand_nodes_give_a_short_table():
    rows = [row(f"n{number}", check="matrix products", value=f"{number} TFLOP/s") for number in range(1000)]
    rows += [row(f"n{number}", "warn") for number in range(1000)]
    found = node_check_rows(rows)
    assert len(found) == 201 and found[-1]["node"] == "1000 nodes"
    assert found[-1]["value"] == "0 TFLOP/s; 1 TFLOP/s; 2 TFLOP/s and 997 more"


def test_a_failed_check_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(html_page, "get_plotlyjs", lambda: "")
    run = write_finished_run(tmp_path / "results")
    passed = EnvironmentReport.read(run.environment)
    run.environment.unlink()
    problem = "n1: GPU 3: <ECC>: 2, expected 0"
    EnvironmentReport([problem], passed.nodes, ["n1: hot"], [row("n1", "fail")]).write(failed_path(run.environment))
    page = render_page(read_run(run.folder))
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "n1: GPU 3: &lt;ECC&gt;: 2, expected 0 n1: hot" in text, "values of a run are escaped"
    assert (
        "Hardware checks result check node component value expected remedy fail ECC n1 GPU 0 on on reset the GPU"
        in text
    )
