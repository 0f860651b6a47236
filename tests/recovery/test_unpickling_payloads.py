"""A checkpoint whose pickles hold a payload, with adjusted hashes, runs no code in any way in which a checkpoint is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.artifacts.atomic_files import file_sha256
from longhaul.checkpoint_io import open_master_weights, open_optimizer_state
from longhaul.errors import UserError
from longhaul.export import export_checkpoint
from tests.parity.prepare_case import prepare_case
from tests.parity.shared_data import write_shared_data
from tests.recovery.trained_stages import TrainedStage, train
from tests.support.unpickling_payloads import put_payload_in_checkpoint

STEPS = 2
SHORT: dict[str, Any] = {
    "steps": STEPS,
    "schedule": {"kind": "constant"},
    "checkpoints": {"every_steps": 1},
    "validation": {"every_steps": STEPS, "max_samples": 2},
}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ZeRO 0": ("llama", {"zero": {"stage": 0}}),
    "ZeRO 2": ("llama", {"zero": {"stage": 2}}),
    "ZeRO 3": ("llama", {"zero": {"stage": 3}}),
    "pipeline 2": ("llama", {"parallel": {"pipeline": 2}}),
    "expert 2": ("deepseek_v3", {"parallel": {"expert": 2}}),
}
"""Name -> model and keys of the stage. Each layout has files of another kind."""
REPAIRED = "ZeRO 2"
OTHER_LAYOUT: dict[str, Any] = {"zero": {"stage": 1}}


@dataclass(frozen=True)
class Tampered:
    """Copies of one finished training whose last checkpoint, and the one before, hold a payload that makes `marker`."""

    source: TrainedStage
    marker: Path
    files: list[str]


@pytest.fixture(scope="module")
def tampered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tampered]:
    folder = tmp_path_factory.mktemp("payloads")
    sources = {
        name: TrainedStage(folder / name, 2, stage={**SHORT, **keys}, model=model)
        for name, (model, keys) in LAYOUTS.items()
    }
    train(write_shared_data(folder / "shared"), *sources.values())
    return {name: _tamper(source) for name, source in sources.items()}


def _tamper(source: TrainedStage) -> Tampered:
    marker = source.folder.with_suffix(".ran")
    last = source.checkpoint(STEPS)
    files = put_payload_in_checkpoint(last, marker)
    path = source.folder / "stages/main/checkpoint.json"
    checkpoint = json.loads(path.read_text())
    for entry in checkpoint["checkpoints"].values():
        entry["sha256"] = file_sha256(source.weights / entry["path"] / "manifest.json")
    path.write_text(json.dumps(checkpoint))
    return Tampered(source, marker, files)


@pytest.fixture(scope="module")
def entered(tampered: dict[str, Tampered]) -> dict[tuple[str, str], TrainedStage]:
    """Return every layout resumed, resharded, and as the start of another stage."""
    stages = {}
    for name, (model, keys) in LAYOUTS.items():
        source = tampered[name].source
        folder = source.folder.parent
        start = {"start": f"checkpoint={source.folder / 'stages/main/checkpoint.json'}"}
        for way, stage_keys, faults in (
            ("resume", keys, {}),
            ("reshard", OTHER_LAYOUT, {}),
            ("start", keys, start),
        ):
            stage = TrainedStage(folder / f"{way} {name}", 2, stage={**SHORT, **stage_keys}, faults=faults, model=model)
            if way != "start":
                shutil.copytree(source.folder, stage.folder)
                _stop_before_the_end(stage)
            stages[way, name] = stage
    stages["remedy", REPAIRED] = repaired = TrainedStage(folder / "remedy", 2, stage={**SHORT, **LAYOUTS[REPAIRED][1]})
    shutil.copytree(tampered[REPAIRED].source.folder, repaired.folder)
    repaired.checkpoint(STEPS).rename(repaired.folder / "moved-away")
    train(next(iter(tampered.values())).source.folder.parent / "shared", *stages.values())
    return stages


def _stop_before_the_end(stage: TrainedStage) -> None:
    """Move the tampered checkpoint back to an earlier step, from which the stage has to continue."""
    folder, earlier = stage.checkpoint(STEPS), stage.checkpoint(STEPS - 1)
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)
    folder.rename(earlier)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("way", ["resume", "reshard", "start"])
def test_no_way_into_a_training_runs_the_payload(
    way: str, name: str, tampered: dict[str, Tampered], entered: dict[tuple[str, str], TrainedStage]
):
    """A resume is refused. A start reads the weights alone, with a reader that replaces what it does not know."""
    ended = entered[way, name].ended
    assert not tampered[name].marker.exists()
    assert ended == "finished" if way == "start" else "is not read, because it holds more than tensors" in ended


def test_after_the_remedy_the_checkpoint_before_is_used(
    tampered: dict[str, Tampered], entered: dict[tuple[str, str], TrainedStage]
):
    """The remedy is to move the checkpoint away."""
    stage = entered["remedy", REPAIRED]
    assert [event["step"] for event in stage.events("resumed")] == [STEPS - 1]
    assert stage.master_hashes() == tampered[REPAIRED].source.master_hashes()


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_export_does_not_run_the_payload(name: str, tampered: dict[str, Tampered]):
    source = tampered[name].source
    shared = source.folder.parent / "shared"
    _, job = prepare_case(source.folder, shared, source.as_json(shared)["run"])
    export_checkpoint.run(job)
    assert Path(job.out).exists() and not tampered[name].marker.exists()


@pytest.mark.parametrize("read", [open_master_weights, open_optimizer_state])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_payload_is_real(name: str, read: Callable[[Path], Any], tampered: dict[str, Tampered], tmp_path: Path):
    """Each of the files runs it when it is unpickled without restrictions; the readers of longhaul do not."""
    folder = tampered[name].source.checkpoint(STEPS)
    try:
        read(folder)
    except UserError as error:
        raise AssertionError("the payload changed nothing else of the file") from error
    assert not tampered[name].marker.exists() and len(tampered[name].files) >= 3
    for file in tampered[name].files:
        torch.load(folder / file, weights_only=False)
        assert tampered[name].marker.exists()
        tampered[name].marker.unlink()
