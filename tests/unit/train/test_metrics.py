"""What a resume does to the records of a training: steps that are done again stand there once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import LLAMA, plan_of
from longhaul.errors import UserError
from longhaul.jobs import StageJob
from longhaul.payloads import payload
from longhaul.train.events import Events
from longhaul.train.metrics import Metrics, device_numbers
from longhaul.train.trackers import Tracker, open_trackers

MODEL = {"model_type": "llama", **LLAMA}


def job(folder: Path, **trackers: bool) -> StageJob:
    """A stage of one process with these trackers."""
    switches = {f"trackers.{name}": is_on for name, is_on in {"tensorboard": False, **trackers}.items()}
    planned = payload(plan_of(folder / "planned", {**switches, "stages.0.gpus_per_node": 1}), "train-base")
    assert isinstance(planned, StageJob)
    return planned


def open_metrics(folder: Path, resumed_from: int, **trackers: bool) -> Metrics:
    processes: Any = SimpleNamespace(
        is_main=True,
        device=torch.device("cpu"),
        threads=1,
        rank=SimpleNamespace(host="here"),
        gather=lambda value: [value],
    )
    return Metrics(job(folder, **trackers), folder, resumed_from, processes, MODEL, Events(folder))


def train(metrics: Metrics, steps: range, loss: float) -> None:
    for step in steps:
        metrics.step(step, seconds=1.0, values={"loss": loss, "grad_norm": 1.0, "lr": 0.1})


def rows(folder: Path) -> list[tuple[int, float]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss", row.get("validation_loss"))) for row in found]


def drawn(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of a curve, as TensorBoard's own reader shows it."""
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_a_resume_drops_what_is_past_its_step(tmp_path: Path):
    metrics = open_metrics(tmp_path, 0, tensorboard=True)
    metrics.validation(0, 9.0)
    train(metrics, range(1, 7), 1.0)
    metrics.validation(4, 8.0)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')  # it was killed here; its TensorBoard file is left open, too
    for tracker in metrics._trackers:
        tracker.close()
    resumed = open_metrics(tmp_path, 4, tensorboard=True)
    train(resumed, range(5, 9), 2.0)
    resumed.close()
    wanted = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0), (7, 2.0), (8, 2.0)]
    assert sorted(rows(tmp_path)) == sorted([(0, 9.0), *wanted, (4, 8.0)])
    assert drawn(tmp_path) == wanted
    assert drawn(tmp_path, "validation_loss") == [(0, 9.0), (4, 8.0)]
    lost = json.loads((tmp_path / "events.jsonl").read_text())
    assert (lost["event"], lost["to_step"], lost["steps"]) == ("work_lost", 4, 2)


def test_a_start_that_had_saved_nothing_begins_with_empty_records(tmp_path: Path):
    for loss in (1.0, 2.0):
        metrics = open_metrics(tmp_path, 0, tensorboard=True)
        metrics.validation(0, 9.0 + loss)
        train(metrics, range(1, 3), loss)
        metrics.close()
    assert rows(tmp_path) == [(0, 11.0), (1, 2.0), (2, 2.0)]
    assert drawn(tmp_path) == [(1, 2.0), (2, 2.0)] and drawn(tmp_path, "validation_loss") == [(0, 11.0)]


def test_a_roll_back_drops_what_is_past_its_step(tmp_path: Path):
    metrics = open_metrics(tmp_path, 0, tensorboard=True)
    train(metrics, range(1, 5), 1.0)
    metrics.roll_back(2)
    train(metrics, range(3, 5), 2.0)
    metrics.close()
    assert rows(tmp_path) == drawn(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


class NvmlStandIn(ModuleType):
    """The part of pynvml (nvidia-ml-py) that torch.cuda.utilization calls; GPU `index` is busy 10 * index + 7 per cent."""

    class NVMLError(Exception):
        pass

    class NVMLError_DriverNotLoaded(NVMLError):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, fails_with: type[NVMLError] | None = None) -> None:
        super().__init__("pynvml")
        self.fails_with = fails_with

    def nvmlInit(self) -> None:
        if self.fails_with is self.NVMLError_DriverNotLoaded:
            raise self.fails_with

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if self.fails_with:
            raise self.fails_with
        return SimpleNamespace(gpu=10 * handle + 7, memory=1)


@pytest.fixture
def utilisation(monkeypatch: pytest.MonkeyPatch) -> Callable[[NvmlStandIn | None], Any]:
    """What is written of GPU 2 when NVML is this one."""

    def found(nvml: NvmlStandIn | None) -> Any:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "pynvml", nvml, raising=False)
        monkeypatch.setattr(torch.cuda, "_HAS_PYNVML", nvml is not None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
        return device_numbers(torch.device("cuda", 2))["gpu_utilisation"]

    return found


def test_gpu_utilisation_is_nvmls_number(utilisation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    assert utilisation(NvmlStandIn()) == 27
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert utilisation(NvmlStandIn()) == 67, "NVML counts the machine's GPUs, torch those it may use"


@pytest.mark.parametrize("nvml", [None, *map(NvmlStandIn, NvmlStandIn.NVMLError.__subclasses__())])
def test_gpu_utilisation_that_nobody_tells_is_null(utilisation: Callable[..., Any], nvml: NvmlStandIn | None):
    """Without the package, without a driver, on a part of a GPU."""
    assert utilisation(nvml) is None


def test_a_cpu_has_no_gpu_utilisation(tmp_path: Path):
    metrics = open_metrics(tmp_path, 0)
    train(metrics, range(1, 2), 1.0)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["gpu_utilisation"] is None and row["memory_bytes"] > 10**7


def test_the_job_environment_holds_nvml():
    assert version("nvidia-ml-py") and hasattr(pynvml, "nvmlDeviceGetUtilizationRates")
    stood_in_for = {name for name in vars(NvmlStandIn) if name.lower().startswith("nvml")}
    assert len(stood_in_for) == 6 and stood_in_for <= set(vars(pynvml))


class MlflowStandIn:
    """The part of mlflow 3 that is used: runs by id, in a store that outlives this module, as a server's does.

    Its set_tracking_uri, set_experiment, start_run, log_metrics, end_run and MlflowClient.get_metric_history.
    """

    class MlflowException(Exception):
        pass

    def __init__(self, store: dict[str, list[tuple[str, int, float]]]) -> None:
        self.store, self._active = store, ""
        self.MlflowClient = lambda: SimpleNamespace(get_metric_history=self._history)

    def set_experiment(self, name: str) -> None:
        assert name == "small"

    def set_tracking_uri(self, uri: str) -> None:
        self.uri = uri

    def get_tracking_uri(self) -> str:
        return "https://me:secret@runs"

    def start_run(self, run_id: str | None = None, run_name: str | None = None) -> Any:
        if run_id is not None and run_id not in self.store:
            raise self.MlflowException(f"Run '{run_id}' not found")
        self._active = run_id or f"run-{len(self.store)}"
        self.store.setdefault(self._active, [])
        return SimpleNamespace(info=SimpleNamespace(run_id=self._active))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.store[self._active] += [(name, step, value) for name, value in metrics.items()]

    def end_run(self) -> None:
        self._active = ""

    def _history(self, run_id: str, key: str) -> list[Any]:
        return [SimpleNamespace(step=step, value=value) for name, step, value in self.store[run_id] if name == key]


@pytest.fixture
def leg(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tracker]:
    """Opens the only tracker of a leg, as a new process would."""

    def open_one(name: str, module: object, folder: Path, first_step: int) -> Tracker:
        monkeypatch.setitem(sys.modules, name, module)
        (tracker,) = open_trackers(job(folder, **{name: True}), folder, first_step)
        return tracker

    return open_one


def test_mlflow_goes_on_in_its_run_and_shows_each_step_once(leg: Callable[..., Tracker], tmp_path: Path):
    store: dict[str, list[tuple[str, int, float]]] = {}
    for first, last, value in ((0, 7, 1.0), (5, 9, 2.0)):
        tracker = leg("mlflow", MlflowStandIn(store), tmp_path, first)
        for step in range(first, last):
            tracker.log(step, {"loss": value})
        if first == 0:
            tracker.log(4, {"validation_loss": 3.0})
        tracker.close()
    (found,) = store.values()
    assert [step for name, step, _ in found if name == "loss"] == list(range(9))
    assert ("loss", 6, 1.0) in found and ("loss", 7, 2.0) in found


def test_an_mlflow_run_that_is_gone_is_named(leg: Callable[..., Tracker], tmp_path: Path):
    leg("mlflow", MlflowStandIn({}), tmp_path, 0).close()
    with pytest.raises(UserError, match="run run-0 cannot be opened at https://runs"):
        leg("mlflow", MlflowStandIn({}), tmp_path, 5)


class WandbError(Exception):
    """As wandb.Error."""


def test_wandb_without_a_key_is_told(leg: Callable[..., Tracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def init(**_: Any) -> Any:
        raise WandbError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="No API key configured"):
        leg("wandb", SimpleNamespace(init=init, Error=WandbError), tmp_path, 0)


def test_a_tracker_that_fails_is_told_once_and_ends_no_training(
    leg: Callable[..., Tracker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    standing_in = MlflowStandIn({})
    tracker = leg("mlflow", standing_in, tmp_path, 0)
    tracker.log(1, {"loss": 1.0})
    standing_in.store.clear()
    for step in (2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    said = capsys.readouterr().err
    assert said.count("trackers.mlflow is left out from here on") == 1 and "KeyError" in said


def test_wandb_goes_on_in_its_run_and_another_folder_has_another(leg: Callable[..., Tracker], tmp_path: Path):
    asked: list[dict[str, Any]] = []

    def init(**settings: Any) -> Any:
        asked.append(settings)
        return SimpleNamespace(log=lambda numbers, step: None, finish=lambda: None)

    for folder in ("one", "one", "two"):
        (tmp_path / folder).mkdir(exist_ok=True)
        leg("wandb", SimpleNamespace(init=init, Error=WandbError), tmp_path / folder, 0).close()
    first, again, other = (settings["id"] for settings in asked)
    assert {settings["mode"] for settings in asked} == {"offline"}
    assert first == again != other and {settings["resume"] for settings in asked} == {"allow"}
