"""Whoever follows the remedy of a problem of nodes has no problem left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longhaul.checks.node_problems import node_problems
from longhaul.config.run_config import Checks
from tests.support.healthy_node_facts import hardware, two_gpu_nodes
from tests.unit.checks.test_environment import BAD, Change, job

SWAPPING = {"prebuild_ops": ("cpu_adam",), "swap_bytes": 2_500_000_000, "locked_bytes": 10**8}


def nothing(_node: dict[str, Any]) -> None:
    """Leave the nodes as they are: the job changes, or the bad node is excluded."""


def _versions(**values: str) -> Change:
    return lambda node: node["versions"].update(values)


def _both_with_7_gpus(node: dict[str, Any]) -> None:
    del node["gpus"][7:]


# problem -> its remedies: a part of the text, a change of every node, changes of the job; EXCLUDED: without the bad node
EXCLUDED: dict[str, Any] = {"nodes": 1}
REMEDIES: dict[str, list[tuple[str, Change, dict[str, Any]]]] = {
    "another torch": [("give all nodes one environment", _versions(torch="2.13.0+cu130"), {})],
    "another driver": [("install one driver", _versions(driver="590.1"), {})],
    "a build without CUDA": [
        ("install torch for cuda 13.0", _versions(build="cuda 13.0"), {}),
        ("correct accelerator", _versions(build="cpu"), {"build": "cpu"}),
    ],
    "no DeepSpeed": [("pip install 'longhaul[job]'", _versions(deepspeed="0.19.8"), {})],
    "a lost GPU": [
        ("exclude the node", nothing, EXCLUDED),
        ("lower gpus_per_node", _both_with_7_gpus, {"gpus_per_node": 7}),
    ],
    "less memory than in the site file": [
        ("exclude the node", nothing, EXCLUDED),
        ("correct node.memory_mb", nothing, {"memory_mb": 99}),
    ],
    "no InfiniBand": [
        ("exclude the node", nothing, EXCLUDED),
        ("correct interconnect.kind", nothing, {"interconnect": "ethernet"}),
    ],
    "a port that is down": [
        ("exclude the node with fewer ports", nothing, EXCLUDED),
        ("let the admins repair it", lambda node: node.update(hardware=hardware()), {}),
    ],
    "a full disk": [
        ("free space", lambda node: node.update(disk_free_bytes=10**9), {}),
        ("lower the limit", nothing, {"checks": Checks(min_disk_free_gb=0.0001)}),
    ],
    "an unwritable folder": [("let this user write there", lambda node: node.update(write_error=None), {})],
    "a folder that is not shared": [("mount it", lambda node: node.update(run_folder_seen_after_s=0.1), {})],
    "a folder that keeps its writes": [
        ("mount the same folder on all nodes", lambda node: node.update(own_file_seen_after_s=0.1), {})
    ],
    "a wrong clock": [
        ("synchronise the clocks", lambda node: node.update(clock_skew_s=0.0), {}),
        ("raise the limit", nothing, {"checks": Checks(min_disk_free_gb=0.001, max_clock_skew_s=8)}),
    ],
    "no compiler": [("install g++", lambda node: node.update(compiler="g++ 12"), {})],
    "no libaio": [("it needs libaio", lambda node: node["ops"]["failed"].clear(), {})],
    "too small a disk for optimizer states": [
        ("free space", lambda node: node["swap"].update(free_bytes=3 * 10**9), {}),
        ("offload to cpu", lambda node: node.pop("swap"), {"swap_bytes": 0, "locked_bytes": 0}),
    ],
    "a scratch folder in memory": [("choose a folder on a disk", lambda node: node["swap"].update(error=None), {})],
    "a low limit of locked memory": [
        ("let the admins raise the limit", lambda node: node["swap"].update(lockable_bytes=10**9), {})
    ],
}
FOLLOWED = [(problem, *remedy) for problem, remedies in REMEDIES.items() for remedy in remedies]


@pytest.mark.parametrize(
    ("problem", "says", "repair", "changes"), FOLLOWED, ids=[f"{problem}: {says}" for problem, says, *_ in FOLLOWED]
)
def test_after_the_remedy_no_problem_is_left(
    tmp_path: Path, problem: str, says: str, repair: Callable[[dict[str, Any]], object], changes: dict[str, Any]
):
    nodes, settings = two_gpu_nodes(), {"build": "cuda 13.0", **SWAPPING}
    BAD[problem][0](nodes[1])
    assert says in "\n".join(node_problems(nodes, job(tmp_path, **settings)))
    for node in nodes:
        repair(node)
    left = nodes[:1] if changes is EXCLUDED else nodes
    assert node_problems(left, job(tmp_path, **{**settings, **changes})) == []


def test_every_problem_names_a_remedy_that_is_followed():
    """DeepSpeed's own message says why an op does not build."""
    assert {*BAD} - {*REMEDIES} == {"an op that does not build"}
