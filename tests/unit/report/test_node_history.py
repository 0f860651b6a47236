"""`longhaul nodes`: what checks of all runs found about each node, the worst nodes first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longhaul.artifacts.node_results import NodeResult, append_node_results, new_node_result, read_node_results
from longhaul.artifacts.paths import QUARANTINE, RESULTS, JobId, RunPaths
from longhaul.artifacts.quarantine import add_to_quarantine, read_quarantine
from longhaul.cli import app
from longhaul.errors import UserError
from longhaul.report.node_history import node_histories, print_nodes


def result(node: str, time_s: float, problem: str = "", rate: float | None = 9.0) -> NodeResult:
    return {"time_s": time_s, "node": node, "check": "pair tournament", "bandwidth_gbps": rate, "problem": problem}


def test_worst_nodes_come_first_with_their_cause():
    rows = [
        result("n1", 1.0),
        result("n2", 1.0, "slow: usual are 9 GB/s", 1.0),
        result("n3", 1.0, "slow: usual are 9 GB/s", 2.0),
        result("n3", 2.0, rate=8.0),
    ]
    found = node_histories(rows, [{"node": "n9", "cause": "does not respond"}])
    assert [(one.node, one.state, one.checks, one.unfit) for one in found] == [
        ("n9", "quarantined", 0, 0),
        ("n2", "unfit", 1, 1),
        ("n3", "flaky", 2, 1),
        ("n1", "fit", 1, 0),
    ]
    assert [one.note for one in found] == ["does not respond", *["slow: usual are 9 GB/s"] * 2, ""]
    assert (found[2].last_bandwidth_gbps, found[2].last_checked_s) == (8.0, 2.0)


def states_of(problems: list[str]) -> list[str]:
    """Return the states of a node after each of its results."""
    rows = [result("n1", float(time_s), problem) for time_s, problem in enumerate(problems)]
    return [node_histories(rows[:count], [])[0].state for count in range(1, len(rows) + 1)]


def test_a_node_is_fit_again_after_ten_good_results_in_a_row():
    assert states_of(["slow", *[""] * 11]) == ["unfit", *["flaky"] * 9, "fit", "fit"]
    assert states_of(["", "slow", *[""] * 9, "slow", *[""] * 9]) == [
        "fit",
        "unfit",
        *["flaky"] * 9,
        "unfit",
        *["flaky"] * 9,
    ]
    (again,) = node_histories([result("n1", 5.0, "slow"), *(result("n1", 6.0 + k) for k in range(10))], [])
    assert (again.state, again.unfit, again.last_unfit_s, again.note) == ("fit", 1, 5.0, "slow")
    assert [one.last_unfit_s for one in node_histories([result("n2", 1.0)], [{"node": "n9"}])] == [None, None]


def test_results_of_all_jobs_of_all_runs_are_read_in_their_order(tmp_path: Path):
    jobs = [RunPaths("a", tmp_path).job(JobId("fabric")), RunPaths("b", tmp_path).stage("base")]
    for job, times in zip(jobs, [(3.0, 1.0), (2.0,)], strict=True):
        job.path.mkdir(parents=True)
        append_node_results(job, [result("n1", time_s) for time_s in times])
    with jobs[1].node_results.open("a") as stream:
        stream.write(json.dumps(result("--bad", 4.0)) + "\n")
    assert [row["time_s"] for row in read_node_results(tmp_path)] == [1.0, 2.0, 3.0]
    assert read_node_results(tmp_path / "none") == []


def test_released_nodes_leave_the_quarantine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    add_to_quarantine(QUARANTINE, dict.fromkeys(["n1", "n2", "n3"], "slow"), "fabric, job 7")
    before = QUARANTINE.read_text()
    refused = CliRunner().invoke(app, ["nodes", "--release", "n1", "--release", "n9"])
    assert isinstance(refused.exception, UserError) and QUARANTINE.read_text() == before
    assert refused.exception.message == "n9: not in results/quarantine.json, which lists n1, n2, n3"
    assert refused.exception.hint == "name a node of the list: longhaul nodes"
    assert all(node in CliRunner().invoke(app, ["nodes"]).output for node in ("n1", "n2", "n3"))
    released = CliRunner().invoke(app, ["nodes", "--release", "n1", "--release", "n3"])
    assert released.output == "removed from results/quarantine.json, so that later jobs may use them: n1, n3\n"
    assert read_quarantine(QUARANTINE).node_names == ("n2",)
    QUARANTINE.write_text("{")
    assert isinstance(CliRunner().invoke(app, ["nodes", "--release", "n2"]).exception, UserError)
    assert QUARANTINE.read_text() == "{", "a file that is no valid list stays as it is"


def test_verb_prints_the_nodes_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    job = RunPaths("a", RESULTS).job(JobId("fabric"))
    job.path.mkdir(parents=True)
    rows = [result("n1", 86400.0, "slow"), new_node_result("n1", "pair tournament", 11.5, "")]
    append_node_results(job, rows)
    add_to_quarantine(QUARANTINE, {"n2": "n2 is slow\x1b[31m"}, "fabric, job 7")
    assert read_quarantine(QUARANTINE).node_names == ("n2",)
    shown = CliRunner().invoke(app, ["nodes"])
    assert shown.exit_code == 0, shown.output
    assert "n2 is slow\\x1b[31m" in shown.output and "11.5" in shown.output
    assert shown.output.index("n2 ") < shown.output.index("n1 ")
    assert "1970-01-02" in shown.output, "when it was unfit"


def test_folder_without_results_is_named_until_a_check_has_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match=r"holds no results of nodes\s+remedy: call it in the working folder of a run"):
        print_nodes(tmp_path)
    job = RunPaths("a", tmp_path / RESULTS).job(JobId("environment"))
    job.path.mkdir(parents=True)
    append_node_results(job, [new_node_result("n1", "hardware", None, "")])
    print_nodes(tmp_path)
    assert "n1" in capsys.readouterr().out
