"""The profile of a few steps: which steps and ranks it has, and that it changes no bit of the training."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from longhaul.artifacts.line_record_fields import StepProfile
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.train.monitoring import profile_steps
from longhaul.train.monitoring.kernel_classes import MATRIX
from longhaul.train.monitoring.profile_steps import StepProfiler
from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.trained_stages import TrainedStage, train

CPU = torch.device("cpu")


def profiler(folder: Path, steps: tuple[int, int] | None, rank: int = 0, world_size: int = 1) -> StepProfiler:
    job = SimpleNamespace(stage=SimpleNamespace(profile_steps=steps))
    context = SimpleNamespace(rank=SimpleNamespace(rank=rank, world_size=world_size, host="n1"), device=CPU)
    return StepProfiler(cast(Any, job), cast(Any, context), folder)


def run_steps(profiled: StepProfiler, first: int, last: int) -> None:
    """Step s multiplies matrices s times."""
    for step in range(first, last + 1):
        profiled.begin_step(step)
        for _ in range(step):
            torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        profiled.end_step()


def products(profile: StepProfile) -> int:
    return {kernel["name"]: kernel["calls"] for kernel in profile["breakdown"]["kernels"]}["aten::mm"]


def read(folder: Path, rank: int = 0) -> StepProfile:
    return read_typed_json(WeightsFolder(folder).profile(rank), StepProfile)


@pytest.mark.parametrize(
    ("first", "asked", "expected"),
    [(1, (4, 6), 4 + 5 + 6), (1, (1, 2), 1 + 2), (3, (3, 3), 3)],
    ids=["with a warm-up step", "from the first step", "one step, first of a resumed attempt"],
)
def test_a_profile_has_the_steps_that_were_asked_for(tmp_path: Path, first: int, asked: tuple[int, int], expected: int):
    profiled = profiler(tmp_path, asked)
    run_steps(profiled, first, 8)
    profiled.close()
    found = read(tmp_path)
    assert (found["first_step"], found["first_step"] + found["steps"] - 1) == asked
    assert products(found) == expected


def test_a_training_that_ends_earlier_leaves_the_steps_until_then(tmp_path: Path):
    profiled = profiler(tmp_path, (3, 9))
    run_steps(profiled, 1, 4)
    profiled.close()
    found = read(tmp_path)
    assert (found["first_step"], found["steps"], products(found)) == (3, 2, 3 + 4)


def test_other_ranks_and_later_attempts_have_no_profile(tmp_path: Path):
    for profiled in (profiler(tmp_path, None), profiler(tmp_path, (1, 2), 1, 3)):
        run_steps(profiled, 1, 3)
        profiled.close()
    resumed = profiler(tmp_path, (1, 2))
    run_steps(resumed, 2, 3)
    resumed.close()
    assert not WeightsFolder(tmp_path).profiles.exists()


def test_a_profile_that_cannot_be_written_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile_steps, "write_json", refuse)
    run_steps(profiler(tmp_path, (1, 1)), 1, 2)
    assert "warning: rank 0 could not write its profile: [Errno 28] No space left on device" in capsys.readouterr().out


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainedStage]:
    folder = tmp_path_factory.mktemp("profiles")
    keys = {"steps": 5, "export": "last"}
    found = {
        "plain": TrainedStage(folder / "plain", 2, stage=keys),
        "profiled": TrainedStage(folder / "profiled", 2, stage={**keys, "profile_steps": [3, 4]}),
    }
    train(write_shared_data(folder / "shared"), *found.values())
    return found


def test_a_profile_changes_no_bit(stages: dict[str, TrainedStage]):
    plain, profiled = stages.values()
    assert profiled.losses() == plain.losses() and len(plain.losses()) == 5
    assert profiled.master_hashes() == plain.master_hashes()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_time_of_a_step_is_that_of_its_trace(stages: dict[str, TrainedStage], rank: int):
    weights = WeightsFolder(stages["profiled"].weights)
    trace = json.loads(gzip.decompress(weights.profile_trace(rank).read_bytes()))
    steps = [event for event in trace["traceEvents"] if str(event.get("name")).startswith("ProfilerStep#")]
    breakdown = read(weights.path, rank)["breakdown"]
    assert len(steps) == 2
    parts = sum(breakdown["covered_s"].values()) + breakdown["idle_s"]
    assert parts == pytest.approx(breakdown["seconds"])
    assert breakdown["seconds"] == pytest.approx(sum(step["dur"] for step in steps) * 1e-6, rel=0.01)
    assert breakdown["covered_s"][MATRIX] > 0
