"""A checkpoint whose pickles hold a payload, with adjusted hashes, runs no code in any way in which a checkpoint is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
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
from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.trained_stages import TrainedStage, train
from tests.support.unpickling_payloads import adjust_manifest, put_payload, put_payload_in_checkpoint

STEPS = 2
SHORT: dict[str, Any] = {
    "steps": STEPS,
    "schedule": {"kind": "constant"},
    "checkpoints": {"every_steps": 1},
    "validation": {"every_steps": STEPS, "max_samples": 2},
}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ZeRO 0": ("llama", {"zero": {"stage": 0}}),
    "ZeRO 1, PowerSGD": ("llama", {"zero": {"stage": 1}, "communication": {"powersgd": {"rank": 2}}}),
    "ZeRO 2": ("llama", {"zero": {"stage": 2}}),
    "ZeRO 3": ("llama", {"zero": {"stage": 3}}),
    "pipeline 2": ("llama", {"parallel": {"pipeline": 2}}),
    "tensor 2": ("llama", {"parallel": {"tensor": 2}}),
    "expert 2": ("deepseek_v3", {"parallel": {"expert": 2}}),
}
"""Name -> model and keys of the stage. Each layout has files of another kind."""
REPAIRED = "ZeRO 2"


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
    for source in sources.values():
        shutil.copytree(source.folder, _untampered(source))
    return {name: _tamper(source) for name, source in sources.items()}


def _untampered(source: TrainedStage) -> Path:
    return source.folder.with_name(f"{source.folder.name} untampered")


def _tamper(source: TrainedStage) -> Tampered:
    marker = source.folder.with_suffix(".ran")
    files = put_payload_in_checkpoint(source.checkpoint(STEPS), marker)
    _record_hashes(source)
    return Tampered(source, marker, files)


def _record_hashes(stage: TrainedStage) -> None:
    """Write the hashes of the checkpoints' manifests into checkpoint.json, as an attacker would."""
    path = stage.folder / "stages/main/checkpoint.json"
    checkpoint = json.loads(path.read_text())
    for entry in checkpoint["checkpoints"].values():
        entry["sha256"] = file_sha256(stage.weights / entry["path"] / "manifest.json")
    path.write_text(json.dumps(checkpoint))


@pytest.fixture(scope="module")
def one_kind(tampered: dict[str, Tampered]) -> dict[str, dict[str, TrainedStage]]:
    """Return by layout and kind of file the resumes from a checkpoint in which these files alone hold the payload."""
    stages = {name: dict(_with_payload_in_one_kind(source, LAYOUTS[name])) for name, source in tampered.items()}
    shared = next(iter(tampered.values())).source.folder.parent / "shared"
    train(shared, *(stage for of_layout in stages.values() for stage in of_layout.values()))
    return stages


def _with_payload_in_one_kind(of: Tampered, layout: tuple[str, dict[str, Any]]) -> Iterator[tuple[str, TrainedStage]]:
    """Yield a pattern of names and a stage for each kind of file. All ranks read a file of each kind, so that all end."""
    model, keys = layout
    for number, pattern in enumerate(sorted({re.sub(r"\d+", "*", file) for file in of.files})):
        folder = of.source.folder.with_name(f"{of.source.folder.name} kind {number}")
        stage = TrainedStage(folder, 2, stage={**SHORT, **keys}, model=model)
        shutil.copytree(_untampered(of.source), folder)
        checkpoint = stage.checkpoint(STEPS)
        paths = [path for path in checkpoint.glob("*.pt") if re.sub(r"\d+", "*", path.name) == pattern]
        for path in paths:
            put_payload(path, folder.with_suffix(".ran"))
        adjust_manifest(checkpoint, paths)
        _record_hashes(stage)
        _stop_before_the_end(stage)
        yield pattern, stage


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
            ("reshard", _other_layout(keys), {}),
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


def _other_layout(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of another layout; a stage with PowerSGD keeps it."""
    zero = 0 if keys.get("zero") == {"stage": 1} else 1
    return {"zero": {"stage": zero}, **{key: keys[key] for key in ("communication",) if key in keys}}


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


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_payload_in_one_kind_of_file_does_not_run(name: str, one_kind: dict[str, dict[str, TrainedStage]]):
    """With a payload in every file, the first one ends the resume, and nothing is known of the others."""
    assert len(one_kind[name]) >= 2 and "trainer-rank-*.pt" in one_kind[name]
    for pattern, stage in one_kind[name].items():
        assert not stage.folder.with_suffix(".ran").exists(), pattern
        refusal = f"{pattern} is not read, because it holds more than tensors"
        assert re.search(re.escape(refusal).replace(r"\*", r"\d+"), stage.ended), (pattern, stage.ended)


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
