"""The records of a training after a resume: repeated steps appear once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longhaul.config.model_size import model_size
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.monitoring import metrics as module
from longhaul.train.monitoring.events import EventWriter
from longhaul.train.monitoring.metrics import Metrics, device_numbers
from tests.support.small_configs import LLAMA, base_stage

MODEL = {"model_type": "llama", **LLAMA}


def open_metrics(
    folder: Path,
    resumed_from: int,
    job: TrainSpec | None = None,
    cut_loss_share: float | None = None,
    **trackers: bool,
) -> Metrics:
    context: Any = SimpleNamespace(
        is_main=True,
        device=torch.device("cpu"),
        threads=1,
        rank=SimpleNamespace(host="here"),
        gather=lambda value: [value],
    )
    job = job or base_stage(folder, **trackers)
    epochs = {"prose": 1.6, "code": 0.25}
    return Metrics(job, folder, resumed_from, context, MODEL, EventWriter(folder), epochs, cut_loss_share)


def train(metrics: Metrics, steps: range, loss: float) -> None:
    for step in steps:
        values = {"loss": loss, "grad_norm": 1.0, "lr": 0.1, "tokens": 384, "attention_pairs": 960, "data_wait_s": 0.5}
        metrics.step(step, seconds=1.0, values=values)


def rows(folder: Path) -> list[tuple[int, float]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss", row.get("validation_loss"))) for row in found]


def drawn(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    """Return (step, value) of a curve, as TensorBoard's own reader shows it."""
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_the_log_says_how_many_epochs_of_each_source_the_steps_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    job = base_stage(tmp_path)
    open_metrics(tmp_path, 0, job)
    said = (
        f"{job.steps:,} steps of {job.stage.global_batch_size:,} samples: 1.60 epochs of prose, 0.25 epochs of code\n"
    )
    assert said in capfd.readouterr().out


def test_a_resume_drops_the_lines_after_its_step(tmp_path: Path):
    began_s = time.time() - 0.001  # times of records are rounded
    metrics = open_metrics(tmp_path, 0, tensorboard=True)
    metrics.validation(0, 9.0)
    train(metrics, range(1, 7), 1.0)
    metrics.validation(4, 8.0)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')  # the process is killed here, with its TensorBoard file open
    for tracker in metrics._trackers:
        tracker.close()
    resumed = open_metrics(tmp_path, 4, tensorboard=True)
    train(resumed, range(5, 9), 2.0)
    resumed.close()
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0), (7, 2.0), (8, 2.0)]
    assert sorted(rows(tmp_path)) == sorted([(0, 9.0), *expected, (4, 8.0)])
    assert drawn(tmp_path) == expected
    assert drawn(tmp_path, "validation_loss") == [(0, 9.0), (4, 8.0)]
    lost = json.loads((tmp_path / "events.jsonl").read_text())
    assert (lost["event"], lost["to_step"], lost["steps"]) == ("work_lost", 4, 2)
    assert began_s <= lost["last_step_s"] <= lost["time_s"]


def test_lines_hold_the_time_at_which_they_were_written_and_trackers_get_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module.time, "time", lambda: 1_750_000_000.1234)
    metrics = open_metrics(tmp_path, 0, tensorboard=True)
    metrics.validation(0, 9.0)
    train(metrics, range(1, 2), 1.0)
    metrics.close()
    written = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [row["time_s"] for row in written] == [1_750_000_000.123] * 2
    with pytest.raises(KeyError, match="time_s"):
        drawn(tmp_path, "time_s")


def test_tokens_per_s_leave_out_padding_and_include_the_wait(tmp_path: Path):
    """A batch is 8 sequences of 64 positions."""
    metrics = open_metrics(tmp_path, 0)
    train(metrics, range(1, 2), 1.0)
    metrics.close()
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (row["tokens"], row["tokens_per_s"], row["padding_share"]) == (384, 384 / 1.5, 0.25)


def test_lines_of_packed_conversations_hold_the_share_of_cut_loss_tokens(tmp_path: Path):
    """Windows of text cut nothing: without packs there is no such key."""
    for share, expected in ((1 / 3, 0.333333), (0.0, 0.0), (None, None)):
        metrics = open_metrics(tmp_path, 0, cut_loss_share=share)
        train(metrics, range(1, 2), 1.0)
        metrics.close()
        row = json.loads((tmp_path / "metrics.jsonl").read_text())
        assert row.get("cut_loss_share") == expected and ("cut_loss_share" in row) == (share is not None)


def test_a_restart_without_a_checkpoint_begins_with_empty_records(tmp_path: Path):
    for loss in (1.0, 2.0):
        metrics = open_metrics(tmp_path, 0, tensorboard=True)
        metrics.validation(0, 9.0 + loss)
        train(metrics, range(1, 3), loss)
        metrics.close()
    assert rows(tmp_path) == [(0, 11.0), (1, 2.0), (2, 2.0)]
    assert drawn(tmp_path) == [(1, 2.0), (2, 2.0)] and drawn(tmp_path, "validation_loss") == [(0, 11.0)]


def test_a_roll_back_drops_the_lines_after_its_step(tmp_path: Path):
    metrics = open_metrics(tmp_path, 0, tensorboard=True)
    train(metrics, range(1, 5), 1.0)
    metrics.roll_back(2)
    train(metrics, range(3, 5), 2.0)
    metrics.close()
    assert rows(tmp_path) == drawn(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_mfu_is_the_share_of_the_peak_of_all_gpus(tmp_path: Path):
    """384 tokens of documents of four tokens have 960 pairs: 1 + 2 + 3 + 4 each. They took 1 s after a wait of 0.5 s."""
    flops = 6 * model_size(MODEL).active * 384 + 6 * 2 * (2 * 4 * 16) * 960
    job = base_stage(tmp_path).model_copy(update={"gpu_peak_tflops": flops / 1e12, "world_size": 4})
    train(open_metrics(tmp_path, 0, job), range(1, 2), 1.0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["mfu"] == round(1 / 4 / 1.5, 4)


def test_mfu_is_null_if_the_site_has_no_peak(tmp_path: Path):
    train(open_metrics(tmp_path, 0), range(1, 2), 1.0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["mfu"] is None


class FakeNvml(ModuleType):
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
def utilisation(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeNvml | None], Any]:
    """Return a function: NVML -> the utilisation of GPU 2 in the metrics."""

    def found(nvml: FakeNvml | None) -> Any:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "pynvml", nvml, raising=False)
        monkeypatch.setattr(torch.cuda, "_HAS_PYNVML", nvml is not None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
        return device_numbers(torch.device("cuda", 2))["gpu_utilisation"]

    return found


def test_gpu_utilisation_is_that_of_nvml(utilisation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    assert utilisation(FakeNvml()) == 27
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert utilisation(FakeNvml()) == 67, "NVML counts the machine's GPUs, torch those it may use"


@pytest.mark.parametrize("nvml", [None, *map(FakeNvml, FakeNvml.NVMLError.__subclasses__())])
def test_unknown_gpu_utilisation_is_null(utilisation: Callable[..., Any], nvml: FakeNvml | None):
    """Without the package, without a driver, and on a MIG slice."""
    assert utilisation(nvml) is None


def test_gpu_utilisation_on_a_cpu_is_null(tmp_path: Path):
    metrics = open_metrics(tmp_path, 0)
    train(metrics, range(1, 2), 1.0)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["gpu_utilisation"] is None and row["memory_bytes"] > 10**7


def test_the_job_environment_has_nvml():
    assert version("nvidia-ml-py") and hasattr(pynvml, "nvmlDeviceGetUtilizationRates")
    faked = {name for name in vars(FakeNvml) if name.lower().startswith("nvml")}
    assert len(faked) == 6 and faked <= set(vars(pynvml))
