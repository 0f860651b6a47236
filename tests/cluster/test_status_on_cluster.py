"""`longhaul status` and `longhaul doctor` on the login node, while a stage waits, trains, has failed and is done."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fault_matrix import occupy, release_nodes, scancel
from tests.faults.faulted_run import QUICK_STEPS, FaultedRun, faulted_config
from tests.support.pipeline_run import PipelineRun
from tests.support.virtual_cluster import VirtualCluster
from tests.support.wait import wait_for


def ask(run: FaultedRun, *words: str) -> str:
    command = run.cluster.command([sys.executable, "-m", "longhaul", *words, str(run.results)], cwd=run.folder)
    done = subprocess.run(command, env=run.environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stage_of(run: FaultedRun) -> dict[str, Any]:
    return json.loads(ask(run, "status", "--json"))["stages"][0]


def finished_with_code(run: FaultedRun, code: int) -> None:
    found = run.finish()
    assert found == code, run.output()[-6000:]


@pytest.fixture
def run(
    cluster: VirtualCluster, finished: PipelineRun, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FaultedRun]:
    """A run that is rendered for the cluster. Its end leaves no job and no process, also after a failed test."""
    config = faulted_config(finished.config, steps=QUICK_STEPS)
    run = FaultedRun(tmp_path_factory.mktemp("status") / "run", config, cluster, finished.results)
    rendered = run.snakemake("results/tiny/plan.json")  # the finished run was a local one
    assert rendered.returncode == 0, rendered.stderr
    yield run
    release_nodes(run)
    if run.main and run.main.poll() is None:
        run.snakemake_process().terminate()  # it cancels its jobs
        run.finish()


@pytest.mark.timeout(300)
def test_every_state_of_a_stage_is_shown(run: FaultedRun):
    occupy(run)
    run.start()
    run.wait_until(lambda: bool(run.queued_jobs()))
    wait_for(lambda: "expected start 20" in stage_of(run)["job"]["detail"], 60)
    pending = stage_of(run)
    assert pending["job"]["state"] == "queued" and pending["progress"] is None
    assert pending["job"]["detail"].startswith("waits: ") and pending["job"]["slurm_job_id"] in run.queued_jobs()
    doctor = ask(run, "doctor")
    assert "train-base: the job waits in Slurm's queue: " in doctor and "evidence: squeue, job " in doctor, doctor
    release_nodes(run)
    run.wait_until(lambda: run.step() > 30)
    training = stage_of(run)
    assert training["job"]["state"] == "running" and "n1, n2" in training["job"]["detail"]
    assert 30 < training["progress"]["step"] < QUICK_STEPS and training["progress"]["seconds_left"] > 0
    assert "No problem found: run tiny is running" in ask(run, "doctor")
    scancel(run)
    finished_with_code(run, 1)
    failed = stage_of(run)
    assert failed["job"]["state"] == "failed" and failed["job"]["detail"] == "cancelled by scancel"
    assert failed["job"]["remedy"] in ask(run, "status") and "remedy: run the same command" in ask(run, "doctor")
    terminal = (run.folder / "main.log").read_text()
    assert terminal.count("Run tiny: failed (") == terminal.count(failed["job"]["detail"]) == 1, terminal
    assert terminal.count(f"remedy: {failed['job']['remedy']}") == 1, terminal
    run.start()
    finished_with_code(run, 0)
    done = stage_of(run)
    assert done["job"]["state"] == "done" and done["progress"]["step"] == QUICK_STEPS
    assert done["progress"]["attempts"] == 2 and done["progress"]["seconds_left"] is None
    logs = sorted(path.name for path in (run.results / "logs/train/base").iterdir())
    assert logs == ["attempt-0001.log", "attempt-0002.log"] and Path(done["job"]["log"]).name == logs[-1]
    text = (run.results / "logs/train/base/attempt-0001.log").read_text()
    assert "\x1b" not in text and "\r" not in text
