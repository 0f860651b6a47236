"""Experiment trackers, each behind a switch of the config. A resumed stage goes on in the run of the tracker that it began.

trackers.json in the weights folder keeps the ids of those runs. Of the steps that a resume does again, TensorBoard is told to
forget the old ones, MLflow keeps the first, and W&B shows both where a leg was offline. Compute nodes have no internet: unless
the environment says otherwise, W&B and MLflow write into the weights folder. A tracker that fails does not end a training, nor
does it hold one up for long.
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

from longhaul.artifacts.files import read_json, write_json
from longhaul.errors import UserError
from longhaul.jobs.specs import TrainSpec


@dataclass(frozen=True)
class Tracker:
    """log(step, name -> number); rewind(step), when the steps from `step` on are done again; close()."""

    log: Callable[[int, dict[str, Any]], None]
    close: Callable[[], None]
    rewind: Callable[[int], None] = lambda step: None


_DEFAULTS = {
    "WANDB_INIT_TIMEOUT": "20",  # s; 90 otherwise
    "WANDB_FINISH_TIMEOUT": "60",  # s; for ever otherwise
    "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # s; 15 otherwise, which a kill would lose
    "WANDB_ERROR_REPORTING": "false",  # to its makers
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # s; 120 otherwise
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # 7 otherwise
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # a server may ask for hours
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # MLflow 3 would have SQLite, which network folders break
}
"""What W&B and MLflow read of the environment, where it does not say otherwise: how long they may hold up rank 0, which is soon
taken for hung (recovery.heartbeat_timeout_s); no word to their makers; files."""


def open_trackers(job: TrainSpec, folder: Path, first_step: int) -> list[Tracker]:
    """The trackers the config asks for; numbers of `first_step` and later steps follow. One that fails to open is left out.

    Raises UserError when a tracker's package or key is missing, or its run is not where it was begun.
    """
    for variable, value in _DEFAULTS.items():
        os.environ.setdefault(variable, value)
    openers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    wanted = {name: opener for name, opener in openers.items() if getattr(job.trackers, name)}
    opened = (_opened(name, partial(opener, job, folder, first_step)) for name, opener in wanted.items())
    return [tracker for tracker in opened if tracker]


def _opened(name: str, opener: Callable[[], Tracker]) -> Tracker | None:
    try:
        return _tolerated(name, opener())
    except UserError:
        raise
    except ModuleNotFoundError as error:
        package = {"mlflow": "mlflow-skinny"}.get(name, name)
        raise UserError(
            f"trackers.{name}: the package {error.name} is not installed",
            f"pip install {package}, or switch it off",
        ) from None
    except Exception as error:  # of a server, a disk, a library: no class in common
        _warn(name, _LEFT_OUT, error)
        return None


def _tolerated(name: str, tracker: Tracker) -> Tracker:
    """A tracker that, when it fails, says so once and does nothing more: metrics.jsonl holds everything anyway."""
    has_failed = False

    def guarded(call: Callable[..., None]) -> Callable[..., None]:
        def attempt(*arguments: Any) -> None:
            nonlocal has_failed
            if has_failed:
                return
            try:
                call(*arguments)
            except Exception as error:  # of a server, a disk, a library: no class in common
                has_failed = True
                _warn(name, _LEFT_OUT, error)

        return attempt

    return Tracker(guarded(tracker.log), guarded(tracker.close), guarded(tracker.rewind))


_LEFT_OUT = "is left out from here on, metrics.jsonl goes on"


def _warn(name: str, what: str, error: Exception) -> None:
    cause = _without_credentials(f"{type(error).__name__}: {error}")
    print(f"warning: trackers.{name} {what}: {cause}", file=sys.stderr, flush=True)


def _without_credentials(text: str) -> str:
    """Without what stands before the host of a URL."""
    return re.sub(r"//[^/\s@]*@", "//", text)


def _tensorboard(job: TrainSpec, folder: Path, first_step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    def open_at(step: int) -> Any:
        return SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    writer = open_at(first_step)

    def log(step: int, numbers: dict[str, Any]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    def rewind(step: int) -> None:
        nonlocal writer
        writer.close()
        writer = open_at(step)

    def close() -> None:
        writer.close()

    return Tracker(log, close, rewind)


def _wandb(job: TrainSpec, folder: Path, first_step: int) -> Tracker:
    """W&B itself leaves out what comes for a step before the last one that this process gave it."""
    import wandb
    from wandb.errors import AuthenticationError, CommError, UsageError

    run_id = _run_ids(folder).get("wandb") or uuid.uuid4().hex
    _keep_run_id(folder, "wandb", run_id)
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    begin = partial(wandb.init, project=job.run, name=job.stage.name, id=run_id, dir=str(folder), resume="allow")
    try:
        run = begin(mode=mode)
    except (AuthenticationError, UsageError) as error:  # before a server is asked
        raise UserError(
            f"trackers.wandb: WANDB_MODE={mode}, and no run can be begun: {_without_credentials(str(error))}",
            f"`wandb login` on this site; or unset WANDB_MODE, and `wandb sync` what is in {folder / 'wandb'}",
        ) from None
    except CommError as error:
        if "previously created and deleted" in str(error):
            raise UserError(
                f"trackers.wandb: run {run_id} was deleted on its server",
                f"undelete it there, or remove {_ids_path(folder)} to begin a new one",
            ) from None
        _warn("wandb", f"is offline in this leg, `wandb sync` {folder / 'wandb'} when its server is back", error)
        wandb.teardown()  # else the id is in use
        run = begin(mode="offline")
    return Tracker(lambda step, numbers: run.log(numbers, step=step), run.finish)


def _mlflow(job: TrainSpec, folder: Path, first_step: int) -> Tracker:
    import mlflow

    where = os.environ.get("MLFLOW_TRACKING_URI") or (folder.resolve() / "mlruns").as_uri()
    os.environ["MLFLOW_TRACKING_URI"] = where
    run_id = _run_ids(folder).get("mlflow")
    if run_id and _is_gone(run_id):
        raise UserError(
            f"trackers.mlflow: run {run_id} is not, or no more, at {_without_credentials(where)}",
            f"set MLFLOW_TRACKING_URI to where it was begun, or remove {_ids_path(folder)} to begin a new one",
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

    def log(step: int, numbers: dict[str, Any]) -> None:
        new = {name: value for name, value in numbers.items() if is_new(name, step)}
        mlflow.log_metrics(new, step=step)
        last_step.update(dict.fromkeys(new, step))

    return Tracker(log, mlflow.end_run)


def _is_gone(run_id: str) -> bool:
    """Whether the MLflow run was deleted or never there; raises what MLflow raises when its server does not say."""
    import mlflow

    try:
        return mlflow.get_run(run_id).info.lifecycle_stage == "deleted"
    except mlflow.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return True
        raise


def _ids_path(folder: Path) -> Path:
    return folder / "trackers.json"


def _run_ids(folder: Path) -> dict[str, str]:
    return read_json(_ids_path(folder)) if _ids_path(folder).exists() else {}


def _keep_run_id(folder: Path, tracker: str, run_id: str) -> None:
    write_json(_ids_path(folder), {**_run_ids(folder), tracker: run_id})
