"""Starts a job that serves, one process on each of two virtual hosts, with the variables that srun and the supervisor set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from longhaul.config.site_serving_config import Serving
from longhaul.jobs.kinds.serve_job import ServeSpec
from tests.support.pipeline_run import REPOSITORY
from tests.support.virtual_hosts import VirtualHosts

NODES = ("n1", "n2")
_VARIABLES = {
    "WORLD_SIZE": 2,
    "LOCAL_RANK": 0,
    "LOCAL_WORLD_SIZE": 1,
    "MASTER_ADDR": NODES[0],
    "PYTHONPATH": f"{REPOSITORY / 'workflow'}:{REPOSITORY}",
    "HF_HUB_OFFLINE": 1,
    "OMP_NUM_THREADS": 1,
}


def write_server_spec(folder: Path, export: Path, serving: Serving, start_timeout_s: int, drain_s: int) -> Path:
    """Write the spec of a server with one pipeline rank on each host, and return its path. folder: has api_key.yaml"""
    path = folder / "job.json"
    ServeSpec(
        run="small",
        stage="main",
        export=str(export),
        dtype="fp32",
        serving=serving,
        model_name="small-main",
        nodes=2,
        tensor=1,
        pipeline=2,
        expert_parallel=False,
        context=64,
        max_running_requests=8,
        port=None,
        start_timeout_s=start_timeout_s,
        drain_s=drain_s,
        key_file=str(folder / "api_key.yaml"),
        folder=str(folder),
        local=False,
    ).write(path)
    return path


def start_parts(hosts: VirtualHosts, kind: str, spec: Path, port: int) -> list[subprocess.Popen[bytes]]:
    """Start each host's part of a job. Its output goes to <host>.log beside the spec.

    port: MASTER_PORT, another one for each job: an engine of an earlier one may still be ending
    """
    parts = []
    for rank, host in enumerate(NODES):
        variables = {**_VARIABLES, "RANK": rank, "MASTER_PORT": port}
        words = ["env", *(f"{name}={value}" for name, value in variables.items())]
        words += [sys.executable, "-m", "longhaul", "job", "run", kind, str(spec)]
        with spec.with_name(f"{host}.log").open("wb") as log:
            command = hosts.command(words, host=host, cwd=spec.parent)
            parts.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=hosts.environment(), start_new_session=True)
            )
    return parts
