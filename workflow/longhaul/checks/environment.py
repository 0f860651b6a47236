"""Checks the nodes of an allocation, one process each: what they hold, and whether they agree."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from longhaul.artifacts.schemas import EnvironmentReport
from longhaul.checks import node_problems as judge
from longhaul.checks.node_facts import build_ops, node_facts, swap_facts
from longhaul.config.package_data import data_root
from longhaul.jobs.specs import EnvironmentSpec
from longhaul.runtime.rank import Rank, require_geometry, this_rank
from longhaul.runtime.rendezvous import process_group

# Ops compile for minutes on a node that has none yet, while the others wait.
_TIMEOUT_S = 900.0
_CLOCK_ROUNDS = 5
# NFS clients may hide a new file for the time of their directory cache.
_SHARED_FOLDER_WAIT_S = 10.0
CONSTRAINTS = data_root() / "envs" / "constraints.txt"


def run(job: EnvironmentSpec) -> None:
    """Checks the nodes and writes job.out, or, when something is wrong, `<out>.failed.json` beside it.

    Raises:
        UserError: on the first node, with every problem found.
    """
    rank = this_rank()
    require_geometry(rank, job.nodes, job.nodes)
    facts = node_facts(rank.host, Path(job.folder)) | {"ops": build_ops(job.prebuild_ops, job.scratch)}
    if job.swap_bytes and job.scratch:
        facts |= {"swap": swap_facts(job.scratch)}
    with process_group(rank, "gloo", _TIMEOUT_S):
        facts |= {"clock_skew_s": _clock_skew_s(rank), "sees_run_folder": _sees_run_folder(rank, Path(job.folder))}
        nodes = _gather(facts, rank)
    if rank.is_main:
        report = EnvironmentReport(judge.problems(nodes, job), nodes, judge.warnings(nodes, tested_versions()))
        _print(report)
        report.conclude(Path(job.out), "the nodes are not ready", "mend them, or leave the nodes out")


def tested_versions() -> dict[str, str]:
    """Package -> the version longhaul is tested with."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line)


def _gather(value: Any, rank: Rank) -> list[Any]:
    import torch.distributed as dist

    values: list[Any] = [None] * rank.world_size
    dist.all_gather_object(values, value)
    return values


def _clock_skew_s(rank: Rank) -> float:
    """This node's clock minus the first node's: the smallest difference right after a barrier, over a few rounds."""
    import torch.distributed as dist

    differences = []
    for _ in range(_CLOCK_ROUNDS):
        dist.barrier()
        now = time.time()
        differences.append(now - _gather(now, rank)[0])
    return round(min(differences, key=abs), 3)


def _sees_run_folder(rank: Rank, folder: Path) -> bool:
    """Whether a file that the first node writes to the run folder is there on this node."""
    import torch.distributed as dist

    probe = folder / f".shared-test-{_gather(uuid.uuid4().hex, rank)[0]}"
    if rank.is_main:
        with suppress(OSError):  # its write test has said so
            probe.touch()
    dist.barrier()
    deadline = time.monotonic() + _SHARED_FOLDER_WAIT_S
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    dist.barrier()
    if rank.is_main:
        probe.unlink(missing_ok=True)
    return seen


def _print(report: EnvironmentReport) -> None:
    table = Table(title="Nodes", title_justify="left")
    columns = ["node", "python", "torch", "deepspeed", "build", "GPUs", "cores", "memory GiB", "free GB", "clock s"]
    for column in columns:
        table.add_column(column)
    for node in report.nodes:
        versions = node["versions"]
        free = node["disk_free_bytes"]
        table.add_row(
            node["host"],
            *(str(versions[name]) for name in ("python", "torch", "deepspeed", "cuda_build")),
            str(len(node["gpus"])),
            str(node["cpus"]),
            f"{node['memory_bytes'] / 2**30:.0f}",
            "?" if free is None else f"{free / judge.GB:.0f}",
            f"{node['clock_skew_s']:+.2f}",
        )
    console = Console(width=120)
    console.print(table)
    for text in report.warnings:
        console.print(f"warning: {text}", markup=False)
