"""No file that a run writes contains secrets of the environment: results, logs, launch scripts, Snakemake's records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.pipeline_run import REPOSITORY, SECRETS, PipelineRun, leaks
from tests.support.small_configs import base_stage
from tests.support.tracker_server import NO_BACKOFF, Answer, Server, mlflow_answer, unavailable, wandb_answer

TRACKED_TRAINING = REPOSITORY / "tests/support/tracked_training.py"


def test_run_writes_no_secrets(finished: PipelineRun):
    written = [path for path in finished.folder.rglob("*") if path.is_file()]
    kinds = {path.relative_to(finished.folder).parts[0] for path in written}
    assert {"results", ".snakemake"} <= kinds and any(path.suffix == ".log" for path in written)
    assert leaks(finished.folder) == []


def test_secrets_are_in_the_environment_of_jobs(finished: PipelineRun, tmp_path: Path):
    """The supervisor's processes inherit the environment. Otherwise test_run_writes_no_secrets would find nothing."""
    probe = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    launch = json.loads((finished.results / "stages/chat/launch.json").read_text())
    launch["folder"] = str(tmp_path)
    launch["steps"] = [{"title": "probe", "command": [sys.executable, "-c", probe, str(tmp_path / "seen.json")]}]
    (tmp_path / "launch.json").write_text(json.dumps(launch))
    command = [sys.executable, "-m", "longhaul", "job", "supervise", str(tmp_path / "launch.json")]
    subprocess.run(command, cwd=finished.folder, env=finished.environment(), check=True, capture_output=True)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {name: seen.get(name) for name in SECRETS} == SECRETS


@pytest.mark.parametrize("target", ["files", "servers"])
def test_trackers_write_no_secrets(tmp_path: Path, serve: Callable[[Answer], Server], target: str):
    """Neither the weights folder nor the home folder nor messages about failing servers contain secrets."""
    base_stage(tmp_path, wandb=True, mlflow=True).write(tmp_path / "job.json")
    server = serve(fail_after_start)
    own = {"HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_USERNAME": "me", "WANDB_FINISH_TIMEOUT": "1", **NO_BACKOFF}
    if target == "servers":
        own |= {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "MLFLOW_TRACKING_URI": server.url}
    command = [sys.executable, str(TRACKED_TRAINING), str(tmp_path / "job.json"), str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, **SECRETS, **own}
        subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, timeout=120
        )
    sent = {f"api:{SECRETS['WANDB_API_KEY']}", f"me:{SECRETS['MLFLOW_TRACKING_PASSWORD']}"}
    assert server.credentials == (sent if target == "servers" else set())
    assert list(tmp_path.glob("wandb/*/*.wandb")) and ((tmp_path / "mlruns").exists() == (target == "files"))
    assert ("trackers.mlflow is off for the rest" in (tmp_path / "log").read_text()) == (target == "servers")
    assert leaks(tmp_path) == []


def fail_after_start(path: str, request: Any) -> tuple[int, Any]:
    """Answer as the servers of both trackers: they start a run, and then refuse its values."""
    if path.endswith(("/log-batch", "/file_stream")):
        return unavailable(path, request)
    return (mlflow_answer if "/mlflow/" in path else wandb_answer)(path, request)


@pytest.mark.parametrize("form", ["token={}!", "api:{}", "user:{}"])
def test_leaks_finds_secrets_in_plain_text_and_base64(tmp_path: Path, form: str):
    text = form.format(SECRETS["HF_TOKEN"])
    (tmp_path / "log").write_text(text)
    (tmp_path / "header").write_text(f"Authorization: Basic {b64encode(text.encode()).decode()}")
    assert sorted(leaks(tmp_path)) == [f"{tmp_path / name}: HF_TOKEN" for name in ("header", "log")]
