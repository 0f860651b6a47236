"""A run with an export of no weights, and a site whose engine is tests/support/fake_vllm.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.atomic_files import file_sha256, write_json
from longhaul.artifacts.endpoint import Endpoint, read_endpoint
from longhaul.artifacts.job_state import State, read_state
from longhaul.artifacts.paths import SERVE_KIND, JobFolder, JobId, RunPaths
from longhaul.planning.load_plan import load_plan
from longhaul.report.plan_json import plan_json
from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import write_config
from tests.support.wait import is_alive, wait_for

FAKE_VLLM = {"engine": "vllm", "python": [sys.executable, str(REPOSITORY / "tests" / "support" / "fake_vllm.py")]}
LOCAL_SITE = {
    "scheduler": "local",
    "partitions.0.max_nodes": 1,
    "partitions.0.node": {"cpus": 2, "memory_mb": 4000},
    "interconnect": {"kind": "none"},
    "accelerator": "cpu",
}
KEY = "a-key-of-the-user_0123456789"


class ServedRun:
    """The run `small` in `folder`, whose stage `base` is exported. `serve` and `site` change the config and the site file.

    key: the user's API key; None for an engine that has none
    """

    def __init__(self, folder: Path, serve: dict[str, Any], site: dict[str, Any], key: str | None = KEY) -> None:
        self.folder, self._key = folder, key
        config = {"stages.0.export": "last", "stages.0.serve": serve}
        path = write_config(folder, config, {"serving": FAKE_VLLM, **site})
        write_json(RunPaths("small", folder / "results").plan, plan_json(load_plan(path)))
        self.job: JobFolder = RunPaths("small", folder / "results").job(JobId(SERVE_KIND, ("base",)))
        self.process: subprocess.Popen[str] | None = None

    def write_export(self, model: Path | None = None) -> None:
        """Write the manifest of an export: of a folder with a model, or of one with a config.json alone."""
        paths = RunPaths("small", self.folder / "results")
        if model is None:
            model = paths.exports("base") / "model"
            model.mkdir(parents=True)
            (model / "config.json").write_text("{}")
        paths.exports("base").mkdir(parents=True, exist_ok=True)
        files = {path.name: file_sha256(path) for path in model.iterdir()}
        Export("base", "c", 1, str(model), "fp32", 1, 1, files, {}, [], {}).write(paths.export_manifest("base"))

    def command(self, *options: str) -> list[str]:
        return [sys.executable, "-m", "longhaul", "serve", str(self.folder / "run.yaml"), "base", *options]

    def environment(self) -> dict[str, str]:
        code = f"{REPOSITORY / 'workflow'}:{REPOSITORY}"
        return {**os.environ, "PYTHONPATH": code, **({"LONGHAUL_API_KEY": self._key} if self._key else {})}

    def call(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the verb to its end."""
        return subprocess.run(
            self.command(*options),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def start(self) -> Endpoint:
        """Start the verb, and return the endpoint when the server answers."""
        self.start_verb()
        return self.wait_until_ready()

    def start_verb(self) -> None:
        self.process = subprocess.Popen(
            self.command(),
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_until_ready(self, timeout_s: float = 60.0) -> Endpoint:
        wait_for(self._is_ready_or_has_ended, timeout_s)
        endpoint = read_endpoint(self.job.endpoint)
        if endpoint is None:
            assert self.process and self.process.stdout
            raise AssertionError(f"the verb has ended: {self.process.stdout.read()}")
        return endpoint

    def _is_ready_or_has_ended(self) -> bool:
        endpoint = read_endpoint(self.job.endpoint)
        has_ended = self.process is not None and self.process.poll() is not None
        return endpoint.ready if endpoint else has_ended

    @property
    def state(self) -> State | None:
        return read_state(self.job.path)

    def started_engines(self, node_rank: int = 0) -> list[list[str]]:
        """Return the command line of each engine that was started on a node."""
        path = self.folder / f"started-{node_rank}.txt"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def processes(self) -> list[psutil.Process]:
        """Return the processes of this run's server."""
        return processes_in(self.folder)


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return the living processes whose working folder is `folder`."""

    def works_there(process: psutil.Process) -> bool:
        try:
            return process.cwd() == str(folder) and is_alive(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    return [process for process in psutil.process_iter() if works_there(process)]


def answer(url: str, key: str | None = None) -> int:
    """Return the status of a GET request."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def listening_addresses(processes: list[psutil.Process]) -> set[str]:
    """Return the addresses at which processes listen for TCP connections."""
    connections = [connection for process in processes for connection in process.net_connections("tcp")]
    return {connection.laddr[0] for connection in connections if connection.status == psutil.CONN_LISTEN}
