"""Measures for scale.py the records of a run of many ranks, its failure reports, and what a look at the run costs."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.simulated_ranks import RANKS_PER_NODE
from longhaul.artifacts.job_state import State, rank_failures
from longhaul.artifacts.node_results import append_node_results, new_node_result
from longhaul.artifacts.paths import JobFolder, JobId, WeightsFolder
from longhaul.runtime.failure_reports import write_failure_report
from longhaul.runtime.process_rank import Rank
from longhaul.train.monitoring.events import EventWriter
from longhaul.train.monitoring.metrics import Metrics
from tests.support.run_folder import TRAIN, RunFolder
from tests.support.small_configs import base_stage

_STEPS, _LOOKS = 100, 5
_STEP_VALUES = {"tokens": 1000, "attention_pairs": 1000, "data_wait_s": 0.1, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-3}


def measure_records(folder: Path, ranks: int) -> dict[str, float]:
    """Return what the records of a training on so many ranks take, and what the main process takes to read them."""
    hosts = [f"node{rank // RANKS_PER_NODE:04d}" for rank in range(ranks)]
    nodes = list(dict.fromkeys(hosts))
    run = RunFolder(folder)
    weights, job = run.weights(), run.paths.job(TRAIN)
    weights.attempts.unlink()
    trainer_s = _write_metrics(folder / "job", weights, hosts)
    results = [new_node_result(node, "pair tournament", 20.0, "") for node in nodes]
    began_s = time.process_time()
    append_node_results(job, results)
    results_s = time.process_time() - began_s
    for name in (TRAIN, JobId("environment")):
        State("running", "7", nodes[0], nodes, 1, "2026-11-28T10:00:00+00:00", "").write(run.paths.job(name).state)
    return {
        "records: bytes of attempts.jsonl per attempt": weights.attempts.stat().st_size,
        "records: bytes of metrics.jsonl per step": weights.metrics.stat().st_size / _STEPS,
        "records: CPU s of rank 0 for an attempt and 100 steps": trainer_s,
        "records: bytes of node_results.jsonl per check": job.node_results.stat().st_size,
        "records: CPU s of rank 0 for node_results.jsonl": results_s,
        "main process: CPU s of a look at the run": _look_s(run),
    }


def _write_metrics(folder: Path, weights: WeightsFolder, hosts: list[str]) -> float:
    """Write the lines of an attempt and its steps as rank 0 does. Return its CPU time."""
    job = base_stage(folder)
    context: Any = SimpleNamespace(
        gather=lambda _: hosts,
        rank=Rank(0, len(hosts), 0, 1, hosts[0]),
        is_main=True,
        device=torch.device("cpu"),
        threads=1,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        began_s = time.process_time()
        metrics = Metrics(job, weights.path, 0, context, job.model, EventWriter(weights.path), {})
        for step in range(1, _STEPS + 1):
            metrics.step(step, 1.0, _STEP_VALUES)
        metrics.close()
    return time.process_time() - began_s


def _look_s(run: RunFolder) -> float:
    """Return the CPU time of reading the status, as the display and `longhaul status` do again and again."""
    times_s = []
    for _ in range(_LOOKS):
        began_s = time.process_time()
        run.status()
        times_s.append(time.process_time() - began_s)
    return statistics.median(times_s)


def measure_failed_rank(folder: Path, ranks: int) -> dict[str, float]:
    """Let every rank report a failure, as the failure of one is followed by those of all; one rank has the cause."""
    failed = ranks // 2
    JobFolder(folder).rank_failures.mkdir(parents=True)
    for rank in range(ranks):
        error = MemoryError("Cannot allocate memory") if rank == failed else RuntimeError("connection closed by peer")
        write_failure_report(folder, error, Rank(rank, ranks, 0, 1, f"node{rank // RANKS_PER_NODE:04d}"))
    began_s = time.perf_counter()
    first = rank_failures(folder)[0]
    seconds = time.perf_counter() - began_s
    if first.rank != failed:
        raise SystemExit(f"rank {failed} has failed, and rank {first.rank} was named")
    return {"failed rank: s to name it among the reports of all ranks": seconds}
