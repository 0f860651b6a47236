"""W&B and MLflow: what they show after a resume, and how a training continues without their keys, files or servers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
import pytest
import wandb
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

from longhaul.artifacts.paths import WeightsFolder
from longhaul.errors import UserError
from longhaul.train.monitoring.trackers import Tracker, open_trackers
from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import base_stage
from tests.support.tracker_server import (
    NO_BACKOFF,
    Answer,
    Server,
    mlflow_answer,
    unavailable,
    wandb_answer,
    wandb_answer_of_a_deleted_run,
)

ONLINE = {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40}
TRACKED_TRAINING = REPOSITORY / "tests" / "support" / "tracked_training.py"


@pytest.fixture(autouse=True)
def own_process(tmp_path: Path) -> Iterator[None]:
    """Give each test the environment of a user without settings; MLflow retries without a pause."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    own = {"HOME": str(tmp_path / "home"), "WANDB_SILENT": "true", **NO_BACKOFF}
    with mock.patch.dict(os.environ, {**kept, **own}, clear=True):
        yield
        with suppress(Exception):  # the server may be gone
            mlflow.end_run()
        wandb.teardown()


def open_attempt(folder: Path, tracker: str, first_step: int = 0) -> list[Tracker]:
    return open_trackers(base_stage(folder, **{tracker: True}), folder, first_step)


def train(tracker: Tracker, steps: range, loss: float) -> None:
    for step in steps:
        tracker.log(step, {"loss": loss})


def run_attempt(folder: Path, tracker: str, steps: range = range(2), loss: float = 1.0) -> None:
    (tracker,) = open_attempt(folder, tracker, steps.start)
    train(tracker, steps, loss)
    tracker.close()


def run_id(folder: Path, tracker: str) -> str:
    return json.loads((folder / "trackers.json").read_text())[tracker]


@pytest.fixture
def down() -> Iterator[str]:
    """Yield the address of a server that is down."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """Yield the address of a server that hangs: it accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


# MLflow


def mlflow_history(folder: Path) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient().get_metric_history(run_id(folder, "mlflow"), "loss")
    return [(metric.step, metric.value) for metric in history]


def test_mlflow_continues_its_run_and_has_each_step_once(tmp_path: Path):
    run_attempt(tmp_path, "mlflow", range(7), 1.0)
    run_attempt(tmp_path, "mlflow", range(5, 9), 2.0)
    assert mlflow_history(tmp_path) == [*((step, 1.0) for step in range(7)), (7, 2.0), (8, 2.0)]
    assert len(mlflow.search_runs(experiment_names=["small"], output_format="list")) == 1


@pytest.mark.parametrize("by", ["delete_run", "rm -r"])
def test_a_missing_mlflow_run_is_reported_by_its_id(tmp_path: Path, by: str):
    run_attempt(tmp_path, "mlflow")
    gone = run_id(tmp_path, "mlflow")
    if by == "delete_run":
        mlflow.delete_run(gone)
    else:
        shutil.rmtree(next((tmp_path / "mlruns").rglob(gone)))
    with pytest.raises(UserError, match=f"run {gone} does not exist at file://.*/mlruns\n.*trackers.json"):
        open_attempt(tmp_path, "mlflow", 2)
    WeightsFolder(tmp_path).tracker_runs.unlink()
    run_attempt(tmp_path, "mlflow")
    assert run_id(tmp_path, "mlflow") != gone


def test_deleted_mlflow_files_give_one_warning_and_do_not_end_a_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tracker,) = open_attempt(tmp_path, "mlflow")
    tracker.log(1, {"loss": 1.0})
    shutil.rmtree(tmp_path / "mlruns")
    train(tracker, range(2, 4), 1.0)
    tracker.close()
    assert capfd.readouterr().err.count("warning: trackers.mlflow is off for the rest of this attempt") == 1
    assert open_attempt(tmp_path, "mlflow", 2) == [], "MLflow raises a plain Exception here"
    assert capfd.readouterr().err.count("warning: trackers.mlflow is off for the rest of this attempt") == 1


def test_without_its_server_mlflow_is_off(tmp_path: Path, down: str, capfd: pytest.CaptureFixture[str]):
    os.environ["MLFLOW_TRACKING_URI"] = f"http://me:hunter2@{down}"
    assert open_attempt(tmp_path, "mlflow") == []
    output = capfd.readouterr().err
    assert output.count("warning: ") == 1 and down in output and "hunter2" not in output


def test_a_resume_does_not_need_mlflows_server(
    tmp_path: Path, serve: Callable[[Answer], Server], capfd: pytest.CaptureFixture[str]
):
    server = serve(mlflow_answer)
    os.environ["MLFLOW_TRACKING_URI"] = server.url
    run_attempt(tmp_path, "mlflow")
    server.answer = unavailable
    assert open_attempt(tmp_path, "mlflow", 1) == [] and capfd.readouterr().err.count("warning: ") == 1


def test_a_lost_mlflow_server_gets_three_requests_and_no_more(
    tmp_path: Path, serve: Callable[[Answer], Server], capfd: pytest.CaptureFixture[str]
):
    server = serve(mlflow_answer)
    os.environ["MLFLOW_TRACKING_URI"] = server.url
    (tracker,) = open_attempt(tmp_path, "mlflow")
    train(tracker, range(2), 1.0)
    assert server.requests.count("/api/2.0/mlflow/runs/log-batch") == 2
    server.answer = unavailable
    server.requests.clear()
    train(tracker, range(2, 5), 1.0)
    tracker.close()
    assert server.requests == ["/api/2.0/mlflow/runs/log-batch"] * 3
    assert capfd.readouterr().err.count("warning: ") == 1


def test_a_silent_mlflow_server_does_not_block_a_training(
    tmp_path: Path, silent: str, capfd: pytest.CaptureFixture[str]
):
    os.environ.update(MLFLOW_TRACKING_URI=f"http://{silent}", MLFLOW_HTTP_REQUEST_TIMEOUT="1")
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    assert open_attempt(tmp_path, "mlflow") == [] and "timeout" in capfd.readouterr().err


# W&B


def wandb_attempts(folder: Path) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return (run id, [(step, loss)]) of every offline attempt in the order of their starts, from `wandb leet inspect --json`."""
    attempts = []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        attempts.append((file.stem.removeprefix("run-"), [(row["_step"], row["loss"]) for row in rows]))
    return attempts


def test_wandb_continues_its_run_and_each_folder_has_its_own(tmp_path: Path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    run_attempt(tmp_path / "one", "wandb", range(7), 1.0)
    run_attempt(tmp_path / "one", "wandb", range(5, 9), 2.0)
    run_attempt(tmp_path / "two", "wandb")
    own_id = run_id(tmp_path / "one", "wandb")
    expected = [(own_id, [(step, 1.0) for step in range(7)]), (own_id, [(step, 2.0) for step in range(5, 9)])]
    assert wandb_attempts(tmp_path / "one") == expected and run_id(tmp_path / "two", "wandb") != own_id


def test_after_a_roll_back_wandb_has_each_step_once(tmp_path: Path):
    """W&B keeps the first value of a step, but the second one of the step before the roll-back, which it had not sent."""
    (tracker,) = open_attempt(tmp_path, "wandb")
    train(tracker, range(4), 1.0)
    tracker.rewind(2)
    train(tracker, range(2, 6), 2.0)
    tracker.close()
    ((_, rows),) = wandb_attempts(tmp_path)
    assert rows == [*((step, 1.0) for step in range(3)), *((step, 2.0) for step in range(3, 6))]


@pytest.mark.parametrize(("key", "message"), [("", "No API key configured"), ("abc", "must have 40")])
def test_wandb_without_a_valid_key_is_refused_until_it_is_offline(tmp_path: Path, key: str, message: str):
    os.environ.update({**ONLINE, "WANDB_API_KEY": key})
    with pytest.raises(UserError, match=f"WANDB_MODE is online, but W&B cannot begin a run: .*{message}"):
        open_attempt(tmp_path, "wandb")
    del os.environ["WANDB_MODE"]
    run_attempt(tmp_path, "wandb")


def test_without_its_server_wandb_is_offline(tmp_path: Path, down: str, capfd: pytest.CaptureFixture[str]):
    os.environ.update({**ONLINE, "WANDB_BASE_URL": f"http://{down}", "WANDB_INIT_TIMEOUT": "2"})
    run_attempt(tmp_path, "wandb")
    output = capfd.readouterr().err
    assert output.count("warning: ") == 1 and "trackers.wandb is offline in this attempt" in output and down in output
    assert wandb_attempts(tmp_path) == [(run_id(tmp_path, "wandb"), [(0, 1.0), (1, 1.0)])]


def test_a_deleted_wandb_run_is_refused(tmp_path: Path, serve: Callable[[Answer], Server]):
    server = serve(wandb_answer_of_a_deleted_run)
    os.environ.update({**ONLINE, "WANDB_BASE_URL": server.url, "WANDB_INIT_TIMEOUT": "3"})  # it retries until then
    with pytest.raises(UserError, match=r"was deleted on its server\n.*trackers.json"):
        open_attempt(tmp_path, "wandb")


def test_closing_does_not_wait_without_limit_for_wandbs_server(tmp_path: Path, serve: Callable[[Answer], Server]):
    server = serve(wandb_answer)
    os.environ.update({**ONLINE, "WANDB_BASE_URL": server.url, "WANDB_FINISH_TIMEOUT": "2"})
    (tracker,) = open_attempt(tmp_path, "wandb")
    assert "/graphql" in server.requests
    server.answer = unavailable
    train(tracker, range(3), 1.0)
    closing = threading.Thread(target=tracker.close, daemon=True)
    closing.start()
    closing.join(timeout=30)
    assert not closing.is_alive()


def test_a_killed_process_loses_no_more_than_the_last_second_in_wandb(tmp_path: Path):
    base_stage(tmp_path, wandb=True).write(tmp_path / "job.json")
    command = [sys.executable, str(TRACKED_TRAINING), str(tmp_path / "job.json"), str(tmp_path)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, start_new_session=True) as process:
        assert process.stdout and process.stdout.readline() == "logged\n"
        time.sleep(2)
        os.killpg(process.pid, signal.SIGKILL)
    ((_, rows),) = wandb_attempts(tmp_path)
    assert rows == [(step, 1.0) for step in range(4)], "all but the last step, which W&B had not sent"


# Both


def test_both_libraries_know_our_environment_variables(tmp_path: Path):
    """Neither reports a variable that it does not know."""
    open_trackers(base_stage(tmp_path, wandb=True, mlflow=True), tmp_path, 0)
    assert wandb.run
    settings = wandb.run.settings
    assert (settings.init_timeout, settings.finish_timeout, settings.x_transaction_log_flush_interval) == (20, 60, 1)
    assert (MLFLOW_HTTP_REQUEST_TIMEOUT.get(), MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()) == (10, 2)


def test_a_missing_package_is_reported_by_its_name_until_the_tracker_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=f"trackers.{name}: .*not installed\n  remedy: pip install {package},"):
            open_attempt(tmp_path, name)
    assert open_trackers(base_stage(tmp_path, wandb=False, mlflow=False), tmp_path, 0) == []
