"""Experiment trackers, each behind a switch of the config. A resumed stage goes on in the run of the tracker that it began.

trackers.json in the weights folder keeps the ids of those runs. The steps that a resume does again show once: TensorBoard
is told to forget the old ones; W&B and MLflow cannot forget, and keep the first. Compute nodes have no internet: unless the
environment says otherwise, both write into the weights folder. A tracker that fails does not end a training.
"""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longhaul.artifacts import read_json, write_json
from longhaul.errors import UserError
from longhaul.jobs import StageJob


@dataclass(frozen=True)
class Tracker:
    """log(step, name -> number); rewind(step), when the steps from `step` on are done again; close()."""

    log: Callable[[int, dict[str, Any]], None]
    close: Callable[[], None]
    rewind: Callable[[int], None] = lambda step: None


def open_trackers(job: StageJob, folder: Path, first_step: int) -> list[Tracker]:
    """The trackers the config asks for; numbers of `first_step` and later steps follow.

    Raises UserError when a tracker's package or key is missing, or its run is not where it was begun.
    """
    wanted = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    opened = []
    for name, opener in wanted.items():
        if getattr(job.trackers, name):
            try:
                opened.append(_tolerated(name, opener(job, folder, first_step)))
            except ModuleNotFoundError as error:
                raise UserError(
                    f"trackers.{name}: the package {error.name} is not installed",
                    f"pip install {name}, or switch it off",
                ) from None
    return opened


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
                cause = _without_credentials(f"{type(error).__name__}: {error}")
                told = f"warning: trackers.{name} is left out from here on, metrics.jsonl goes on: {cause}"
                print(told, file=sys.stderr, flush=True)

        return attempt

    return Tracker(guarded(tracker.log), guarded(tracker.close), guarded(tracker.rewind))


def _without_credentials(text: str) -> str:
    """Without what stands before the host of a URL."""
    return re.sub(r"//[^/\s@]*@", "//", text)


def _tensorboard(job: StageJob, folder: Path, first_step: int) -> Tracker:
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


def _wandb(job: StageJob, folder: Path, first_step: int) -> Tracker:
    """W&B itself leaves out what comes for a step before the last one that this process gave it."""
    import wandb  # pyright: ignore[reportMissingImports]

    run_id = _run_ids(folder).get("wandb") or uuid.uuid4().hex
    _keep_run_id(folder, "wandb", run_id)
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    try:
        run = wandb.init(project=job.run, name=job.stage.name, id=run_id, dir=str(folder), resume="allow", mode=mode)
    except wandb.Error as error:
        raise UserError(
            f"trackers.wandb: WANDB_MODE={mode}, and no run can be begun: {_without_credentials(str(error))}",
            f"`wandb login` on this site; or unset WANDB_MODE, and `wandb sync` what is in {folder / 'wandb'}",
        ) from None
    return Tracker(lambda step, numbers: run.log(numbers, step=step), run.finish)


def _mlflow(job: StageJob, folder: Path, first_step: int) -> Tracker:
    import mlflow  # pyright: ignore[reportMissingImports]

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ.setdefault(
            "MLFLOW_ALLOW_FILE_STORE", "true"
        )  # MLflow 3 would have SQLite, which network folders break
        mlflow.set_tracking_uri((folder.resolve() / "mlruns").as_uri())
    run_id = _run_ids(folder).get("mlflow")
    try:
        mlflow.set_experiment(job.run)
        run = mlflow.start_run(run_id=run_id, run_name=f"{job.stage.name}-{folder.name}")
    except mlflow.MlflowException as error:
        where = _without_credentials(f"{mlflow.get_tracking_uri()}: {error}")
        raise UserError(
            f"trackers.mlflow: run {run_id or 'of this stage'} cannot be opened at {where}",
            f"set MLFLOW_TRACKING_URI to where it was begun, or remove {_ids_path(folder)} to begin a new one",
        ) from None
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


def _ids_path(folder: Path) -> Path:
    return folder / "trackers.json"


def _run_ids(folder: Path) -> dict[str, str]:
    return read_json(_ids_path(folder)) if _ids_path(folder).exists() else {}


def _keep_run_id(folder: Path, tracker: str, run_id: str) -> None:
    write_json(_ids_path(folder), {**_run_ids(folder), tracker: run_id})
