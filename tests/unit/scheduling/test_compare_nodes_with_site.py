"""Nodes are compared with the site file: each difference is named with the key to correct."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longhaul.config.site_config import Site
from longhaul.scheduling.compare_nodes_with_site import compare_nodes, print_comparisons, probe_requests
from longhaul.scheduling.probe_nodes import FoundNode, ProbeAnswer
from tests.support.small_configs import SITE, plan_of

NODE = FoundNode(
    host="n1",
    cpus=64,
    memory_mib=515_000,
    gpu_names=("NVIDIA H100 80GB HBM3",) * 8,
    gpu_memory_mib=(81_559,) * 8,
    toolkit="cuda",
    version="13.0",
    interfaces=("lo", "eth0", "ib0", "ib1"),
    rdma_ports=("InfiniBand", "InfiniBand"),
)
NO_GPUS: dict[str, Any] = {"gpu_names": (), "gpu_memory_mib": (), "toolkit": None, "version": None}
CPU = {"jobs": ["cpu"], "name": "cores", "max_minutes": 60, "node": {"cpus": 8, "memory_mb": 8000}}
LOGIN = {**CPU, "jobs": ["login"], "name": "long", "node": {"cpus": 4, "memory_mb": 8000}}


def site_of(folder: Path, changes: dict[str, Any] | None = None) -> Site:
    fast = {"kind": "infiniband", "socket_interface": "ib0"}
    return plan_of(folder, None, {"partitions.0.node.gpu_memory_gib": 80, "interconnect": fast, **(changes or {})}).site


def problems(site: Site, node: FoundNode) -> dict[str, str]:
    lines = compare_nodes(site, {"gpu": ProbeAnswer(node)})
    return {line.subject: line.problem for line in lines if line.problem}


def test_node_that_fits_has_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = compare_nodes(site_of(tmp_path), {"gpu": ProbeAnswer(NODE)})
    assert [line.subject for line in lines] == [
        "cpus",
        "memory, MiB",
        "GPUs",
        "memory of a GPU, GiB",
        "driver",
        "network interfaces",
        "active RDMA ports",
    ]
    assert not any(line.problem for line in lines)
    print_comparisons("What the nodes have", lines)
    printed = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3" in printed and "NO" not in printed


@pytest.mark.parametrize(
    ("changes", "subject", "remedy"),
    [
        ({"cpus": 32}, "cpus", "set node.cpus to at most 32"),
        ({"memory_mib": 400_000}, "memory, MiB", "set node.memory_mb to at most 400000"),
        ({"gpu_names": NODE.gpu_names[:4]}, "GPUs", "set node.gpus to 4"),
        (NO_GPUS, "GPUs", "if these nodes have no GPUs, remove node.gpus, and set accelerator to cpu"),
        ({"gpu_memory_mib": (40_960,) * 8}, "memory of a GPU, GiB", "set node.gpu_memory_gib to 40"),
        ({"version": "12.8"}, "driver", "the driver supports CUDA 12.8"),
        ({"toolkit": "rocm", "version": "6.4"}, "driver", "the build cuda 13.0 does not fit these GPUs"),
        ({"interfaces": ("lo", "hsn0")}, "network interfaces", "there is no ib0"),
        ({"rdma_ports": ("Ethernet",)}, "active RDMA ports", "correct interconnect.kind"),
    ],
)
def test_each_difference_names_the_key(tmp_path: Path, changes: dict[str, Any], subject: str, remedy: str):
    found = problems(site_of(tmp_path), replace(NODE, **changes))
    assert list(found) == [subject] and remedy in found[subject]


def test_newer_driver_of_the_same_cuda_version_fits(tmp_path: Path):
    assert problems(site_of(tmp_path, {"accelerator": {"cuda": "13.2"}}), NODE) == {}


def test_job_without_a_result_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = compare_nodes(site_of(tmp_path), {"gpu": ProbeAnswer(None, "refused: [poor] account", "correct account")})
    print_comparisons("What the nodes have", lines)
    printed = capsys.readouterr().out
    assert "refused: [poor] account" in printed and "gpu, probe job: correct account" in printed


def test_one_job_per_partition_asks_for_a_node_as_the_site_file_describes_it(tmp_path: Path):
    gpu = {**SITE["partitions"][0], "jobs": ["debug", "gpu"]}
    requests = probe_requests(plan_of(tmp_path, None, {"partitions": [gpu, CPU, LOGIN]}).site)
    shapes = {kind: (r.nodes, r.tasks, r.gpus_per_node, r.cpus_per_task, r.minutes) for kind, r in requests.items()}
    assert shapes == {"gpu": (1, 1, 8, 64, 2), "cpu": (1, 1, 0, 8, 2), "login": (1, 1, 0, 4, 2)}


def test_partition_of_the_controller_needs_no_fast_network(tmp_path: Path):
    site = site_of(tmp_path, {"partitions": [SITE["partitions"][0], LOGIN]})
    front = replace(NODE, cpus=2, interfaces=("lo", "eth0"), rdma_ports=(), **NO_GPUS)
    lines = compare_nodes(site, {"login": ProbeAnswer(front)})
    assert {line.subject: line.problem for line in lines} == {"cpus": "set node.cpus to at most 2", "memory, MiB": ""}
