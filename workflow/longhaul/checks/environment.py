"""Runs the environment check, one process per node, and writes its report; node_facts.py measures, node_problems.py and
hardware_checks.py decide.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from longhaul.artifacts.artifact_schemas import EnvironmentReport
from longhaul.artifacts.node_check_row import CheckRow
from longhaul.artifacts.node_results import append_node_results
from longhaul.artifacts.paths import JobFolder
from longhaul.checks.build_check_rows import print_checks, problem_lines, warning_lines
from longhaul.checks.connection_checks import connection_rows, failed_pairs, nodes_without_connections
from longhaul.checks.core_speed import is_judged, measure_all_nodes
from longhaul.checks.hardware_checks import SHARED_FOLDER_WAIT_S, hardware_rows
from longhaul.checks.hung_steps import GPUS, HUNG_STEP, RUN_FOLDER, SCRATCH, hangs
from longhaul.checks.judge_measurements import EXACT_RESULTS
from longhaul.checks.node_connections import Connections, connect_to_others
from longhaul.checks.node_facts import node_facts, node_parts, scratch_parts
from longhaul.checks.node_problems import GB, node_problems, node_warnings
from longhaul.checks.nodes_to_exclude import (
    environment_results,
    first_problems,
    nodes_to_exclude,
    problems_by_node,
)
from longhaul.checks.run_parts_in_child import run_parts
from longhaul.config.shipped_files import CONSTRAINTS
from longhaul.errors import UserError
from longhaul.jobs.kinds.environment_job import EnvironmentSpec
from longhaul.runtime.call_with_deadline import call_within
from longhaul.runtime.process_rank import Rank, exit_without_cleanup, export_rank, require_planned_size, this_rank
from longhaul.runtime.rendezvous import RENDEZVOUS_TIMEOUT_S, meet, process_group

# Compiling ops takes minutes on a node that has none yet. The other nodes wait.
_TIMEOUT_S = 900.0
_LATEST_S = RENDEZVOUS_TIMEOUT_S + GPUS.limit_s + RUN_FOLDER.limit_s + SCRATCH.limit_s
"""A node that waits for its own hung steps comes later than the others."""
_CLOCK_ROUNDS = 5
_SHARED_FOLDER_POLL_S = 0.1


def run(job: EnvironmentSpec) -> None:
    """Check the nodes and write job.out, or `<out>.failed.json` beside it when there is a problem.

    Raises:
        BadNodesError: some nodes have problems, and the others have none.
        UserError:     there is another problem; the first node raises it and lists all problems.
    """
    rank = this_rank()
    require_planned_size(rank, job.nodes, job.nodes)
    import torch  # noqa: F401  # before the child starts, so that it is imported once

    results, hung = run_parts([*node_parts(job), *scratch_parts(job)])
    for one in hung:  # here, as the report needs the other nodes
        print(f"{rank.node_name}: {one.step.text}: {one.reason}", flush=True)
    facts = node_facts(rank.node_name, job, results, hung)
    export_rank(rank)
    store = meet(rank, _LATEST_S)
    is_connected, found = connect_to_others(store, rank) if rank.world_size > 1 else (True, [])
    if not is_connected:  # gloo would wait for them
        if rank.is_main:
            _write_in_time(rank, job, lambda: _refuse_connections(found, job))
        return
    with process_group(rank, "gloo", _TIMEOUT_S, store=store):
        facts |= {"clock_skew_s": _clock_skew_s(rank)}
        if not any(_gather(hangs(facts, RUN_FOLDER), rank)):
            facts |= _shared_folder_times(rank, Path(job.folder))
        if is_judged(job.nodes, owns_cores=job.build != "cpu"):
            facts |= {"core_speed": measure_all_nodes(lambda own: _gather(own, rank))[rank.rank]}
        nodes = _gather(facts, rank)
    if rank.is_main:
        _write_in_time(rank, job, lambda: _judge(nodes, job, connection_rows(found)))


def _write_in_time(rank: Rank, job: EnvironmentSpec, write: Callable[[], None]) -> None:
    """Call a function that prints and then writes to the run folder. Where that hangs, end this process.

    Nothing that follows could write into the job's folder, either.
    """
    try:
        call_within(RUN_FOLDER.limit_s, write)
    except TimeoutError as error:
        print(f"{rank.host}: writing {job.out}: {error}; {RUN_FOLDER.remedy}", file=sys.stderr, flush=True)
        exit_without_cleanup(UserError.exit_code)


def _refuse_connections(found: Sequence[Connections], job: EnvironmentSpec) -> None:
    """Print and write what was found about each node, and raise the error of write_or_raise. found: by rank"""
    rows = connection_rows(found)
    print_checks(rows)
    problems = {row["node"]: list[str]() for row in rows}
    for row in rows:
        problems[row["node"]] += [f"{row['check']}: {row['value']}"] if row["result"] == "fail" else []
    append_node_results(JobFolder(Path(job.job_folder)), environment_results(problems))
    bad = nodes_without_connections(found)
    pairs = (
        ""
        if bad
        else f" ({failed_pairs(found)}), and no node is excluded, as the fault may be in the network between them"
    )
    EnvironmentReport(problem_lines(rows), [], warning_lines(rows), list(rows)).write_or_raise(
        Path(job.out),
        f"nodes do not reach each other{pairs}; nothing else was compared",
        "correct these problems, or exclude the nodes",
        {node: first_problems(problems[node]) for node in bad},
    )


def _judge(nodes: list[dict[str, Any]], job: EnvironmentSpec, connections: Sequence[CheckRow] = ()) -> None:
    """Print and write the report, and what it says about each node; raise the error of write_or_raise if there is a problem.

    connections: rows about the connections between nodes
    """
    rows, problems = [*connections, *hardware_rows(nodes, job)], node_problems(nodes, job)
    if job.checks.bad_hardware == "warn":
        rows = [_tolerated(row) for row in rows]
    warnings = node_warnings(nodes, tested_versions()) + warning_lines(rows)
    report = EnvironmentReport(problems + problem_lines(rows), nodes, warnings, rows)  # type: ignore[arg-type]
    _print_nodes(report)
    print_checks(rows)
    problems_of_nodes = problems_by_node(nodes, rows, job)
    append_node_results(JobFolder(Path(job.job_folder)), environment_results(problems_of_nodes))
    report.write_or_raise(
        Path(job.out),
        "the nodes are not ready for training",
        "correct these problems, or exclude the nodes",
        nodes_to_exclude(nodes, problems_of_nodes, job),
    )


def _tolerated(row: CheckRow) -> CheckRow:
    """Return a failed row as a warning, but not that of a wrong result or of a step that hangs, as a training would."""
    is_usable = row["check"] not in (*EXACT_RESULTS, HUNG_STEP)
    return {**row, "result": "warn"} if row["result"] == "fail" and is_usable else row


def tested_versions() -> dict[str, str]:
    """Return package -> the version that longhaul is tested with."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line)


def _gather(value: Any, rank: Rank) -> list[Any]:
    """Return the values of all nodes in the order of their ranks."""
    import torch.distributed as dist

    values: list[Any] = [None] * rank.world_size
    dist.all_gather_object(values, value)
    return values


def _clock_skew_s(rank: Rank) -> float:
    """Return this node's clock minus the first node's, in seconds: the smallest difference after a barrier in several rounds."""
    import torch.distributed as dist

    differences = []
    for _ in range(_CLOCK_ROUNDS):
        dist.barrier()
        now = time.time()
        differences.append(now - _gather(now, rank)[0])
    return round(min(differences, key=abs), 3)


def _shared_folder_times(rank: Rank, folder: Path) -> dict[str, float | None]:
    """Return after how many seconds nodes see each other's files in the run folder; None: not at all.

    run_folder_seen_after_s: this node sees a file of the first node
    own_file_seen_after_s:   the first node sees a file of this node
    """
    import torch.distributed as dist

    prefix = f".shared-test-{_gather(uuid.uuid4().hex, rank)[0]}"
    files = [folder / f"{prefix}-{number}" for number in range(rank.world_size)]
    # The write test reports an OSError. A folder that hangs only now sees no files, and its row says so.
    with suppress(OSError):
        call_within(RUN_FOLDER.limit_s, files[rank.rank].touch)
    dist.barrier()
    looked_for = files if rank.is_main else files[:1]
    seen: list[float | None] = [None] * len(looked_for)
    with suppress(TimeoutError):
        seen = call_within(SHARED_FOLDER_WAIT_S + RUN_FOLDER.limit_s, lambda: _seen_after_s(looked_for))
    by_first = _gather(seen, rank)[0]
    with suppress(OSError):  # a read-only file system refuses it also for a file that is not there
        call_within(RUN_FOLDER.limit_s, files[rank.rank].unlink)
    return {"run_folder_seen_after_s": seen[0], "own_file_seen_after_s": by_first[rank.rank]}


def _seen_after_s(files: Sequence[Path]) -> list[float | None]:
    """Wait until all files are visible, at most SHARED_FOLDER_WAIT_S. Return the seconds until each was; None: it never was."""
    started = time.monotonic()
    seen: dict[Path, float] = {}
    while True:
        now_s = round(time.monotonic() - started, 3)
        seen |= {path: now_s for path in files if path not in seen and path.exists()}
        if len(seen) == len(files) or now_s >= SHARED_FOLDER_WAIT_S:
            return [seen.get(path) for path in files]
        time.sleep(_SHARED_FOLDER_POLL_S)


def _print_nodes(report: EnvironmentReport) -> None:
    table = Table(title="Nodes", title_justify="left")
    columns = ["node", "python", "torch", "deepspeed", "build", "GPUs", "cores", "memory GiB", "free GB", "clock s"]
    for column in columns:
        table.add_column(column)
    for node in report.nodes:
        versions = node["versions"]
        free = node["disk_free_bytes"]
        table.add_row(
            node["host"],
            *(str(versions.get(name)) for name in ("python", "torch", "deepspeed", "build")),
            str(len(node["gpus"])),
            str(node["cpus"]),
            f"{node['memory_bytes'] / 2**30:.0f}",
            "?" if free is None else f"{free / GB:.0f}",
            f"{node['clock_skew_s']:+.2f}",
        )
    console = Console(width=120)
    console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}", markup=False)
