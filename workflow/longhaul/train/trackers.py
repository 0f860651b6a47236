"""Experiment trackers, each behind a switch of the config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longhaul.errors import UserError
from longhaul.jobs import StageJob


@dataclass(frozen=True)
class Tracker:
    """log(step, name -> number) and close()."""

    log: Callable[[int, dict[str, Any]], None]
    close: Callable[[], None]


def open_trackers(job: StageJob, folder: Path) -> list[Tracker]:
    """The trackers the config asks for; UserError when one's package is missing."""
    wanted = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    opened = []
    for name, opener in wanted.items():
        if getattr(job.trackers, name):
            try:
                opened.append(opener(job, folder))
            except ModuleNotFoundError as error:
                raise UserError(
                    f"trackers.{name}: the package {error.name} is not installed",
                    f"pip install {name}, or switch it off",
                ) from None
    return opened


def _tensorboard(job: StageJob, folder: Path) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(step: int, numbers: dict[str, Any]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(job: StageJob, folder: Path) -> Tracker:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(
        project=job.run, name=job.stage.name, id=f"{job.run}-{folder.name}", dir=str(folder), resume="allow"
    )
    return Tracker(lambda step, numbers: run.log(numbers, step=step), run.finish)


def _mlflow(job: StageJob, folder: Path) -> Tracker:
    import mlflow  # pyright: ignore[reportMissingImports]

    mlflow.set_experiment(job.run)
    mlflow.start_run(run_name=f"{job.stage.name}-{folder.name}")
    return Tracker(lambda step, numbers: mlflow.log_metrics(numbers, step=step), mlflow.end_run)
