"""Appends and reads node_results.jsonl: what each check of a job found about each node, over the time of all runs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from typing_extensions import TypedDict

from longhaul.artifacts.line_record_fields import Time
from longhaul.artifacts.line_records import append_record, read_records
from longhaul.artifacts.paths import JobFolder, RunPaths
from longhaul.artifacts.typed_json import HostName


class NodeResult(TypedDict):
    """Result of one check for one node.

    time_s:         when, in seconds since the epoch
    check:          name of the check, such as "pair tournament"
    bandwidth_gbps: median of the node's pairs in GB/s
    problem:        empty if the node is fit
    """

    time_s: Time
    node: HostName
    check: str
    bandwidth_gbps: float | None
    problem: str


def append_node_results(job: JobFolder, rows: Iterable[NodeResult]) -> None:
    """Append rows to a job's file. Its own allocation alone writes there."""
    for row in rows:
        append_record(job.node_results, row)


def new_node_result(node: str, check: str, bandwidth_gbps: float | None, problem: str) -> NodeResult:
    """Return a result of now."""
    return NodeResult(
        time_s=round(time.time(), 3), node=node, check=check, bandwidth_gbps=bandwidth_gbps, problem=problem
    )


def read_node_results(results: Path) -> list[NodeResult]:
    """Return the results of all jobs of all runs below a results folder, the oldest first.

    Raises:
        UserError: a file cannot be read.
    """
    runs = (RunPaths(folder.name, results) for folder in sorted(results.glob("*/")))
    jobs = (job for run in runs for job in run.job_folders())
    found = [row for job in jobs for row in read_records(job.node_results, NodeResult)]
    return sorted(found, key=lambda row: row["time_s"])
