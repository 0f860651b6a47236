"""W&B and MLflow themselves: what a resume shows, and what becomes of a training without their keys, files or servers."""

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

from longhaul.errors import UserError
from longhaul.train.monitoring.trackers import Tracker, open_trackers
from tests.support.chain import REPOSITORY
from tests.support.small_configs import base_stage
from tests.support.tracker_server import (
    AT_ONCE,
    Answer,
    Server,
    broken,
    mlflow_answer,
    wandb_answer,
    wandb_answer_of_a_deleted_run,
)

ONLINE = {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40}
TRACKED_TRAINING = REPOSITORY / "tests" / "support" / "tracked_training.py"


@pytest.fixture(autouse=True)
def own_process(tmp_path: Path) -> Iterator[None]:
    """What both find in a new process of a user without settings; MLflow tries again without a pause."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    own = {"HOME": str(tmp_path / "home"), "WANDB_SILENT": "true", **AT_ONCE}
    with mock.patch.dict(os.environ, {**kept, **own}, clear=True):
        yield
        with suppress(Exception):  # of a server that is gone
            mlflow.end_run()
        wandb.teardown()


def open_leg(folder: Path, tracker: str, first_step: int = 0) -> list[Tracker]:
    return open_trackers(base_stage(folder, **{tracker: True}), folder, first_step)


def train(tracker: Tracker, steps: range, loss: float) -> None:
    for step in steps:
        tracker.log(step, {"loss": loss})


def whole_leg(folder: Path, tracker: str, steps: range = range(2), loss: float = 1.0) -> None:
    (opened,) = open_leg(folder, tracker, steps.start)
    train(opened, steps, loss)
    opened.close()


def run_id(folder: Path, tracker: str) -> str:
    return json.loads((folder / "trackers.json").read_text())[tracker]


@pytest.fixture
def nobody() -> Iterator[str]:
    """The port of a server that is down."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """The port of a server that hangs: it accepts, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


# MLflow


def mlflow_history(folder: Path) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient().get_metric_history(run_id(folder, "mlflow"), "loss")
    return [(metric.step, metric.value) for metric in history]


def test_mlflow_goes_on_in_its_run_and_shows_each_step_once(tmp_path: Path):
    whole_leg(tmp_path, "mlflow", range(7), 1.0)
    whole_leg(tmp_path, "mlflow", range(5, 9), 2.0)
    assert mlflow_history(tmp_path) == [*((step, 1.0) for step in range(7)), (7, 2.0), (8, 2.0)]
    assert len(mlflow.search_runs(experiment_names=["small"], output_format="list")) == 1


@pytest.mark.parametrize("by", ["its user", "rm -r"])
def test_an_mlflow_run_that_is_gone_is_named(tmp_path: Path, by: str):
    whole_leg(tmp_path, "mlflow")
    gone = run_id(tmp_path, "mlflow")
    if by == "its user":
        mlflow.delete_run(gone)
    else:
        shutil.rmtree(next((tmp_path / "mlruns").rglob(gone)))
    with pytest.raises(UserError, match=f"run {gone} is not, or no more, at file://.*/mlruns\n.*trackers.json"):
        open_leg(tmp_path, "mlflow", 2)


def test_files_that_go_under_mlflow_are_told_once_and_end_no_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tracker,) = open_leg(tmp_path, "mlflow")
    tracker.log(1, {"loss": 1.0})
    shutil.rmtree(tmp_path / "mlruns")
    train(tracker, range(2, 4), 1.0)
    tracker.close()
    assert capfd.readouterr().err.count("warning: trackers.mlflow is left out from here on") == 1
    assert open_leg(tmp_path, "mlflow", 2) == [], "MLflow ends this with an Exception without a class"
    assert capfd.readouterr().err.count("warning: trackers.mlflow is left out from here on") == 1


def test_without_its_server_mlflow_is_left_out(tmp_path: Path, nobody: str, capfd: pytest.CaptureFixture[str]):
    os.environ["MLFLOW_TRACKING_URI"] = f"http://me:hunter2@{nobody}"
    assert open_leg(tmp_path, "mlflow") == []
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1 and nobody in said and "hunter2" not in said


def test_a_restart_does_not_need_mlflows_server(
    tmp_path: Path, serve: Callable[[Answer], Server], capfd: pytest.CaptureFixture[str]
):
    server = serve(mlflow_answer)
    os.environ["MLFLOW_TRACKING_URI"] = server.url
    whole_leg(tmp_path, "mlflow")
    server.answer = broken
    assert open_leg(tmp_path, "mlflow", 1) == [] and capfd.readouterr().err.count("warning: ") == 1


def test_a_lost_mlflow_server_is_asked_thrice_and_no_more(
    tmp_path: Path, serve: Callable[[Answer], Server], capfd: pytest.CaptureFixture[str]
):
    server = serve(mlflow_answer)
    os.environ["MLFLOW_TRACKING_URI"] = server.url
    (tracker,) = open_leg(tmp_path, "mlflow")
    train(tracker, range(2), 1.0)
    assert server.asked.count("/api/2.0/mlflow/runs/log-batch") == 2
    server.answer = broken
    server.asked.clear()
    train(tracker, range(2, 5), 1.0)
    tracker.close()
    assert server.asked == ["/api/2.0/mlflow/runs/log-batch"] * 3
    assert capfd.readouterr().err.count("warning: ") == 1


def test_a_silent_mlflow_server_is_not_waited_for(tmp_path: Path, silent: str, capfd: pytest.CaptureFixture[str]):
    os.environ.update(MLFLOW_TRACKING_URI=f"http://{silent}", MLFLOW_HTTP_REQUEST_TIMEOUT="1")
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    assert open_leg(tmp_path, "mlflow") == [] and "timeout" in capfd.readouterr().err


# W&B


def wandb_legs(folder: Path) -> list[tuple[str, list[tuple[int, float]]]]:
    """(run id, (step, loss) of its history) of every offline leg in the order they began, by `wandb leet inspect --json`."""
    legs = []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        legs.append((file.stem.removeprefix("run-"), [(row["_step"], row["loss"]) for row in rows]))
    return legs


def test_wandb_goes_on_in_its_run_and_another_folder_has_another(tmp_path: Path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    whole_leg(tmp_path / "one", "wandb", range(7), 1.0)
    whole_leg(tmp_path / "one", "wandb", range(5, 9), 2.0)
    whole_leg(tmp_path / "two", "wandb")
    mine = run_id(tmp_path / "one", "wandb")
    wanted = [(mine, [(step, 1.0) for step in range(7)]), (mine, [(step, 2.0) for step in range(5, 9)])]
    assert wandb_legs(tmp_path / "one") == wanted and run_id(tmp_path / "two", "wandb") != mine


def test_a_roll_back_shows_each_step_once_in_wandb(tmp_path: Path):
    """The first value; of the last step before the roll back, which W&B still held back for more of it, the second."""
    (tracker,) = open_leg(tmp_path, "wandb")
    train(tracker, range(4), 1.0)
    tracker.rewind(2)
    train(tracker, range(2, 6), 2.0)
    tracker.close()
    ((_, rows),) = wandb_legs(tmp_path)
    assert rows == [*((step, 1.0) for step in range(3)), *((step, 2.0) for step in range(3, 6))]


@pytest.mark.parametrize(("key", "says"), [("", "No API key configured"), ("abc", "must have 40")])
def test_wandb_without_a_key_is_told(tmp_path: Path, key: str, says: str):
    os.environ.update({**ONLINE, "WANDB_API_KEY": key})
    with pytest.raises(UserError, match=f"WANDB_MODE=online, and no run can be begun: .*{says}"):
        open_leg(tmp_path, "wandb")


def test_without_its_server_wandb_is_offline(tmp_path: Path, nobody: str, capfd: pytest.CaptureFixture[str]):
    os.environ.update({**ONLINE, "WANDB_BASE_URL": f"http://{nobody}", "WANDB_INIT_TIMEOUT": "2"})
    whole_leg(tmp_path, "wandb")
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1 and "trackers.wandb is offline in this leg" in said and nobody in said
    assert wandb_legs(tmp_path) == [(run_id(tmp_path, "wandb"), [(0, 1.0), (1, 1.0)])]


def test_a_wandb_run_that_was_deleted_is_named(tmp_path: Path, serve: Callable[[Answer], Server]):
    server = serve(wandb_answer_of_a_deleted_run)
    os.environ.update({**ONLINE, "WANDB_BASE_URL": server.url, "WANDB_INIT_TIMEOUT": "3"})  # it asks on till then
    with pytest.raises(UserError, match=r"was deleted on its server\n.*trackers.json"):
        open_leg(tmp_path, "wandb")


def test_the_end_does_not_wait_for_ever_for_wandbs_server(tmp_path: Path, serve: Callable[[Answer], Server]):
    server = serve(wandb_answer)
    os.environ.update({**ONLINE, "WANDB_BASE_URL": server.url, "WANDB_FINISH_TIMEOUT": "2"})
    (tracker,) = open_leg(tmp_path, "wandb")
    assert "/graphql" in server.asked
    server.answer = broken
    train(tracker, range(3), 1.0)
    closing = threading.Thread(target=tracker.close, daemon=True)
    closing.start()
    closing.join(timeout=30)
    assert not closing.is_alive()


def test_a_kill_costs_wandb_no_more_than_the_last_second(tmp_path: Path):
    base_stage(tmp_path, wandb=True).write(tmp_path / "job.json")
    command = [sys.executable, str(TRACKED_TRAINING), str(tmp_path / "job.json"), str(tmp_path)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, start_new_session=True) as process:
        assert process.stdout and process.stdout.readline() == "logged\n"
        time.sleep(2)
        os.killpg(process.pid, signal.SIGKILL)
    ((_, rows),) = wandb_legs(tmp_path)
    assert rows == [(step, 1.0) for step in range(4)], "all but the last step, which W&B holds back for more of it"


# Both


def test_their_limits_are_known_to_them(tmp_path: Path):
    """Neither says a word of a variable that it does not know."""
    open_trackers(base_stage(tmp_path, wandb=True, mlflow=True), tmp_path, 0)
    assert wandb.run
    settings = wandb.run.settings
    assert (settings.init_timeout, settings.finish_timeout, settings.x_transaction_log_flush_interval) == (20, 60, 1)
    assert (MLFLOW_HTTP_REQUEST_TIMEOUT.get(), MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()) == (10, 2)


def test_a_missing_package_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=f"trackers.{name}: .*not installed\n  remedy: pip install {package},"):
            open_leg(tmp_path, name)
