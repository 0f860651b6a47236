"""A node with a problem of its own is excluded; a problem of all nodes, or between two, excludes none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.checks.node_problems import node_problems
from longhaul.checks.nodes_to_exclude import environment_results, nodes_to_exclude, problems_by_node
from tests.support.healthy_node_facts import environment_job, hardware, two_gpu_nodes

JOB = environment_job(build="cuda 13.0", memory_mb=100_000)


def nodes(count: int = 4) -> list[dict[str, Any]]:
    """Return the facts of some nodes without problems."""
    return [{**two_gpu_nodes()[0], "host": f"n{number}"} for number in range(1, count + 1)]


def failed(node: str) -> CheckRow:
    return {"check": "MIG", "node": node, "component": "", "value": "", "expected": "", "result": "fail", "remedy": ""}


def excluded(found: list[dict[str, Any]], rows: Sequence[CheckRow] = ()) -> list[str]:
    problems = problems_by_node(found, rows, JOB)
    unfit = nodes_to_exclude(found, problems, JOB)
    assert all(text.startswith(problems[host][0]) for host, text in unfit.items())
    return list(unfit)


FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a lost GPU": lambda node: node["gpus"].pop(),
    "less memory": lambda node: node.update(memory_bytes=2**30),
    "an unwritable folder": lambda node: node.update(write_error="Read-only file system"),
    "a folder that is not shared": lambda node: node.update(run_folder_seen_after_s=None),
    "a folder that keeps its writes": lambda node: node.update(own_file_seen_after_s=None),
    "another torch": lambda node: node["versions"].update(torch="2.12.0"),
    "another driver": lambda node: node["versions"].update(driver="570"),
    "a wrong clock": lambda node: node.update(clock_skew_s=3600.0),
    "an op that does not build": lambda node: node["ops"]["failed"].update(cpu_adam="omp.h"),
}


@pytest.mark.parametrize("change", FAULTS.values(), ids=FAULTS)
def test_node_with_a_problem_of_its_own_is_excluded(change: Callable[[dict[str, Any]], object]):
    assert excluded(nodes()) == []
    found = nodes()
    change(found[2])
    assert excluded(found) == ["n3"]


def test_bad_hardware_and_other_problems_add_up():
    found = nodes()
    found[1]["gpus"].pop()
    assert excluded(found, [failed("n4")]) == ["n2", "n4"]
    found[1] |= {"clock_skew_s": 3600.0, "write_error": "Read-only file system", "memory_bytes": 2**30}
    unfit = nodes_to_exclude(found, problems_by_node(found, [], JOB), JOB)
    assert unfit["n2"].count("; ") == 3 and unfit["n2"].endswith("; and 1 more problem")


def test_first_node_alone_is_named_and_excluded_if_its_own_clock_is_wrong():
    """Clocks are measured from the first node's, so all others seem to be wrong."""
    found = nodes()
    for node in found[1:]:
        node["clock_skew_s"] = -3600.0
    assert excluded(found) == ["n1"]
    (problem,) = node_problems(found, JOB)
    assert problem.startswith("n1: clock is +3600.0 s from the median of all nodes, checks.max_clock_skew_s is 5; let")


@pytest.mark.parametrize("change", [FAULTS["another torch"], FAULTS["a wrong clock"]], ids=["torch", "clock"])
def test_of_two_nodes_that_differ_none_is_excluded(change: Callable[[dict[str, Any]], object]):
    found = nodes(2)
    change(found[1])
    assert excluded(found) == []


@pytest.mark.parametrize("change", [FAULTS["less memory"], FAULTS["an unwritable folder"]], ids=["memory", "folder"])
def test_fault_of_all_nodes_excludes_none(change: Callable[[dict[str, Any]], object]):
    found = nodes()
    for node in found:
        change(node)
    assert excluded(found) == []


def test_problem_that_stays_without_the_bad_node_excludes_none(tmp_path: Path):
    """The network is missing on every node."""
    found = [{**node, "hardware": hardware(ports=[])} for node in nodes()]
    found[0]["gpus"].pop()
    assert excluded(found) == []


def test_each_node_gets_a_result_with_its_problems():
    found = nodes()
    found[0]["versions"] = {**found[0]["versions"], "torch": "2.12.0"}
    found[1]["clock_skew_s"] = -7.25
    found[2]["memory_bytes"] = 2**30
    found[2]["gpus"] = found[2]["gpus"][1:]
    rows: list[CheckRow] = [
        {**failed("n4"), "component": "GPU 3", "check": check, "value": "1"} for check in ("a", "b", "c", "d", "e")
    ]
    results = environment_results(problems_by_node(found, [*rows, {**failed("n4"), "result": "warn"}], JOB))
    assert {(row["check"], row["bandwidth_gbps"]) for row in results} == {("environment check", None)}
    assert {row["node"]: row["problem"] for row in results} == {
        "n1": "torch is 2.12.0, most nodes have 2.13.0+cu130",
        "n2": "clock is -7.2 s from the median of all nodes",
        "n3": "torch can use 7 GPUs, 8 are needed (driver: 590.1); the node has 1024 MiB of memory, the site file says "
        "node.memory_mb: 100000",
        "n4": "GPU 3: a: 1; GPU 3: b: 1; GPU 3: c: 1; and 2 more problems",
    }
    assert [row["problem"] for row in environment_results(problems_by_node(nodes(2), [], JOB))] == ["", ""]
