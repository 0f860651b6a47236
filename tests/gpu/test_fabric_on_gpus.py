"""The fabric check between this machine's GPUs over NCCL: every collective is timed, right, and agrees with NVLink's limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_speed import plan_stages
from bench.gpu_speed_rows import MODELS
from bench.machine import MODULE_PATH, describe_machine, write_result
from longhaul.artifacts.fabric_report import FabricReport
from longhaul.artifacts.paths import JobId
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.fabric_job import FabricSpec
from tests.gpu.runs_on_gpus import GPUS, describe_gpus, stages_of

LIMIT_S = 180


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_collectives_between_gpus_are_timed_and_right(tmp_path: Path):
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n')
    stage = {**stages_of({"base": {}})[0], "dataset": "corpus"}
    planned = plan_stages(tmp_path, MODELS["losses"], [stage], GPUS)
    job = job_spec(planned, JobId("fabric"))
    assert isinstance(job, FabricSpec) and (job.nodes, job.gpus_per_node) == (1, GPUS)
    out = tmp_path / "fabric.json"
    job.model_copy(update={"out": str(out), "folder": str(tmp_path)}).write(tmp_path / "job.json")
    command = [sys.executable, "-m", "longhaul", "job", "run", "fabric", str(tmp_path / "job.json")]
    sizes = {"WORLD_SIZE": GPUS, "LOCAL_WORLD_SIZE": GPUS, "GROUP_WORLD_SIZE": 1, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29_400}
    ranks = []
    for rank in range(GPUS):
        own = {name: str(value) for name, value in {**sizes, **address, "RANK": rank, "LOCAL_RANK": rank}.items()}
        with (tmp_path / f"log-{rank}.txt").open("w") as log:
            environment = {**os.environ, **MODULE_PATH, **own}
            ranks.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        codes = [rank.wait(LIMIT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * GPUS, (tmp_path / "log-0.txt").read_text()[-4000:]
    report = FabricReport.read(out)
    rows = report.results
    assert all(row["correct"] for row in rows)
    lines = [
        f"{row['collective']:>15} {row['scope']:>5} {row['bytes']:>12} bytes  bus {row['bus_bandwidth_gbps']:8.2f} GB/s  "
        f"{row['time_us']:10.1f} µs, 95th percentile {row['p95_us']:10.1f} µs, 99th {row.get('p99_us', 0.0):10.1f} µs"
        for row in rows
    ]
    write_result("gpu_fabric", ["command: make test-gpu", *describe_machine(("torch",))[1:], describe_gpus(), *lines])
    found = {row["collective"] for row in rows}
    assert found == {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"}
    assert max(row["bus_bandwidth_gbps"] for row in rows) > 10, "faster than any PCIe 3 link"
