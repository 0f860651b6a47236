"""Secrets of the environment are in no file that a run writes: results, logs, rendered scripts, Snakemake's own records."""

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

from tests.support.chain import REPOSITORY, SECRETS, Chain, leaks
from tests.support.small_configs import base_stage
from tests.support.tracker_server import AT_ONCE, Answer, Server, broken, mlflow_answer, wandb_answer

TRACKED_LEG = REPOSITORY / "tests/unit/train/tracked_leg.py"


def test_a_whole_run_keeps_them_to_itself(finished: Chain):
    written = [path for path in finished.folder.rglob("*") if path.is_file()]
    kinds = {path.relative_to(finished.folder).parts[0] for path in written}
    assert {"results", ".snakemake"} <= kinds and any(path.suffix == ".log" for path in written)
    assert leaks(finished.folder) == []


def test_every_job_had_them(finished: Chain, tmp_path: Path):
    """What the supervisor starts inherits the environment, so the test above is not empty."""
    probe = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    launch = json.loads((finished.results / "stages/chat/launch.json").read_text())
    launch["folder"] = str(tmp_path)
    launch["steps"] = [{"title": "probe", "command": [sys.executable, "-c", probe, str(tmp_path / "seen.json")]}]
    (tmp_path / "launch.json").write_text(json.dumps(launch))
    command = [sys.executable, "-m", "longhaul", "supervise", str(tmp_path / "launch.json")]
    subprocess.run(command, cwd=finished.folder, env=finished.environment(), check=True, capture_output=True)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {name: seen.get(name) for name in SECRETS} == SECRETS


@pytest.mark.parametrize("at", ["files", "servers"])
def test_trackers_keep_them_to_themselves(tmp_path: Path, serve: Callable[[Answer], Server], at: str):
    """In the weights folder, the user's home, and what is said of servers that break down."""
    base_stage(tmp_path, wandb=True, mlflow=True).write(tmp_path / "job.json")
    server = serve(breaks_down)
    own = {"HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_USERNAME": "me", "WANDB_FINISH_TIMEOUT": "1", **AT_ONCE}
    if at == "servers":
        own |= {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "MLFLOW_TRACKING_URI": server.url}
    command = [sys.executable, str(TRACKED_LEG), str(tmp_path / "job.json"), str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, **SECRETS, **own}
        subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, timeout=120
        )
    sent = {f"api:{SECRETS['WANDB_API_KEY']}", f"me:{SECRETS['MLFLOW_TRACKING_PASSWORD']}"}
    assert server.credentials == (sent if at == "servers" else set())
    assert list(tmp_path.glob("wandb/*/*.wandb")) and ((tmp_path / "mlruns").exists() == (at == "files"))
    assert ("trackers.mlflow is left out" in (tmp_path / "log").read_text()) == (at == "servers")
    assert leaks(tmp_path) == []


def breaks_down(path: str, request: Any) -> tuple[int, Any]:
    """Both trackers' servers, which begin a run and then take nothing."""
    if path.endswith(("/log-batch", "/file_stream")):
        return broken(path, request)
    return (mlflow_answer if "/mlflow/" in path else wandb_answer)(path, request)


@pytest.mark.parametrize("form", ["token={}!", "api:{}", "user:{}"])
def test_what_looks_for_them_finds_them(tmp_path: Path, form: str):
    text = form.format(SECRETS["HF_TOKEN"])
    (tmp_path / "log").write_text(text)
    (tmp_path / "header").write_text(f"Authorization: Basic {b64encode(text.encode()).decode()}")
    assert sorted(leaks(tmp_path)) == [f"{tmp_path / name}: HF_TOKEN" for name in ("header", "log")]
