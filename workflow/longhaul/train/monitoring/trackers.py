"""Sends metrics to TensorBoard, W&B and MLflow; continues their runs after a resume.

- A resumed stage continues in the run that it began; trackers.json in the weights folder keeps the ids of those runs.
- A resume repeats steps. TensorBoard forgets the old ones, MLflow keeps the first, W&B shows both where an attempt was offline.
- Compute nodes have no internet: unless the environment says otherwise, W&B and MLflow write into the weights folder.
- A tracker that fails does not end a training, and delays it only for a short time.
"""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longhaul.artifacts.atomic_files import write_json
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.compat.wandb import FLUSH_INTERVAL_VARIABLE, is_deleted_run
from longhaul.errors import UserError
from longhaul.jobs.kinds.train_job import TrainSpec


@dataclass(frozen=True)
class Tracker:
    """One tracker's functions: log(step, name -> number), close(), rewind(step) before steps from `step` on are repeated."""

    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]
    rewind: Callable[[int], None] = lambda step: None


_ENVIRONMENT_DEFAULTS = {
    "WANDB_INIT_TIMEOUT": "20",  # s; W&B's default is 90
    "WANDB_FINISH_TIMEOUT": "60",  # s; W&B's default is no limit
    FLUSH_INTERVAL_VARIABLE: "1",  # s; W&B's default of 15 is what a killed process would lose
    "WANDB_ERROR_REPORTING": "false",  # no reports to W&B
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # s; MLflow's default is 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's default is 7
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # a server may ask for hours
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # MLflow 3's default is SQLite, which breaks on network folders
}
"""Environment variables of W&B and MLflow, where the environment does not set them.

They limit how long a tracker may block rank 0, which the heartbeat would soon treat as hung (recovery.heartbeat_timeout_s). They
also switch off telemetry, and choose files as MLflow's store."""


def open_trackers(job: TrainSpec, folder: Path, first_step: int) -> list[Tracker]:
    """Open the trackers of the config; values of `first_step` and later steps follow. A tracker that fails to open is left off.

    Raises:
        UserError: a tracker's package or key is missing, or its run is not where it was begun.
    """
    for variable, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(variable, value)
    openers = {"tensorboard": _open_tensorboard, "wandb": _open_wandb, "mlflow": _open_mlflow}
    enabled = {name: opener for name, opener in openers.items() if getattr(job.trackers, name)}
    opened = (_open_or_warn(name, partial(opener, job, folder, first_step)) for name, opener in enabled.items())
    return [tracker for tracker in opened if tracker]


def _open_or_warn(name: str, opener: Callable[[], Tracker]) -> Tracker | None:
    try:
        return _off_after_failure(name, opener())
    except UserError:
        raise
    except ModuleNotFoundError as error:
        package = {"mlflow": "mlflow-skinny"}.get(name, name)
        raise UserError(
            f"trackers.{name}: the package {error.name} is not installed",
            f"pip install {package}, or set trackers.{name}: false",
        ) from None
    except Exception as error:  # errors of servers, disks and libraries have no class in common
        _warn(name, _IS_OFF, error)
        return None


def _off_after_failure(name: str, tracker: Tracker) -> Tracker:
    """Return a tracker that warns at its first failure and does nothing afterwards: metrics.jsonl has every value anyway."""
    has_failed = False

    def guarded(call: Callable[..., None]) -> Callable[..., None]:
        def attempt(*arguments: object) -> None:
            nonlocal has_failed
            if has_failed:
                return
            try:
                call(*arguments)
            except Exception as error:  # errors of servers, disks and libraries have no class in common
                has_failed = True
                _warn(name, _IS_OFF, error)

        return attempt

    return Tracker(guarded(tracker.log), guarded(tracker.close), guarded(tracker.rewind))


_IS_OFF = "is off for the rest of this attempt; metrics.jsonl still gets every value"


def _warn(name: str, what: str, error: Exception) -> None:
    cause = _without_credentials(f"{type(error).__name__}: {error}")
    print(f"warning: trackers.{name} {what}: {cause}", file=sys.stderr, flush=True)


def _without_credentials(text: str) -> str:
    """Remove what stands before the host of a URL."""
    return re.sub(r"//[^/\s@]*@", "//", text)


def _open_tensorboard(job: TrainSpec, folder: Path, first_step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    def open_at(step: int) -> SummaryWriter:
        return SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    writer = open_at(first_step)

    def log(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    def rewind(step: int) -> None:
        nonlocal writer
        writer.close()
        writer = open_at(step)

    def close() -> None:
        writer.close()

    return Tracker(log, close, rewind)


def _open_wandb(job: TrainSpec, folder: Path, first_step: int) -> Tracker:
    """Open the W&B run. It needs no rewind: W&B drops values for a step before the last one that this process logged."""
    import wandb
    from wandb.errors import AuthenticationError, CommError, UsageError

    run_id = _run_ids(folder).get("wandb") or uuid.uuid4().hex
    _keep_run_id(folder, "wandb", run_id)
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    begin = partial(wandb.init, project=job.run, name=job.stage.name, id=run_id, dir=str(folder), resume="allow")
    try:
        run = begin(mode=mode)
    except (AuthenticationError, UsageError) as error:  # raised before the server is asked
        raise UserError(
            f"trackers.wandb: WANDB_MODE is {mode}, but W&B cannot begin a run: {_without_credentials(str(error))}",
            f"`wandb login` on this site; or unset WANDB_MODE, and later `wandb sync` {folder / 'wandb'}",
        ) from None
    except CommError as error:
        if is_deleted_run(error):
            raise UserError(
                f"trackers.wandb: run {run_id} was deleted on its server",
                f"restore it there, or remove {WeightsFolder(folder).tracker_runs} to begin a new one",
            ) from None
        _warn("wandb", f"is offline in this attempt; `wandb sync` {folder / 'wandb'} when its server is back", error)
        wandb.teardown()  # else the id counts as in use
        run = begin(mode="offline")
    return Tracker(lambda step, numbers: run.log(numbers, step=step), run.finish)


def _open_mlflow(job: TrainSpec, folder: Path, first_step: int) -> Tracker:
    """Open the MLflow run. Steps that a resume repeats are already in it and are not logged again, so it needs no rewind."""
    import mlflow

    uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder.resolve() / "mlruns").as_uri()
    os.environ["MLFLOW_TRACKING_URI"] = uri
    run_id = _run_ids(folder).get("mlflow")
    if run_id and _is_missing(run_id):
        raise UserError(
            f"trackers.mlflow: run {run_id} does not exist at {_without_credentials(uri)}",
            f"set MLFLOW_TRACKING_URI to where it was begun, or remove {WeightsFolder(folder).tracker_runs} to begin a new one",
        )
    mlflow.set_experiment(job.run)
    run = mlflow.start_run(run_id=run_id, run_name=f"{job.stage.name}-{folder.name}")
    _keep_run_id(folder, "mlflow", run.info.run_id)
    last_step: dict[str, int] = {}

    def is_new(name: str, step: int) -> bool:
        if name not in last_step:
            history = mlflow.MlflowClient().get_metric_history(run.info.run_id, name)
            last_step[name] = max((metric.step for metric in history), default=-1)
        return step > last_step[name]

    def log(step: int, numbers: dict[str, float]) -> None:
        new = {name: value for name, value in numbers.items() if is_new(name, step)}
        mlflow.log_metrics(new, step=step)
        last_step.update(dict.fromkeys(new, step))

    return Tracker(log, mlflow.end_run)


def _is_missing(run_id: str) -> bool:
    """Return whether the MLflow run was deleted or never existed; raise MLflow's error when its server does not answer."""
    import mlflow

    try:
        return mlflow.get_run(run_id).info.lifecycle_stage == "deleted"
    except mlflow.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return True
        raise


def _run_ids(folder: Path) -> dict[str, str]:
    path = WeightsFolder(folder).tracker_runs
    return read_typed_json(path, dict[str, str], "delete it: the trackers begin new runs") if path.exists() else {}


def _keep_run_id(folder: Path, tracker: str, run_id: str) -> None:
    write_json(WeightsFolder(folder).tracker_runs, {**_run_ids(folder), tracker: run_id})
