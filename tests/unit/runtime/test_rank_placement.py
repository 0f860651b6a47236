"""The GPU and the cores of a rank: right values for nodes whose topology is known, and shares of all cores where it is not."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longhaul.artifacts.paths import JobId
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.runtime import rank_placement
from longhaul.runtime.process_rank import Rank
from longhaul.runtime.rank_placement import bind_to_gpu_cores, computes_on_gpus, gpu_index, part_of
from longhaul.train import distributed_context
from tests.support.small_configs import plan_of


def rank(local_rank: int) -> Rank:
    return Rank(local_rank, 4, local_rank, 1, "n1")


@pytest.mark.parametrize(("visible", "expected"), [(4, [0, 1, 2, 3]), (2, [0, 1, 0, 1]), (1, [0, 0, 0, 0])])
def test_gpu_of_a_rank_follows_from_the_gpus_that_its_process_sees(
    visible: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert [gpu_index(rank(local_rank)) for local_rank in range(4)] == expected


def test_ranks_divide_cores_evenly_and_get_none_where_there_are_too_few():
    cores = [[cpu] for cpu in range(8)]
    assert [part_of(cores, [0, 1, 2], number) for number in range(3)] == [[[0], [1]], [[2], [3]], [[4], [5]]]
    assert part_of(cores[4:], [2, 3], 3) == [[6], [7]]
    assert part_of([[1, 9]], [0, 1], 1) == []


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node of 8 cores with four GPUs. Core n has the CPUs n and n + 8.

    GPUs 0 and 1 are on NUMA node 1, the others on NUMA node 0; CPU 0 does not belong to the job.
    """
    for cpu in range(16):
        folder = tmp_path / "cpus" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    for bus, numa_node in ((0x0A, 1), (0x0B, 1), (0x8A, 0), (0x8B, 0)):
        folder = tmp_path / "devices" / f"0000:{bus:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{numa_node}\n")
    for numa_node, cores in ((0, "0-3,8-11"), (1, "4-7,12-15")):
        folder = tmp_path / "nodes" / f"node{numa_node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cores}\n")
    gpus = [SimpleNamespace(pci_domain_id=0, pci_bus_id=bus, pci_device_id=0) for bus in (0x0A, 0x0B, 0x8A, 0x8B)]
    monkeypatch.setattr(rank_placement, "CPUS", tmp_path / "cpus")
    monkeypatch.setattr(rank_placement, "PCI_DEVICES", tmp_path / "devices")
    monkeypatch.setattr(rank_placement, "NUMA_NODES", tmp_path / "nodes")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(1, 16)))
    return tmp_path


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    calls: list[list[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: calls.append(cores))
    return calls


def parts() -> list[list[int]]:
    """Return the CPUs to which each rank of the node binds itself."""
    return [bind_to_gpu_cores(4, local_rank) for local_rank in range(4)]


def test_ranks_get_their_part_of_the_cores_next_to_their_gpu(node: Path, bound: list[list[int]]):
    """Both hardware threads of a core go to the same rank. Of core 0, the job has only CPU 8."""
    found = parts()
    assert found == [[4, 5, 12, 13], [6, 7, 14, 15], [1, 8, 9], [2, 3, 10, 11]]
    assert bound == found


def test_cores_have_one_cpu_where_the_kernel_names_no_siblings(node: Path, bound: list[list[int]]):
    for path in node.glob("cpus/*/topology/thread_siblings_list"):
        path.unlink()
    assert parts() == [[4, 5, 6, 7], [12, 13, 14, 15], [1, 2, 3], [8, 9, 10]]


def test_ranks_divide_all_cores_where_the_kernel_knows_no_numa_node(node: Path, bound: list[list[int]]):
    for path in node.glob("devices/*/numa_node"):
        path.write_text("-1\n")
    assert parts() == [[1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
    for path in node.glob("devices/*/numa_node"):
        path.unlink()
    assert parts()[3] == [6, 7, 14, 15]


def test_ranks_divide_all_cores_where_the_job_has_none_next_to_one_gpu(
    node: Path, bound: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """No two ranks share a core: those with cores near their GPU divide with the others."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 8, 9, 10, 11})
    assert parts() == [[0, 8], [1, 9], [2, 10], [3, 11]]


def test_nothing_is_bound_where_ranks_outnumber_the_cores(
    node: Path, bound: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 6, 7, 13})
    assert parts() == [[], [], [], []] and bound == []


@pytest.mark.parametrize(
    ("cpu_bind", "expected", "printed"),
    [("auto", [[1, 8, 9]], "rank 2: bound to the CPUs [1, 8, 9]\n"), ("none", [], "")],
)
def test_ranks_of_a_training_bind_themselves_where_the_site_file_says_auto(
    node: Path,
    bound: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cpu_bind: str,
    expected: list[list[int]],
    printed: str,
):
    plan = plan_of(node / "planned", {"stages.0.gpus_per_node": 4}, {"partitions.0.cpu_bind": cpu_bind})
    job = job_spec(plan, JobId("train", ("base",)))
    assert isinstance(job, TrainSpec)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    monkeypatch.setattr(distributed_context, "this_rank", lambda: rank(2))
    monkeypatch.setattr(distributed_context, "use_ops_folder", lambda scratch: None)
    monkeypatch.setattr(distributed_context, "process_group", lambda *arguments: nullcontext())
    monkeypatch.setattr(distributed_context, "_initialize_deepspeed", lambda on_gpu: None)
    with distributed_context.distributed_context(job):
        assert bound == expected
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("has_gpu", "accelerator", "expected"),
    [(True, None, True), (True, "cuda", True), (True, "cpu", False), (False, None, False)],
)
def test_a_job_computes_on_gpus_that_the_site_file_has(
    has_gpu: bool, accelerator: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if accelerator:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    assert computes_on_gpus() is expected
