"""The end of a job is explained by its state in Slurm."""

from __future__ import annotations

import pytest

from longhaul.report.ended_jobs import EndedJob, how_it_ended

END = "2026-11-28T18:00:00"


@pytest.mark.parametrize(
    ("state", "exit_code", "nodes", "cause", "remedy"),
    [
        ("NODE_FAIL", "0:0", "n[1-2]", "on n[1-2]: a node failed", "tell the administrators"),
        ("OUT_OF_MEMORY", "0:125", "n1", "its processes used more memory of a node", "ask for more memory"),
        ("TIMEOUT", "0:0", "n1", "it reached its time limit", "raise minutes"),
        ("FAILED", "0:9", "n1", "its batch script failed, killed by signal 9", "look at the end of its log"),
        ("FAILED", "3:0", "n1", "its batch script failed, exit code 3", "look at the end of its log"),
        ("CANCELLED", "0:0", "None assigned", f"at {END}: a user or an administrator cancelled it", ""),
        ("REVOKED", "0:0", "", f"at {END}: its state is REVOKED", ""),
    ],
)
def test_state_and_exit_code_give_cause_and_remedy(
    state: str, exit_code: str, nodes: str, cause: str, remedy: str
) -> None:
    found, what_to_do = how_it_ended("7", EndedJob(state, exit_code, END, nodes, "sacct"))
    assert found.startswith(f"Slurm ended job 7 ({state}) at {END}") and cause in found and remedy in what_to_do
    assert bool(what_to_do) == bool(remedy) and "signal 125" not in found


def test_job_whose_end_slurm_does_not_know():
    found, _ = how_it_ended("7", EndedJob("CANCELLED", "0:0", "Unknown", "", "sacct"))
    assert found == "Slurm ended job 7 (CANCELLED) at an unknown time: a user or an administrator cancelled it"
